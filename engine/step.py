"""One optimiser step: the arithmetic of training and everything that can go wrong in it."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.graph import Graph
from engine.memory import AtOnce
from engine.optimizer import Adam, Muon, flatten, is_matrix, padded, views

FIRST_SCALE = 2.0**12  # of the loss in fp16, whose small gradients would vanish
STEPS_PER_SCALE = 2000  # good ones until a higher one is tried


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


def draw(seed: int, step: int, shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """Everything random in a step: what becomes timesteps (B,), noise (B, C, H, W) and which images to mirror (B,).

    A function of (seed, step) for the whole effective batch, so that neither accumulation nor the number of
    processes nor a resume changes what is computed. The first is uniform in [0, 1) but spread over the batch, one in
    each of B equal parts, which makes the gradient less noisy: Kingma et al. (arXiv:2107.00630).
    """
    generator = torch.Generator(device).manual_seed((seed * 0x9E3779B1 + step) % 2**63)
    place = torch.rand(shape[:1], generator=generator, device=device) + torch.arange(shape[0], device=device)
    noise = torch.randn(shape, generator=generator, device=device)
    mirror = torch.rand(shape[:1], generator=generator, device=device) < 0.5
    return place / shape[0], noise, mirror


class Step:
    """Updates a model and its EMA copy from one batch.

    model: called as model(images, t, noise), gives a scalar loss, and has `timesteps_at`. images: uint8 (B, C, H, W),
    taken to floats in [0, 1]. config: BATCH_SIZE, OPTIMIZER, GRAD_CLIP, EMA_DECAY, HORIZONTAL_FLIP, USE_AMP,
    COMPILE_MODEL, CUDA_GRAPH, SEED. This is process `rank` of `world`; each has its own part of every batch.
    """

    def __init__(self, model: nn.Module, config: Any, rank: int = 0, world: int = 1):
        self.model, self.config, self.rank, self.world = model, config, rank, world
        self.device = next(model.parameters()).device
        self.micro_batch, self.aside = config.BATCH_SIZE, AtOnce(config.BATCH_SIZE)  # in training, and beside it
        model.to(memory_format=torch.channels_last)  # as engine.unet computes
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.weights, named = flatten(model)
        self.average, _ = flatten(self.ema)
        if world > 1:
            torch.distributed.broadcast(self.weights, src=0)
            self.average.copy_(self.weights)
        self.parameters = [p for _, p in named]
        self.gradient = torch.zeros_like(self.weights)
        self.parts = views(self.gradient, self.parameters)
        matrices = [p for name, p in named if config.OPTIMIZER == "muon" and is_matrix(name, p)]
        boundary = sum(padded(p.numel()) for p in matrices)
        muon = Muon(self.weights[:boundary], [p.shape for p in matrices], gather=self.device.type == "cuda")
        adam = Adam(self.weights[boundary:])
        self.optimizers = {"muon": (muon, slice(0, boundary)), "adam": (adam, slice(boundary, None))}
        self.dtype = amp_dtype(self.device)
        self.network = torch.compile(model, dynamic=False) if config.COMPILE_MODEL else model
        captured = config.CUDA_GRAPH and self.device.type == "cuda" and model.capturable
        self.graphs: dict[int | str, Graph] | None = {} if captured else None  # of micro-batches by size, and `update`
        self.pool = torch.cuda.graph_pool_handle() if captured else None  # they run one after the other: one memory
        # scalars on the device, so that looking after every step does not make the host wait
        self.rate, self.fresh, self.skipped, self.skipped_in_a_row, self.good_in_a_row = (
            torch.zeros((), device=self.device) for _ in range(5)
        )
        self.scales = config.USE_AMP and self.dtype == torch.float16
        self.scale = torch.full_like(self.rate, FIRST_SCALE if self.scales else 1.0)

    def autocast(self) -> torch.autocast:
        """Mixed precision as configured."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.config.USE_AMP)

    def gradients(self, images: Tensor, step: int) -> Tensor:
        """Puts this process's part of the gradient into `gradient`, micro-batch by micro-batch; gives its loss."""
        share = len(images)
        whole = torch.Size([share * self.world, *images.shape[1:]])
        place, noise, mirror = draw(self.config.SEED, step, whole, self.device)
        drawn = self.model.timesteps_at(place), noise, mirror
        inputs = (images, *(values[self.rank * share : (self.rank + 1) * share] for values in drawn))
        if self.micro_batch < share:
            self.gradient.zero_()
        loss = torch.zeros((), device=self.device)
        for micro in zip(*(values.split(self.micro_batch) for values in inputs), strict=True):
            loss += self.launch(len(micro[0]), lambda *values: self.backward(*values, share), *micro)
        return loss

    def launch(self, key: int | str, work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """work(*inputs), if configured as one CUDA graph; the same key stands for the same work."""
        if self.graphs is None:
            return work(*inputs)
        if key not in self.graphs:
            self.graphs[key] = Graph(work, self.pool)
        return self.graphs[key](*inputs)

    def backward(self, images: Tensor, t: Tensor, noise: Tensor, mirror: Tensor, share: int) -> Tensor:
        """Gradient of a micro-batch out of `share` images, set or else added; returns its part of the mean loss."""
        x = images.float() / 255
        if self.config.HORIZONTAL_FLIP:
            x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
        with self.autocast():
            loss = self.network(x, t, noise) * (len(x) / (share * self.world))
        (loss * self.scale).backward()
        there = [(part, p.grad) for part, p in zip(self.parts, self.parameters, strict=True) if p.grad is not None]
        (torch._foreach_copy_ if len(x) == share else torch._foreach_add_)(*map(list, zip(*there, strict=True)))
        for p in self.parameters:
            p.grad = None
        return loss.detach()

    @torch.no_grad()
    def update(self, loss: Tensor) -> Tensor:
        """Moves weights and EMA by what lies in `gradient`, unless loss or gradient is not finite; gives its norm."""
        norm = torch.linalg.vector_norm(self.gradient) / self.scale
        good = (torch.isfinite(loss) & torch.isfinite(norm)).float()
        factor = (self.config.GRAD_CLIP / (norm + 1e-6)).clamp(max=1) if self.config.GRAD_CLIP else 1
        factor = factor / self.scale
        self.skipped += 1 - good
        self.skipped_in_a_row.add_(1).mul_(1 - good)
        self.good_in_a_row.add_(1).mul_(good)
        if self.scales:  # as high as fp16 can take it
            grows = (self.good_in_a_row % STEPS_PER_SCALE == 0) & (good > 0)
            self.scale.mul_(torch.where(grows, 2.0, torch.where(good > 0, 1.0, 0.5)))
        for optimizer, part in self.optimizers.values():
            optimizer.update(self.weights[part], self.gradient[part], self.rate, factor, good)
        self.average.lerp_(self.weights, self.fresh * good)
        return norm

    def __call__(self, images: Tensor, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """One update with learning rate `rate`; returns loss and gradient norm as scalars on the device.

        An update whose loss or gradient is not finite is left out and counted. Out of GPU memory halves the
        micro-batch and does the same step again; raises UserError if one image alone does not fit, or the optimiser,
        whose memory does not depend on the batch. The norm is overwritten by the next call.
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
                self.give_up("torch.compile", "--no-compile_model", problem)
                self.network = self.model
            except RuntimeError as problem:
                if self.graphs is None:
                    raise
                self.give_up("CUDA graph capture", "--no-cuda_graph", problem)
                self.graphs = None
            if loss is None:  # outside the handlers, where the failed step's tensors are free again
                if self.graphs:
                    self.graphs.clear()
                    self.pool = torch.cuda.graph_pool_handle()
                for p in self.parameters:
                    p.grad = None
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        if self.world > 1:
            torch.distributed.all_reduce(self.gradient)
            torch.distributed.all_reduce(loss)
        self.rate.fill_(rate)
        self.fresh.fill_(1 - ema_decay(self.config.EMA_DECAY, step))
        try:
            return loss, self.launch("update", self.update, loss)
        except torch.OutOfMemoryError:  # what it has changed by then is not known: the checkpoints are good
            raise UserError("out of GPU memory in the update: lower --dim, or have the card alone", 1) from None

    def give_up(self, what: str, flag: str, problem: Exception) -> None:
        """Says that training goes on without something."""
        lines = [line for line in (str(problem) or repr(problem)).split("Set TORCH")[0].splitlines() if line.strip()]
        reason = " ... ".join(dict.fromkeys((lines[0], lines[-1])))  # what failed, and why where that is told last
        print(f"{what} FAILED, going on without it ({flag} is the same): {reason}")

    @torch.no_grad()
    def validate(self, images: Tensor) -> float:
        """Mean loss of the EMA weights on held-out images, uint8 (V, C, H, W).

        The noise is always the same and the timesteps are spread evenly, so that two calls can be compared.
        """
        count = len(images)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        t = self.model.timesteps_at(((torch.arange(count) + 0.5) / count).to(self.device))

        def loss(part: slice) -> float:
            x, at, eps = (v[part].to(self.device) for v in (images, t, noise))
            with self.autocast():
                return self.ema(x.float() / 255, at, eps).item() * len(x)

        return sum(self.beside(count, loss)) / count

    def beside(self, count: int, work: Callable[[slice], Any]) -> list[Any]:
        """work(part) for parts of `count` images that fit into the memory that training leaves."""
        self.aside.size = min(self.aside.size, self.micro_batch)
        return list(self.aside.parts(count, work))

    def state_dict(self) -> dict[str, Any]:
        """Weights, averaged weights and optimiser, to go on from."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": {name: optimizer.state_dict() for name, (optimizer, _) in self.optimizers.items()},
            "scale": self.scale.item() if self.scales else FIRST_SCALE,  # for whoever goes on in fp16
            "good_in_a_row": self.good_in_a_row.item(),
            "skipped": self.skipped.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what state_dict gave; raises UserError if that was another optimiser's."""
        for name, (optimizer, _) in self.optimizers.items():
            for key, value in optimizer.state_dict().items():
                if value.shape != state["optimizer"][name][key].shape:
                    raise UserError("this run was trained with another optimizer: go on with that --optimizer")
                value.copy_(state["optimizer"][name][key])
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        if self.scales:
            self.scale.fill_(state["scale"])
        self.good_in_a_row.fill_(state.get("good_in_a_row", 0.0))  # files of before lack it
        self.skipped.fill_(state["skipped"])
