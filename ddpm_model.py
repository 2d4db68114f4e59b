"""DDPMModel: the library's Unet and GaussianDiffusion behind one small interface.

model = DDPMModel().load_model("checkpoints/ddpm_final.pt")
images = model.sample(batch_size=16, seed=0)         # (16, 3, 32, 32), floats in [0, 1]
"""

import contextlib
import copy
import inspect
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torch import Tensor, nn

from engine import checkpoints
from engine.errors import UserError
from engine.graph import Replays
from engine.samplers import (
    SAMPLER,
    SAMPLERS,
    SPACING,
    SPACINGS,
    SeededNoise,
    ddim_encode,
    intervals,
    noise_level,
    slerp,
)
from engine.unet import FastUnet

OBJECTIVES = ("pred_v", "pred_noise", "pred_x0")
BETA_SCHEDULES = ("cosine", "linear", "sigmoid")
EDM_MEAN, EDM_DEVIATION, EDM_DATA = -1.2, 1.2, 0.5  # of log sigma in training; standard deviation of the images
GUIDED = (0.2, 5.0)  # sigma between which the guide is asked: docs/recipe.md has what other limits gave


class DDPMModel(nn.Module):
    """A Unet and the diffusion process it was trained for.

    Images at this boundary are float tensors (B, C, H, W) in [0, 1]. Any further keyword goes to the library's
    Unet (`dropout`, `self_condition`, `attn_heads`, ...). schedule_size: image size that the beta schedule and edm's
    noise levels are taken to be made for; for another the logSNR is shifted (see shift_log_snr), 0: never. guidance:
    how far samples are led away from what the guide, if there is one, would draw (see keep_guide); 1 is not at all.
    `provenance`: `config` and `progress` of the run that made the weights, each empty unless a loaded file says them.
    Raises UserError for sizes that do not go together.
    """

    cuda_graph = True  # samplers on a GPU launch the network as one CUDA graph; set to False where that is not wanted

    def __init__(
        self,
        image_size: int = 32,
        dim: int = 64,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        timesteps: int = 1000,
        sampling_timesteps: int = 14,
        objective: str = "pred_v",
        beta_schedule: str = "cosine",
        loss_weighting: str = "min_snr",
        min_snr_gamma: float = 5.0,
        schedule_size: int = 0,
        guidance: float = 2.0,
        **unet_kwargs: Any,
    ):
        super().__init__()
        self.replays = Replays()
        self.provenance: dict[str, dict[str, Any]] = {"config": {}, "progress": {}}
        if image_size % 2 ** (len(dim_mults) - 1):
            raise UserError(f"image_size {image_size} is not a multiple of {2 ** (len(dim_mults) - 1)}")
        if not 1 <= sampling_timesteps <= timesteps:
            raise UserError(f"sampling_timesteps is {sampling_timesteps}, but must be between 1 and {timesteps}")
        self.architecture: dict[str, Any] = {
            "image_size": image_size,
            "dim": dim,
            "dim_mults": list(dim_mults),
            "channels": channels,
            "timesteps": timesteps,
            "sampling_timesteps": sampling_timesteps,
            "objective": objective,
            "beta_schedule": beta_schedule,
            "loss_weighting": loss_weighting,
            "min_snr_gamma": min_snr_gamma,
            "schedule_size": schedule_size,
            "guidance": guidance,
            **unet_kwargs,
        }
        self._build()

    def _build(self) -> None:
        """Makes the network and the process that `architecture` describes, with new weights."""
        a = dict(self.architecture)
        a.setdefault("loss_weighting", "min_snr")  # files of before there was another
        own = {name: a.pop(name) for name in inspect.signature(DDPMModel).parameters if name in a}
        # lists, as JSON has them, where the library wants tuples
        rest = {name: tuple(value) if isinstance(value, list) else value for name, value in a.items()}
        self.image_size, self.channels = own["image_size"], own["channels"]
        self.sampling_timesteps, self.num_timesteps = own["sampling_timesteps"], own["timesteps"]
        self.guidance, self.guide = own.get("guidance", 1.0), None
        unet = FastUnet(own["dim"], dim_mults=tuple(own["dim_mults"]), channels=own["channels"], **rest)
        self.diffusion = GaussianDiffusion(
            unet,
            image_size=own["image_size"],
            timesteps=own["timesteps"],
            sampling_timesteps=own["sampling_timesteps"],
            objective=own["objective"],
            beta_schedule=own["beta_schedule"],
            min_snr_loss_weight=own["min_snr_gamma"] > 0,
            min_snr_gamma=own["min_snr_gamma"],
        )
        # files of earlier versions have none
        shift = 2 * math.log(own["schedule_size"] / self.image_size) if own.get("schedule_size") else 0.0
        if shift:
            shift_log_snr(self.diffusion, shift, own["min_snr_gamma"])
        self.guided = tuple(sigma * math.exp(-shift / 2) for sigma in GUIDED)
        # cumulative distribution of the timesteps that training draws
        drawn = torch.arange(1, own["timesteps"] + 1).double() / own["timesteps"]
        if own["loss_weighting"] == "edm":
            density, weight = edm_weighting(self.diffusion, EDM_MEAN - shift / 2)
            self.diffusion.loss_weight.copy_(weight)
            drawn = density.cumsum(0)
        self.register_buffer("drawn", drawn.float(), persistent=False)

    @classmethod
    def from_config(cls, config: Any) -> "DDPMModel":
        """The model of a configuration, with weights that are a function of its SEED."""
        torch.manual_seed(config.SEED)
        model = cls(
            image_size=config.IMAGE_SIZE,
            dim=config.DIM,
            dim_mults=config.DIM_MULTS,
            timesteps=config.TIMESTEPS,
            sampling_timesteps=config.SAMPLING_TIMESTEPS,
            objective=config.OBJECTIVE,
            beta_schedule=config.BETA_SCHEDULE,
            loss_weighting=config.LOSS_WEIGHTING,
            min_snr_gamma=config.MIN_SNR_GAMMA,
            schedule_size=config.SCHEDULE_SIZE,
            guidance=config.GUIDANCE,
            dropout=config.DROPOUT,
            full_attn=full_attention(config),
            attn_heads=per_level(config.ATTENTION_HEADS, config.DIM_MULTS),
            attn_dim_head=per_level(config.ATTENTION_DIM, config.DIM_MULTS),
        )
        model.unet.checkpointing = config.GRADIENT_CHECKPOINTING
        return model

    @classmethod
    def from_pretrained(cls, name: str) -> "DDPMModel":
        """A model that comes with the project (weights/), on the CPU; raises UserError if none has that name."""
        path = checkpoints.SHIPPED / f"{name}.safetensors"
        if not path.is_file():
            known = sorted(file.stem for file in checkpoints.SHIPPED.glob("*.safetensors"))
            raise UserError(f"no model {name} comes with the project; there are {', '.join(known)}")
        return cls().load_model(path).eval()

    @property
    def unet(self) -> Unet:
        """The network alone, the library's Unet computed faster: (B, C, H, W) and timesteps (B,) to (B, C, H, W)."""
        return self.diffusion.model

    def keep_guide(self) -> None:
        """Takes the network as it is now for the guide of what is drawn later.

        Autoguidance, Karras et al. (arXiv:2406.02507): a worse version of a network errs in the same direction, only
        further. Where the two disagree a sample is led away from the worse one.
        """
        self.guide = copy.deepcopy(self.unet)

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """As any module's; with the guide that the state has, or without one."""
        self.guide = None
        if any(name.startswith("guide.") for name in state_dict):
            self.keep_guide()
        return super().load_state_dict(state_dict, *arguments, **options)

    @property
    def capturable(self) -> bool:
        """Whether forward does the same on the device every time, so that a CUDA graph can stand in for it."""
        return not self.unet.self_condition

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.diffusion.betas.device

    def forward(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The training loss of images (B, C, H, W) in [0, 1] at timesteps t (B,), noised with `noise`: a scalar.

        The squared error of what the objective predicts, weighted by timestep. loss_weighting "min_snr": Hang et al.
        (arXiv:2303.09556), unless min_snr_gamma is 0; "edm": see edm_weighting.
        """
        return (self.diffusion.loss_weight[t] * self.squared_error(images, t, noise)).mean()

    def timesteps_at(self, shares: Tensor) -> Tensor:
        """The timesteps (B,) below which these shares (B,), in [0, 1), of the timesteps drawn in training lie."""
        return torch.searchsorted(self.drawn, shares, right=True).clamp(max=self.num_timesteps - 1)

    def squared_error(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The mean squared error of what the objective predicts, unweighted, of each image: (B,). As for forward."""
        process = self.diffusion
        x_0 = images * 2 - 1
        x_t = process.q_sample(x_0, t, noise)
        previous = None
        if self.unet.self_condition and random.random() < 0.5:  # Chen et al. (arXiv:2208.04202)
            with torch.no_grad():
                previous = process.model_predictions(x_t, t).pred_x_start
        prediction = self.unet(x_t, t, previous).float()
        if process.objective == "pred_noise":
            target = noise
        elif process.objective == "pred_x0":
            target = x_0
        else:
            target = process.predict_v(x_0, t, noise)
        return (prediction - target).square().mean(dim=(1, 2, 3))

    def _apply(self, *arguments: Any, **options: Any) -> "DDPMModel":
        """What .to, .cuda, .half and the like do: the weights move, and no graph may read where they were."""
        self.replays.clear()
        return super()._apply(*arguments, **options)

    def evaluate(self, network: nn.Module, x: Tensor, t: Tensor, previous: Tensor | None = None) -> Tensor:
        """A network at x (B, C, H, W) and timesteps t (B,), launched as one CUDA graph where that is possible."""
        if not (self.cuda_graph and self.capturable and x.is_cuda) or torch.is_grad_enabled():
            return network(x, t, previous)
        try:
            return self.replays(network, x, t)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            print(f"CUDA graph capture FAILED, sampling goes on without it: {str(problem).strip().splitlines()[0]}")
            self.cuda_graph = False
        return network(x, t)

    def denoiser(self, clip: bool = True, guidance: float | None = None) -> "ModelDenoiser":
        """This model as the samplers see it; a new one for every sample, since self-conditioning remembers.

        guidance: instead of the model's own.
        """
        weight = self.guidance if guidance is None else guidance
        guide = partial(self.evaluate, self.guide) if self.guide is not None and weight != 1 else None
        return ModelDenoiser(self.diffusion, partial(self.evaluate, self.unet), clip, guide, weight, self.guided)

    def evaluations(self, sampler: Callable, timesteps: Sequence[int], guidance: float | None = None) -> int:
        """Network evaluations (NFE) of an image drawn along these timesteps, the guide's included."""
        counter = Counter(self.denoiser(guidance=guidance))
        for _ in sampler(counter, torch.zeros(1, 1, 1, 1), timesteps, torch.zeros_like):
            pass
        return counter.count

    def plan(
        self, sampler: str | Callable | None = None, steps: int | None = None, spacing: str = SPACING
    ) -> tuple[Callable, list[int]]:
        """The sampler as a function, and the timesteps it goes through, from the highest to -1, the clean image.

        sampler: a name or a function like those of engine.samplers. steps: evaluations of the network; the guide's come
        on top (see evaluations). Raises UserError for names that do not exist or a number of steps that the model does
        not have.
        """
        steps = self.sampling_timesteps if steps is None else steps
        if not 1 <= steps <= self.num_timesteps:
            raise UserError(f"steps is {steps}, but this model has between 1 and {self.num_timesteps}")
        sampler = SAMPLER if sampler is None else sampler
        if isinstance(sampler, str):
            if sampler not in SAMPLERS:
                raise UserError(f"there is no sampler {sampler}; there are {', '.join(SAMPLERS)}")
            sampler = SAMPLERS[sampler]
        if spacing not in SPACINGS:
            raise UserError(f"there is no spacing {spacing}; there are {', '.join(SPACINGS)}")
        return sampler, SPACINGS[spacing](self.denoiser().alpha_bar, intervals(sampler, steps))

    def noise(self, seeds: Sequence[int]) -> tuple[Tensor, SeededNoise]:
        """Where the images of these seeds start, x_T (B, C, H, W), and the source of their further noise."""
        randn = SeededNoise(seeds)
        return randn.draw((self.channels, self.image_size, self.image_size), self.device), randn

    @torch.no_grad()
    def trajectory(
        self,
        x: Tensor,
        timesteps: Sequence[int],
        sampler: Callable,
        randn: Callable,
        clip: bool = True,
        guidance: float | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Goes from x at timesteps[0] to the clean image: yields t, x_t and the x_0 predicted from it, in [-1, 1].

        The last is (-1, sample, sample). clip: limit each predicted x_0 to [-1, 1]. guidance: instead of the model's
        own. options go to the sampler.
        """
        with evaluating(self):
            steps = sampler(self.denoiser(clip, guidance), x, timesteps, randn, **options)
            for t, (following, x_0) in zip(timesteps, steps, strict=False):
                yield t, x, x_0
                x = following
            yield -1, x, x

    def sample(
        self,
        batch_size: int = 16,
        return_all_timesteps: bool = False,
        sampler: str | Callable | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] | None = None,
        spacing: str = SPACING,
        **options: Any,
    ) -> Tensor:
        """Draws images, (batch_size, C, H, W) in [0, 1].

        sampler, steps, spacing: as in `plan`. seed: image i is drawn from seed + i, or from the i-th of the seeds
        given, and is the same whatever the batch; without one it is new each time. return_all_timesteps: also x at
        every step, (batch_size, steps + 1, C, H, W), noise first (heun: half as many). options: `guidance` and the
        sampler's (`eta`).
        """
        function, timesteps = self.plan(sampler, steps, spacing)
        x, randn = self.noise(seeds_of(seed, batch_size))
        frames: list[Tensor] = []
        for _, x, _ in self.trajectory(x, timesteps, function, randn, **options):  # noqa: B020 - x goes on
            frames = [*frames, x] if return_all_timesteps else [x]
        return to_unit(torch.stack(frames, dim=1) if return_all_timesteps else frames[0])

    @torch.no_grad()
    def interpolate(
        self,
        image1: Tensor,
        image2: Tensor,
        num_steps: int = 10,
        sampler: str | Callable = "ddim",
        steps: int = 100,
        **options: Any,
    ) -> Tensor:
        """Images between two given ones, each (C, H, W) or (1, C, H, W) in [0, 1]: (num_steps, C, H, W).

        Both are encoded to x_T by DDIM run backwards, `steps` evaluations each; what lies on the arc between the
        codes is decoded with the sampler. Both go without the guide, which would lead the ends away from the given
        images. Raises UserError for images of another size or fewer than 2 images.
        """
        if num_steps < 2:
            raise UserError(f"num_steps is {num_steps}, but an interpolation has at least its 2 ends")
        pair = torch.stack([self.given(image1), self.given(image2)])
        function, timesteps = self.plan(sampler, min(steps, self.num_timesteps), "uniform")
        with evaluating(self):
            code1, code2 = ddim_encode(self.denoiser(clip=False, guidance=1), pair * 2 - 1, timesteps)
        codes = slerp(code1, code2, torch.linspace(0, 1, num_steps, device=self.device))
        randn = SeededNoise(range(num_steps))
        *_, (_, images, _) = self.trajectory(codes, timesteps, function, randn, clip=False, guidance=1, **options)
        return to_unit(images)

    @torch.no_grad()
    def vary(
        self,
        image: Tensor,
        strength: float = 0.5,
        batch_size: int = 4,
        sampler: str | Callable | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] | None = None,
        spacing: str = SPACING,
        **options: Any,
    ) -> Tensor:
        """Variations of an image (C, H, W) in [0, 1]: (batch_size, C, H, W). SDEdit, Meng et al. (arXiv:2108.01073).

        The image is noised up to the share `strength` of the process, in (0, 1], and drawn from there: the more, the
        freer. steps are those of the whole process, of which the part below `strength` is gone through.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength is {strength}, but must be above 0 and at most 1")
        function, timesteps = self.plan(sampler, steps, spacing)
        wanted = [t for t in timesteps if t < max(1, round(strength * self.num_timesteps))]
        timesteps = wanted if len(wanted) > 1 else timesteps[-2:]
        noise, randn = self.noise(seeds_of(seed, batch_size))
        x = add_noise(self.given(image) * 2 - 1, noise, self.denoiser().alpha_bar[timesteps[0]])
        *_, (_, images, _) = self.trajectory(x, timesteps, function, randn, **options)
        return to_unit(images)

    @torch.no_grad()
    def inpaint(
        self,
        image: Tensor,
        mask: Tensor,
        batch_size: int = 1,
        sampler: str | Callable | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] | None = None,
        spacing: str = SPACING,
        resamples: int = 5,
        **options: Any,
    ) -> Tensor:
        """Paints what the mask marks, (batch_size, C, H, W) in [0, 1]. RePaint, algorithm 1 of arXiv:2201.09865.

        image: (C, H, W) in [0, 1]. mask: (H, W), not 0 where something new is painted; the rest comes back as it was.
        Each step is done `resamples` times, with noise added back in between, so that both parts come to agree.
        """
        if mask.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(f"the mask is {tuple(mask.shape[-2:])}, but this model draws {self.image_size} px")
        keep = (mask.reshape(mask.shape[-2:]) == 0).to(self.device)
        known = self.given(image) * 2 - 1
        function, timesteps = self.plan(sampler, steps, spacing)
        x, randn = self.noise(seeds_of(seed, batch_size))
        denoiser = self.denoiser()
        for t, s in pairwise(timesteps):
            a_t, a_s = denoiser.alpha_bar[t], denoiser.alpha_bar[s] if s >= 0 else 1.0
            for again in range(resamples if s >= 0 else 1):
                if again:
                    x = add_noise(x, randn(x), a_t / a_s)
                *_, (_, unknown, _) = self.trajectory(x, [t, s], function, randn, **options)
                x = torch.where(keep, add_noise(known, randn(x), a_s), unknown)
        return to_unit(x)

    def given(self, image: Tensor) -> Tensor:
        """An image as this model takes it: (C, H, W) in [0, 1] on its device; raises UserError for another shape."""
        shape = (self.channels, self.image_size, self.image_size)
        if tuple(image.shape[-3:]) != shape or image.numel() != math.prod(shape):
            raise UserError(f"the image is {tuple(image.shape)}, but this model draws {shape}")
        return image.reshape(shape).to(self.device)

    def save_model(self, path: str | Path, half: bool = False) -> None:
        """Writes weights and architecture: `.safetensors`, or a `.pt` that load_model reads.

        half: the weights of the network and of its guide in fp16, at half the size.
        """
        path = Path(path)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        if half:
            networks = ("diffusion.model.", "guide.")
            state = {name: value.half() if name.startswith(networks) else value for name, value in state.items()}
        if path.suffix == ".safetensors":
            metadata = {"format": "pt", "architecture": json.dumps(self.architecture)}
            checkpoints.write_atomically(path, lambda file: file.write(safetensors.torch.save(state, metadata)))
        else:
            checkpoints.save(path, {"architecture": self.architecture, "model": state})

    def load_model(self, path: str | Path) -> "DDPMModel":
        """Takes architecture, weights and provenance from a file and returns itself, on the device it was on.

        Reads our checkpoints (their EMA weights), what save_model writes, and checkpoints of the library's own
        Trainer, which do not say the image size: for those it stays what this model was made with. Raises
        UserError if the file is missing, damaged, not a model or needs another class of model.
        """
        path, device, file = Path(path), self.device, {}
        if path.suffix == ".safetensors":
            architecture, state = read_safetensors(path)
        else:
            file = checkpoints.load(path)
            if "architecture" in file:
                architecture, state = file["architecture"], file.get("ema") or file["model"]
            else:
                architecture, state = from_library(file, self.image_size, path)
        try:
            self.architecture = dict(architecture)
            self._build()
            self.load_state_dict(state)
        except (RuntimeError, TypeError, KeyError) as problem:
            reason = str(problem).splitlines()[0].rstrip(":")
            raise UserError(f"{path} does not fit {type(self).__name__}: {reason}") from problem
        self.provenance = {name: file.get(name, {}) for name in self.provenance}
        return self.to(device)


class ModelDenoiser:
    """Predicts x_0 with a process's network, converting from whatever it predicts. See engine.samplers.Denoiser.

    Where sigma is within `limits` and there is a guide, what it predicts is moved away from: w x_0 + (1 - w) x_0 of the
    guide with w = guidance, equation 4 of arXiv:2406.02507; limits are those of Kynkaanniemi et al. (arXiv:2404.07724).
    Where alpha_bar is 0 a predicted noise says nothing of x_0: a `pred_noise` network is then asked as if x were at
    the last timestep that has some signal, from which pure noise hardly differs.
    """

    def __init__(
        self,
        process: GaussianDiffusion,
        network: Callable[..., Tensor],
        clip: bool,
        guide: Callable[..., Tensor] | None = None,
        guidance: float = 1.0,
        limits: tuple[float, float] = (0.0, math.inf),
    ):
        self.process, self.network, self.clip = process, network, clip
        self.guide, self.guidance, self.limits = guide, guidance, limits
        self.alpha_bar: list[float] = process.alphas_cumprod.double().tolist()
        self.last = max(t for t, a in enumerate(self.alpha_bar) if a > 0 or process.objective != "pred_noise")
        self.previous: Tensor | None = None

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """x_0 (B, C, H, W) from x_t, limited to [-1, 1] if this denoiser clips; t in [0, T)."""
        t = min(t, self.last)
        x_0 = self.predict(self.network, x, t)
        if self.asks_guide(t):
            worse = self.predict(self.guide, x, t)
            x_0 = worse + self.guidance * (x_0 - worse)
        if self.clip:
            x_0 = x_0.clamp(-1, 1)
        if self.process.self_condition:
            self.previous = x_0
        return x_0

    def asks_guide(self, t: int) -> bool:
        """Whether the guide has a say at timestep t."""
        return self.guide is not None and self.limits[0] <= noise_level(self.alpha_bar[t]) <= self.limits[1]

    def predict(self, network: Callable[..., Tensor], x: Tensor, t: int) -> Tensor:
        """x_0 as one network sees it."""
        signal, noise = math.sqrt(self.alpha_bar[t]), math.sqrt(1 - self.alpha_bar[t])
        times = torch.full((len(x),), t, device=x.device, dtype=torch.long)
        predicted = network(x, times, self.previous).to(x.dtype)
        if self.process.objective == "pred_noise":
            return (x - noise * predicted) / signal
        if self.process.objective == "pred_v":
            return signal * x - noise * predicted
        return predicted


class Counter:
    """A denoiser that counts what another would have evaluated, and evaluates nothing."""

    def __init__(self, denoiser: ModelDenoiser):
        self.denoiser, self.alpha_bar, self.count = denoiser, denoiser.alpha_bar, 0

    def __call__(self, x: Tensor, t: int) -> Tensor:
        self.count += 1 + self.denoiser.asks_guide(min(t, self.denoiser.last))
        return x


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode for a block and back into what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed for each of `count` images: consecutive from an int, as given, or new ones."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    seeds = list(range(seed, seed + count)) if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise UserError(f"there are {len(seeds)} seeds for {count} images")
    return seeds


def shift_log_snr(process: GaussianDiffusion, shift: float, min_snr_gamma: float) -> None:
    """Adds `shift` to the log of the SNR at every timestep; what else the library derives from its betas follows.

    Neighbouring pixels of a larger image agree more, so that the same noise hides less of it. A schedule made for
    images of size s is as hard at size n if shifted by 2 log(s / n): Hoogeboom et al. (arXiv:2301.11093).
    """
    alpha_bar = (1 - process.betas.double()).cumprod(0)
    alpha_bar = torch.sigmoid(alpha_bar.logit() + shift)
    before = F.pad(alpha_bar[:-1], (1, 0), value=1.0)
    alpha = alpha_bar / before
    variance = (1 - alpha) * (1 - before) / (1 - alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    limited = snr.clamp(max=min_snr_gamma) if min_snr_gamma > 0 else snr
    weight = {"pred_noise": limited / snr, "pred_x0": limited, "pred_v": limited / (snr + 1)}
    derived = {
        "betas": 1 - alpha,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": alpha_bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": snr.rsqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": (1 - alpha) * before.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - before) * alpha.sqrt() / (1 - alpha_bar),
        "loss_weight": weight[process.objective],
    }
    for name, values in derived.items():
        getattr(process, name).copy_(values)


def add_noise(x: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """x further along the process by the given product of 1 - beta."""
    return math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * noise


def edm_weighting(process: GaussianDiffusion, mean: float = EDM_MEAN) -> tuple[Tensor, Tensor]:
    """How often each timestep is trained on, and the loss weight there, both (T,), of mean 1 over what is drawn.

    Karras et al. (arXiv:2206.00364), table 1, for images in [-1, 1]: log sigma is drawn from a normal distribution
    around `mean`, and the error of x_0 weighs (sigma^2 + s^2) / (sigma s)^2. Here it is that of what the objective
    predicts.
    """
    alpha_bar = process.alphas_cumprod.double()
    variance = (1 - alpha_bar) / alpha_bar.clamp(min=1e-12)  # sigma^2
    log_sigma = variance.log() / 2
    density = torch.exp(-((log_sigma - mean) ** 2) / (2 * EDM_DEVIATION**2)) * torch.gradient(log_sigma)[0].abs()
    density = density / density.sum()
    weight = (variance + EDM_DATA**2) / (variance * EDM_DATA**2)
    if process.objective == "pred_v":
        weight = weight * variance / (1 + variance)
    elif process.objective == "pred_noise":
        weight = weight * variance
    return density, weight / (weight * density).sum()


def per_level(values: Sequence[int], levels: Sequence[int]) -> list[int]:
    """One value for each level, from as many or from a single one."""
    return list(values) if len(values) > 1 else list(values) * len(levels)


def full_attention(config: Any) -> list[bool]:
    """For each level of a configuration's network, whether its attention is full; otherwise it is linear."""
    sizes = [config.IMAGE_SIZE // 2**level for level in range(len(config.DIM_MULTS))]
    return [size <= max(config.FULL_ATTENTION_SIZE, sizes[-1]) for size in sizes]


def to_unit(x: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]; what lies outside is clipped."""
    return ((x + 1) / 2).clamp(0, 1)


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and weights of a file that save_model wrote."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train one with `python train_optimized.py`")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return json.loads(metadata["architecture"]), state
    except (safetensors.SafetensorError, KeyError, ValueError) as problem:
        raise UserError(f"{path} is damaged, or not a .safetensors file of this project") from problem


def from_library(file: dict[str, Any], image_size: int, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and weights (EMA, where there are any) of a checkpoint of the library's Trainer.

    Width, levels, attention and channels are read off the shapes of the weights, the schedule off the betas and
    the objective off the loss weights that the library stores beside them.
    """
    source, prefix = (file["ema"], "ema_model.") if file.get("ema") else (file.get("model"), "")
    if not isinstance(source, dict) or f"{prefix}model.init_conv.weight" not in source:
        raise UserError(f"{path} is neither a checkpoint of this project nor one of the library's Trainer")
    state = {name[len(prefix) :]: value for name, value in source.items() if name.startswith(prefix)}
    unet = {name[len("model.") :]: value for name, value in state.items() if name.startswith("model.")}
    dim = unet["time_mlp.1.weight"].shape[1]
    levels = 1 + max(int(name.split(".")[1]) for name in unet if name.startswith("downs."))
    widths = [unet[f"downs.{i}.3.{'1.' if i < levels - 1 else ''}weight"].shape[0] for i in range(levels)]
    channels = unet["final_conv.weight"].shape[0]
    full = [f"downs.{i}.2.to_out.weight" in unet for i in range(levels)]  # linear attention has a norm there
    memory = [unet[f"downs.{i}.2.mem_kv"].shape for i in range(levels)]  # (2, heads, ...)
    alpha_bar, weight = state["alphas_cumprod"].double(), state["loss_weight"].double()
    snr = alpha_bar / (1 - alpha_bar)
    share = {"pred_noise": 1 / snr, "pred_x0": torch.ones_like(snr), "pred_v": 1 / (snr + 1)}
    objective, gamma = next(
        ((name, limit) for name in OBJECTIVES for limit in (0.0, 5.0) if torch.allclose(
            weight, share[name] * (snr.clamp(max=limit) if limit else snr), rtol=1e-2, atol=1e-6
        )),
        (None, 0.0),
    )  # fmt: skip
    timesteps = len(alpha_bar)
    schedule = next(
        (name for name in BETA_SCHEDULES if torch.allclose(betas_of(name, timesteps), state["betas"])), None
    )
    if not objective or not schedule:
        raise UserError(f"{path} uses an objective or a beta schedule that this project does not know")
    architecture = {
        "image_size": image_size,
        "dim": dim,
        "dim_mults": [width // dim for width in widths],
        "channels": channels,
        "timesteps": timesteps,
        "sampling_timesteps": min(20, timesteps),
        "objective": objective,
        "beta_schedule": schedule,
        "min_snr_gamma": gamma,
        "init_dim": unet["init_conv.weight"].shape[0],
        "self_condition": unet["init_conv.weight"].shape[1] == 2 * channels,
        "full_attn": full,
        "attn_heads": [shape[1] for shape in memory],
        "attn_dim_head": [shape[3] if is_full else shape[2] for shape, is_full in zip(memory, full, strict=True)],
    }
    return architecture, {f"diffusion.{name}": value for name, value in state.items()}


def betas_of(schedule: str, timesteps: int) -> Tensor:
    """The library's betas of a schedule, float32 (T,)."""
    smallest = Unet(8, dim_mults=(1,))
    return GaussianDiffusion(smallest, image_size=8, timesteps=timesteps, beta_schedule=schedule).betas
