"""One optimiser step: the arithmetic of training and everything that can go wrong in it."""

import contextlib
import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import UserError
from engine.graph import Graph


def learning_rate(peak: float, schedule: str, step: int, warmup: int, progress: float) -> float:
    """Linear warm-up over `warmup` steps, then `constant` or a cosine to 0 as progress goes from 0 to 1."""
    rate = peak * min(1.0, (step + 1) / max(warmup, 1))
    return rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) if schedule == "cosine" else rate


def ema_decay(limit: float, step: int) -> float:
    """Decay after `step` updates: a shorter memory at first, so that the first weights are soon forgotten."""
    return min(limit, (1 + step) / (10 + step))


def amp_dtype(device: torch.device) -> torch.dtype:
    """bf16, or fp16 on a GPU that has no bf16 of its own."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def draw(seed: int, step: int, timesteps: int, shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """Everything random in a step: timesteps (B,), noise (B, C, H, W) and which images to mirror (B,).

    A function of (seed, step) for the whole effective batch, so that neither accumulation nor the number of
    processes nor a resume changes what is computed. The timesteps are uniform but spread over the batch, one in each
    of B equal parts of the process, which makes the gradient less noisy: Kingma et al. (arXiv:2107.00630).
    """
    generator = torch.Generator(device).manual_seed((seed * 0x9E3779B1 + step) % 2**63)
    place = torch.rand(shape[:1], generator=generator, device=device) + torch.arange(shape[0], device=device)
    t = (place / shape[0] * timesteps).long().clamp(max=timesteps - 1)
    noise = torch.randn(shape, generator=generator, device=device)
    mirror = torch.rand(shape[:1], generator=generator, device=device) < 0.5
    return t, noise, mirror


class Step:
    """Updates a model and its EMA copy from one batch.

    model: called as model(images, t, noise), gives a scalar loss; images uint8 (B, C, H, W) come in and are taken
    to floats in [0, 1]. config: BATCH_SIZE, GRAD_CLIP, EMA_DECAY, HORIZONTAL_FLIP, USE_AMP, COMPILE_MODEL,
    CUDA_GRAPH, SEED.
    """

    def __init__(self, model: nn.Module, config: Any, rank: int = 0, world: int = 1):
        self.model, self.config, self.rank, self.world = model, config, rank, world
        self.device = next(model.parameters()).device
        self.micro_batch = config.BATCH_SIZE
        model.to(memory_format=torch.channels_last)  # as engine.unet computes
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.parameters, self.averaged = list(model.parameters()), list(self.ema.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.LEARNING_RATE, betas=(0.9, 0.99), fused=True)
        self.dtype = amp_dtype(self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.USE_AMP and self.dtype == torch.float16, init_scale=2.0**12
        )
        self.network = self.wrap(torch.compile(model, dynamic=False) if config.COMPILE_MODEL else model)
        captured = config.CUDA_GRAPH and self.device.type == "cuda" and world == 1 and model.capturable
        self.graphs: dict[int, Graph] | None = {} if captured else None  # by images in a micro-batch
        # counted on the device, so that looking after every step does not make the host wait
        self.skipped = torch.zeros((), device=self.device)
        self.skipped_in_a_row = torch.zeros((), device=self.device)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as this process calls it: gradients are averaged over processes where there are several."""
        return DistributedDataParallel(network, broadcast_buffers=False) if self.world > 1 else network

    def autocast(self) -> torch.autocast:
        """Mixed precision as configured."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.config.USE_AMP)

    def gradients(self, images: Tensor, step: int) -> Tensor:
        """Accumulates the gradient of one batch, micro-batch by micro-batch; returns the mean loss, detached."""
        share = len(images)
        whole = torch.Size([share * self.world, *images.shape[1:]])
        drawn = draw(self.config.SEED, step, self.model.num_timesteps, whole, self.device)
        t, noise, mirror = (values[self.rank * share : (self.rank + 1) * share] for values in drawn)
        total = torch.zeros((), device=self.device)
        for start in range(0, share, self.micro_batch):
            part = slice(start, start + self.micro_batch)
            micro = images[part], t[part], noise[part], mirror[part]
            # gradients travel between processes once a step, not once a micro-batch
            last = start + self.micro_batch >= share
            with self.network.no_sync() if self.world > 1 and not last else contextlib.nullcontext():
                total += self.backward(*micro, share) if self.graphs is None else self.replay(*micro, share)
        return total

    def backward(self, images: Tensor, t: Tensor, noise: Tensor, mirror: Tensor, share: int) -> Tensor:
        """Adds the gradient of a micro-batch out of `share` images; returns its part of the mean loss, detached."""
        x = images.float() / 255
        if self.config.HORIZONTAL_FLIP:
            x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
        with self.autocast():
            loss = self.network(x, t, noise) * (len(x) / share)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def replay(self, *micro: Any) -> Tensor:
        """What `backward` does, from a graph that is captured for each size of micro-batch when it first comes."""
        *tensors, share = micro
        size = len(tensors[0])
        if size not in self.graphs:
            self.graphs[size] = Graph(lambda *values: self.backward(*values, share), tensors, self.parameters)
        loss = self.graphs[size](*tensors)
        for p, gradient in zip(self.parameters, self.graphs[size].gradients, strict=True):
            if gradient is not None:
                p.grad = gradient if size == share else gradient.clone() if p.grad is None else p.grad.add_(gradient)
        return loss

    def __call__(self, images: Tensor, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """One update with learning rate `rate`; returns loss and gradient norm as scalars on the device.

        An update whose loss or gradient is not finite is left out and counted. Out of GPU memory halves the
        micro-batch and does the same step again; raises UserError if one image alone does not fit.
        """
        loss = None
        while loss is None:
            try:
                loss = self.gradients(images, step)
            except torch.OutOfMemoryError:
                smaller = (min(self.micro_batch, len(images)) + 1) // 2
                if self.world > 1 or smaller == self.micro_batch:
                    raise UserError(
                        "out of GPU memory: lower --batch_size (and raise --gradient_accumulation), or --dim", 1
                    ) from None
                self.micro_batch = smaller
                print(f"out of GPU memory: going on with micro-batches of {smaller}, the effective batch stays")
            except torch._dynamo.exc.TorchDynamoException as problem:
                reason = str(problem).strip().splitlines()[0]
                print(f"torch.compile FAILED, going on without it (--no-compile_model is the same): {reason}")
                self.network = self.wrap(self.model)
            except RuntimeError as problem:
                if self.graphs is None:
                    raise
                reason = str(problem).strip().splitlines()[0]
                print(f"CUDA graph capture FAILED, going on without it (--no-cuda_graph is the same): {reason}")
                self.graphs = None
            if loss is None:  # outside the handlers, where the failed step's tensors are free again
                if self.graphs:
                    self.graphs.clear()
                self.optimizer.zero_grad()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        if self.world > 1:
            torch.distributed.all_reduce(loss)
            loss /= self.world
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.GRAD_CLIP or math.inf)
        bad = (~(torch.isfinite(loss) & torch.isfinite(norm))).float()
        self.skipped += bad
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * bad
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = bad  # the fused kernel leaves the weights alone where this is 1
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        decay = ema_decay(self.config.EMA_DECAY, step)
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.parameters, 1 - decay)
        return loss, norm

    @torch.no_grad()
    def validate(self, images: Tensor) -> float:
        """Mean loss of the EMA weights on held-out images, uint8 (V, C, H, W).

        The noise is always the same and the timesteps are spread evenly, so that two calls can be compared.
        """
        count = len(images)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        t = ((torch.arange(count) + 0.5) / count * self.model.num_timesteps).long()
        total = 0.0
        for start in range(0, count, self.micro_batch):
            part = slice(start, start + self.micro_batch)
            x, at, eps = (v[part].to(self.device) for v in (images, t, noise))
            with self.autocast():
                total += self.ema(x.float() / 255, at, eps).item() * len(x)
        return total / count

    def state_dict(self) -> dict[str, Any]:
        """Weights, averaged weights and optimiser, to go on from."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what state_dict gave."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.fill_(state["skipped"])
