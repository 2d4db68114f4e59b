"""One optimizer step: gradient, update and EMA, with fallbacks when memory or a kernel fails."""

import copy
import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine import distributed
from engine.batch_threads import BatchThreads, use_batch_threads
from engine.cuda_graphs import CapturedFunction, GraphCaptureError
from engine.dataloader import Batch
from engine.devices import amp_dtype
from engine.errors import UserError, warn_fallback
from engine.gpu_memory import OomBatcher, is_out_of_memory
from engine.labels import NO_LABEL
from engine.optimizer import OLD_STATE_NAMES, Adam, Muon, flatten, padded_numel, use_muon, views
from engine.randomness import get_rng_state, set_rng_state, step_randomness

INVERSE_GOLDEN_RATIO = (5**0.5 - 1) / 2  # consecutive multiples, modulo 1, are spread evenly
INITIAL_LOSS_SCALE = 2.0**12  # in fp16, where small gradients would round to zero
LOSS_SCALE_GROWTH_STEPS = 2000  # finite steps before the loss scale doubles


class TrainableModel(Protocol):
    """What training uses of a model, in addition to what every nn.Module has.

    An optional static method `upgrade_architecture` converts the architecture of an older
    checkpoint to the current format. An optional method `set_fraction` is called before each step
    with how much of the run is done, 0 to 1. Optional attributes: with `class_names`, grids have a
    class in each row and `sample` gets `labels`; with `grid_steps`, a grid has the same seeds at
    each of these numbers of `steps`.
    """

    image_size: int  # pixels
    channels: int
    architecture: dict[str, Any]  # the arguments that build the model, stored in checkpoints
    guide: nn.Module | None  # an earlier copy of the network, for autoguidance; training drops it
    supports_cuda_graphs: bool  # whether a forward pass launches the same kernels every time

    def __call__(
        self, images: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Returns the mean loss of images (B, C, H, W) in [0, 1] at timesteps t (B,).

        noise: (B, C, H, W). labels: int64 (B,), if the data set has them; -1: no label, or one that
        LABEL_DROPOUT dropped. A model whose forward has no parameter `labels` gets none. On a CPU,
        two threads call it at the same time with half of a batch each, unless it draws random
        numbers.
        """

    def timesteps_from_uniform(self, u: Tensor) -> Tensor:
        """Maps u (B,), uniform in [0, 1], to timesteps (B,) as training distributes them."""

    def snapshot_guide(self) -> None:
        """Saves a copy of the network as `guide`, used by sampling from then on."""

    def sample(self, batch_size: int, *, seed: Sequence[int]) -> Tensor:
        """Generates images (B, C, H, W) in [0, 1], one for each seed."""


def learning_rate(peak: float, schedule: str, step: int, warmup: int, fraction: float) -> float:
    """Peak times a linear warm-up over `warmup` steps, and times a cosine if asked.

    fraction: how much of the run is done; the cosine falls from 1 to 0 over all of it.
    """
    lr = peak * min(1.0, (step + 1) / max(warmup, 1))
    return lr * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0))) if schedule == "cosine" else lr


def ema_decay(limit: float, step: int) -> float:
    """EMA decay after `step` updates, low at first to forget the initial weights."""
    return min(limit, (1 + step) / (10 + step))


def memory_advice(config: Any) -> str:
    """Returns how to train in less memory: smaller networks or images, and flags not yet used."""
    flags = ("use_amp", "gradient_checkpointing")
    unused = [flag for flag in flags if not getattr(config, flag.upper())]
    return ", or use --".join(["Lower --dim or --image_size", *unused])


def saved_buffers(model: nn.Module) -> list[Tensor]:
    """Returns the buffers that are saved, such as BatchNorm's running means.

    They are copied to the EMA, not averaged. Others, such as the fraction of a consistency loss,
    differ between the model and its EMA.
    """
    saved = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in saved]


class TrainStep:
    """Updates a model and its EMA copy from one batch.

    config: BATCH_SIZE (the most images in one pass), OPTIMIZER, WEIGHT_DECAY, GRAD_CLIP, EMA_DECAY,
    HORIZONTAL_FLIP, LABEL_DROPOUT, USE_AMP, COMPILE_MODEL, CUDA_GRAPH, SEED, and for advice on
    memory GRADIENT_CHECKPOINTING. rank, world_size: each rank gets its part of every batch, and
    does it in one or several passes, the micro-batches.
    """

    def __init__(self, model: TrainableModel, config: Any, rank: int = 0, world_size: int = 1):
        self.model = model
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.device = next(model.parameters()).device
        advice = memory_advice(config)
        self.batcher = OomBatcher(config.BATCH_SIZE, advice)
        # Its own size: evaluation has only the memory that training leaves.
        self.eval_batcher = OomBatcher(config.BATCH_SIZE, advice)

        # Parameters, EMA and gradient: one flat vector each. A guide would be trained with them.
        model.guide = None
        model.to(memory_format=torch.channels_last)  # custom networks, too
        self.ema = copy.deepcopy(model).eval()
        self.params, named = flatten(model)
        self.ema_params = flatten(self.ema)[0]
        self.ema.requires_grad_(False)
        if world_size > 1:
            distributed.broadcast(self.params)
            self.ema_params.copy_(self.params)
        self.grad = torch.zeros_like(self.params)
        self.param_names = [name for name, _ in named]
        self.param_views = [p for _, p in named]
        self.grad_views = views(self.grad, self.param_views)
        self.buffers = saved_buffers(model)
        self.ema_buffers = saved_buffers(self.ema)

        # Optimizers: flatten() puts the matrices first, which Muon updates; Adam updates the rest.
        matrices = [p for name, p in named if use_muon(name, p)]
        end = sum(padded_numel(p.numel()) for p in matrices)
        self.matrices = self.params[:end]  # decayed by either optimizer
        if config.OPTIMIZER == "adam":
            matrices = []
            end = 0
        is_cuda = self.device.type == "cuda"
        muon = Muon(self.params[:end], [p.shape for p in matrices], mix_sizes=is_cuda)
        adam = Adam(self.params[end:])
        self.optimizers = {"muon": (muon, slice(end)), "adam": (adam, slice(end, None))}

        # Precision, compilation, CUDA graphs (of the update, and of micro-batches by their size and
        # the local batch's).
        self.amp_dtype = amp_dtype(self.device)
        self.loss_function = torch.compile(model, dynamic=False) if config.COMPILE_MODEL else model
        self.use_labels = "labels" in inspect.signature(model.forward).parameters
        use_graphs = config.CUDA_GRAPH and is_cuda and model.supports_cuda_graphs
        self.graphs: dict[Hashable, CapturedFunction] | None = {} if use_graphs else None
        self.graph_pool = torch.cuda.graph_pool_handle() if use_graphs else None
        use_threads = use_batch_threads(model, self.device) and not config.COMPILE_MODEL
        self.threads = BatchThreads() if use_threads else None
        # Scalars stay on the device: reading one makes the host wait.
        zero = partial(torch.zeros, (), device=self.device)
        self.lr = zero()
        self.ema_weight = zero()
        self.skipped_updates = zero()
        self.consecutive_skips = zero()
        self.finite_streak = zero()
        self.use_loss_scaling = config.USE_AMP and self.amp_dtype == torch.float16
        scale = INITIAL_LOSS_SCALE if self.use_loss_scaling else 1.0
        self.loss_scale = torch.full((), scale, device=self.device)

    @property
    def micro_batch(self) -> int:
        """Images in one forward and backward pass; halved when memory runs out."""
        return self.batcher.size

    def autocast(self) -> torch.autocast:
        """Mixed precision as configured."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.config.USE_AMP)

    def set_fraction(self, fraction: float) -> None:
        """Passes how much of the run is done, 0 to 1, to a model that asks; the EMA stays at 1."""
        if hasattr(self.model, "set_fraction"):
            self.model.set_fraction(fraction)

    def label_args(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the labels as arguments: none if the model or the data has none."""
        return () if batch.labels is None or not self.use_labels else (batch.labels,)

    def __call__(self, batch: Batch, step: int, lr: float) -> tuple[Tensor, Tensor]:
        """Does one update; returns loss and gradient norm, scalars on the device.

        An update whose loss or gradient is not finite is skipped and counted. The next call
        overwrites the norm. Raises UserError if not even one image fits into the GPU's memory.
        """
        # Gradient; retried with a smaller micro-batch if memory runs out, or uncompiled.
        loss = None
        while loss is None:
            try:
                loss = self.accumulate_gradient(batch, step)
            except torch._dynamo.exc.TorchDynamoException as error:
                warn_fallback("torch.compile", error)
                self.loss_function = self.model
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if loss is None:  # in the except block, `error` would keep the failed tensors alive
                self.halve_micro_batch(len(batch.images))
        if self.world_size > 1:
            distributed.all_reduce(self.grad)
            distributed.all_reduce(loss)

        # Optimizer and EMA.
        self.lr.fill_(lr)
        self.ema_weight.fill_(1 - ema_decay(self.config.EMA_DECAY, step))
        try:
            return loss, self.run_captured("update", self.update, loss)
        except (RuntimeError, MemoryError) as error:  # the parameters may be half updated
            if not is_out_of_memory(error):
                raise
            raise UserError("out of memory in the update. Lower --dim", exit_code=1) from None

    def accumulate_gradient(self, batch: Batch, step: int) -> Tensor:
        """Writes this rank's part of the gradient to `grad`; returns its part of the loss."""
        # Randomness of the effective batch, of which this rank takes its rows.
        local_batch = len(batch.images)
        shape = torch.Size([local_batch * self.world_size, *batch.images.shape[1:]])
        randomness = step_randomness(self.config.SEED, step, shape, self.device)
        rows = slice(self.rank * local_batch, (self.rank + 1) * local_batch)
        t = self.model.timesteps_from_uniform(randomness.timestep_u)[rows]
        is_kept = randomness.label_u[rows] >= self.config.LABEL_DROPOUT
        labels = [torch.where(is_kept, x, NO_LABEL) for x in self.label_args(batch)]
        inputs = (batch.images, t, randomness.noise[rows], randomness.mirror[rows], *labels)

        # One micro-batch after the other; several are added up.
        if self.micro_batch < local_batch:
            self.grad.zero_()
        loss = torch.zeros((), device=self.device)
        add = partial(self.add_micro_batch, local_batch)
        for part in zip(*(x.split(self.micro_batch) for x in inputs), strict=True):
            loss += self.run_captured((len(part[0]), local_batch), add, *part)
        return loss

    def add_micro_batch(self, local_batch: int, *inputs: Tensor) -> Tensor:
        """Puts a micro-batch's gradient into `grad`; returns its part of the mean loss."""
        compute = partial(self.loss_and_gradients, local_batch)
        parts = self.threads.map(compute, inputs) if self.threads else [compute(*inputs)]
        (loss, grads), *others = parts
        # A whole batch overwrites `grad`; parts are added to it, which accumulate_gradient zeroed.
        write = torch._foreach_copy_ if len(inputs[0]) == local_batch else torch._foreach_add_
        write(self.grad_views, grads)
        for other_loss, other_grads in others:
            loss = loss + other_loss
            torch._foreach_add_(self.grad_views, other_grads)
        self.model.zero_grad()
        return loss

    def loss_and_gradients(
        self, local_batch: int, images: Tensor, t: Tensor, noise: Tensor, mirror: Tensor, *labels
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns some images' part of the mean loss, and its gradient by parameter."""
        x = images.float() / 255
        if self.config.HORIZONTAL_FLIP:
            x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
        batch_fraction = len(x) / (local_batch * self.world_size)
        with self.autocast():
            loss = self.loss_function(x, t, noise, *labels) * batch_fraction
        scaled_loss = loss * self.loss_scale
        params = self.param_views
        # Unused parameters get zeros, or the gradient of an earlier step would stay.
        if self.threads:  # they must not add to the same p.grad
            return loss.detach(), torch.autograd.grad(
                scaled_loss, params, allow_unused=True, materialize_grads=True
            )
        self.model.zero_grad()  # gradients left by a failed capture
        scaled_loss.backward()
        return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in params]

    @torch.no_grad()
    def update(self, loss: Tensor) -> Tensor:
        """Updates parameters and EMA if `grad` and loss are finite; returns grad's norm."""
        norm = torch.linalg.vector_norm(self.grad) / self.loss_scale
        is_finite = (torch.isfinite(loss) & torch.isfinite(norm)).float()
        clip = self.config.GRAD_CLIP
        grad_scale = ((clip / (norm + 1e-6)).clamp(max=1) if clip else 1) / self.loss_scale
        self.skipped_updates += 1 - is_finite
        self.consecutive_skips.add_(1).mul_(1 - is_finite)
        self.finite_streak.add_(1).mul_(is_finite)
        if self.use_loss_scaling:
            is_growing = (self.finite_streak % LOSS_SCALE_GROWTH_STEPS == 0) & (is_finite > 0)
            kept_or_halved = torch.where(is_finite > 0, 1.0, 0.5)
            self.loss_scale.mul_(torch.where(is_growing, 2.0, kept_or_halved))
        # Muon's updates have a fixed RMS: growing weights would be turned less and less.
        if self.config.WEIGHT_DECAY:
            self.matrices.mul_(1 - self.config.WEIGHT_DECAY * self.lr * is_finite)
        for optimizer, part in self.optimizers.values():
            optimizer.update(self.params[part], self.grad[part], self.lr, grad_scale, is_finite)
        self.ema_params.lerp_(self.params, self.ema_weight * is_finite)
        if self.buffers:
            torch._foreach_copy_(self.ema_buffers, self.buffers)
        return norm

    def run_captured(self, key: Hashable, fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Returns fn(*inputs), run as a CUDA graph if configured.

        A key stands for one fn and its Python numbers, which are fixed at capture: what changes
        between calls must be a tensor that is updated in place.
        """
        if self.graphs is not None:
            if key not in self.graphs:
                self.graphs[key] = CapturedFunction(fn, self.graph_pool)
            try:
                return self.graphs[key](*inputs)
            except GraphCaptureError as error:  # nothing has run yet
                warn_fallback("CUDA graph capture", error)
                self.graphs = None
        return fn(*inputs)

    def halve_micro_batch(self, local_batch: int) -> None:
        """Frees what a failed attempt at a local batch left and halves the micro-batch.

        Raises UserError with several ranks, which would all have to halve theirs.
        """
        count = min(self.micro_batch, local_batch)
        if self.world_size > 1:
            effective = local_batch * self.world_size
            flags = f"--batch_size {count // 2} --gradient_accumulation {2 * effective // count}"
            advice = f"Use {flags}, or lower --dim" if count % 2 == 0 else "Lower --dim"
            raise UserError(f"out of memory. {advice}", exit_code=1)
        self.model.zero_grad()
        if self.graphs:
            self.graphs.clear()
            self.graph_pool = torch.cuda.graph_pool_handle()
        self.batcher.halve(count)

    @torch.no_grad()
    def validate(self, batch: Batch) -> float:
        """Returns the mean loss of the EMA weights on a batch of any size and device.

        The noise is always the same, and timesteps are spread evenly, also over the images of each
        class where the images are sorted: so results are comparable.
        """
        count = len(batch.images)
        noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
        u = torch.tensor([(i + 0.5) * INVERSE_GOLDEN_RATIO % 1 for i in range(count)])
        t = self.model.timesteps_from_uniform(u.to(self.device))

        def summed_loss(part: slice) -> float:
            some = batch.take(part).to(self.device)
            inputs = (some.images.float() / 255, t[part], noise[part].to(self.device))
            with self.autocast():
                return self.ema(*inputs, *self.label_args(some)).item() * len(some.images)

        return sum(self.map_eval_batches(count, summed_loss)) / count

    def map_eval_batches(self, count: int, fn: Callable[[slice], Any]) -> list[Any]:
        """Returns fn(part) for parts of `count` images that fit next to training."""
        self.eval_batcher.size = min(self.eval_batcher.size, self.micro_batch)
        return list(self.eval_batcher.map(count, fn))

    def state_dict(self) -> dict[str, Any]:
        """Returns weights, EMA weights and optimizer state, to resume from."""
        # The keys are the file format: they stay when attributes are renamed.
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": {name: o.state_dict() for name, (o, _) in self.optimizers.items()},
            # Also where there is none now: the run may resume in fp16.
            "scale": self.loss_scale.item() if self.use_loss_scaling else INITIAL_LOSS_SCALE,
            "good_in_a_row": self.finite_streak.item(),
            "skipped": self.skipped_updates.item(),
            "rng": get_rng_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what state_dict returned; UserError if another optimizer wrote it.

        The state may lack the class embedding: an unconditional run continues as a conditional one.
        The random state is rank 0's; the other ranks leave theirs alone.
        """
        # Optimizer states. An unconditional run's lacks the class embedding, which flatten() puts
        # last, among Adam's parameters: zeros take its place.
        named = zip(self.param_names, self.param_views, strict=True)
        new = [p for name, p in named if "class_embedding" in name and name not in state["model"]]
        added = sum(padded_numel(p.numel()) for p in new)
        for name, (optimizer, _) in self.optimizers.items():
            saved = state["optimizer"][name]
            for key, value in optimizer.state_dict().items():
                saved_value = saved[key if key in saved else OLD_STATE_NAMES[key]]
                if name == "adam" and value.ndim:  # not the number of updates
                    saved_value = nn.functional.pad(saved_value, (0, added))
                if value.shape != saved_value.shape:
                    raise UserError("the run has another optimizer. Resume with its --optimizer")
                value.copy_(saved_value)

        # Weights, loss scale, counters, random state.
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        if self.use_loss_scaling:
            self.loss_scale.fill_(state["scale"])
        self.finite_streak.fill_(state.get("good_in_a_row", 0.0))  # missing in earlier files
        self.skipped_updates.fill_(state["skipped"])
        if self.rank == 0:
            set_rng_state(state["rng"], self.device)
