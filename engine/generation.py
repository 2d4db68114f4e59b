"""Image generation: what a model with a denoiser can do with the samplers."""

import contextlib
import math
import operator
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from torch import Tensor, nn

from engine import samplers
from engine.denoiser import GUIDANCE_OPTIONS, ModelDenoiser, NFECounter
from engine.errors import UserError
from engine.labels import NO_LABEL, UNCONDITIONAL_ERROR, labels_in_proportion
from engine.noise_schedule import diffuse, shift_sigma
from engine.samplers import CONSISTENCY_LEVELS, SAMPLERS, SPACINGS, SeededNoise

SamplerChoice = str | Callable | None  # a name, a sampler function, or the default
Seeds = int | Sequence[int] | None  # the first of consecutive seeds, one per image, or random
Labels = int | Sequence[int] | Tensor | None  # of all images or of each; -1: no label
MAX_IMAGE_VALUE = 16  # above it an image is not in [0, 1], but in [0, 255]
State = tuple[int, Tensor, Tensor]  # t, x_t and the predicted x_0, in [-1, 1]


class ResolvedSampler(NamedTuple):
    """How to sample. Timesteps follow from noise_levels, one a step, or else from spacing."""

    sampler: str | Callable
    steps: int
    spacing: str | None
    noise_levels: Sequence[float] | None


class GenerationMixin:
    """Methods that generate images, all floats in [0, 1], with `denoiser`.

    Options: GUIDANCE_OPTIONS and labels go to `denoiser`, clip limits each predicted x_0 to
    [-1, 1], others (`eta` of ddim) go to the sampler. labels: of all images or of each, -1 for
    none. None: `sample` and `sample_states` draw classes by seed in the training images'
    proportions; all other methods leave the class open, and classifier-free guidance is off.
    """

    image_size: int
    channels: int
    num_timesteps: int
    sampling_timesteps: int
    log_snr_shift: float  # of the noise schedule, by image size
    is_consistency_tuned = False  # if so, a predicted x_0 is a sample, not an average of many
    device: torch.device
    diffusion: GaussianDiffusion
    denoiser: Callable[..., ModelDenoiser]
    class_names: tuple[str, ...]
    class_counts: dict[str, int]

    @cached_property
    def alpha_bar(self) -> list[float]:
        """alpha_bar of each timestep, read from the device once."""
        return self.diffusion.alphas_cumprod.tolist()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, self.image_size, self.image_size

    @property
    def supported_samplers(self) -> dict[str, Callable]:
        """The samplers that suit the model, by name."""
        return samplers.CONSISTENCY_SAMPLERS if self.is_consistency_tuned else SAMPLERS

    @property
    def default_sampler(self) -> str:
        """The name of the sampler that is used where none is named."""
        return "consistency" if self.is_consistency_tuned else samplers.DEFAULT_SAMPLER

    def sample(
        self, batch_size: int = 16, return_all_timesteps: bool = False,
        sampler: SamplerChoice = None, steps: int | None = None, seed: Seeds = None,
        spacing: str | None = None, labels: Labels = None, guidance: float | None = None,
        noise_levels: Sequence[float] | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Generates images, (batch_size, C, H, W).

        sampler, steps, spacing, noise_levels: see sampling_plan. seed: image i is a function of
        seed + i or of the i-th seed, at any batch size. labels: by default a function of the seed,
        classes in the proportions of the training images. return_all_timesteps: every x_t, from
        noise to image, (batch_size, intervals + 1, C, H, W).
        """
        seeds = expand_seeds(seed, batch_size)
        options |= {"labels": labels, "guidance": guidance}
        states = self.sample_states(seeds, sampler, steps, spacing, noise_levels, **options)
        if return_all_timesteps:
            return unnormalize(torch.stack([x_t for _, x_t, _ in states], dim=1))
        return unnormalize(final_x(states))

    def sample_states(
        self, seeds: Sequence[int], sampler: SamplerChoice = None, steps: int | None = None,
        spacing: str | None = None, noise_levels: Sequence[float] | None = None,
        labels: Labels = None, **options: Any,
    ) -> Iterator[State]:  # fmt: skip
        """Returns the states of `sample` from noise to image; arguments as there."""
        # Noise first: sampling_plan may read the schedule from the GPU, after earlier images.
        x, randn = self.noise(seeds)
        function, timesteps = self.sampling_plan(sampler, steps, spacing, noise_levels)
        if labels is None and self.class_names:
            labels = labels_in_proportion(seeds, self.class_counts.values())
        return self.trajectory(x, timesteps, function, randn, labels=labels, **options)

    @torch.no_grad()
    def interpolate(
        self, image1: Tensor, image2: Tensor, num_steps: int = 10, sampler: SamplerChoice = "ddim",
        steps: int = 100, labels: tuple[int, int] | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Interpolates between two images (C, H, W): (num_steps, C, H, W).

        ddim_encode takes both to x_T in `steps` steps; points on the arc in between are decoded.
        Guidance is disabled: it would move the endpoints away from the inputs. labels: of both
        images, between which the class goes, too.
        """
        if self.is_consistency_tuned:
            reason = "it has no flow to encode images. Use the model that it was tuned from"
            raise UserError(f"a consistency-tuned model cannot interpolate: {reason}")
        if num_steps < 2:
            raise UserError(f"num_steps is {num_steps}, but must be at least 2: both images")

        # Both images to noise.
        pair = torch.stack([self.prepare_image(image1), self.prepare_image(image2)])
        function, timesteps = self.sampling_plan(sampler, min(steps, self.num_timesteps), "uniform")
        with eval_mode(self):
            end_labels = self.prepare_labels(labels, 2)
            denoiser = self.denoiser(clip=False, guidance=1, labels=end_labels)
            codes = samplers.ddim_encode(denoiser, pair * 2 - 1, timesteps)

        # Points in between, of the noise and of the class.
        position = torch.linspace(0, 1, num_steps, device=self.device)
        x = samplers.slerp(*codes, position)
        if labels is not None:
            every_label = torch.arange(len(self.class_names), device=self.device)
            first, last = (end_labels[:, None] == every_label).float()
            labels = torch.lerp(first, last, position[:, None])

        # All points to images.
        randn = SeededNoise(range(num_steps))
        options |= {"clip": False, "guidance": 1, "labels": labels}
        return unnormalize(final_x(self.trajectory(x, timesteps, function, randn, **options)))

    @torch.no_grad()
    def vary(
        self, image: Tensor, strength: float = 0.5, batch_size: int = 4,
        sampler: SamplerChoice = None, steps: int | None = None, seed: Seeds = None,
        spacing: str | None = None, noise_levels: Sequence[float] | None = None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """Generates variations of an image (C, H, W): (batch_size, C, H, W).

        SDEdit, Meng et al. (arXiv:2108.01073): noises the image to the sampler's highest
        timestep up to `strength`, a fraction of the process in (0, 1], and denoises it from there.
        A consistency-tuned model, which has few timesteps, starts at `strength` itself.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength is {strength}, but must be above 0 and at most 1")
        function, timesteps = self.sampling_plan(sampler, steps, spacing, noise_levels)
        start = max(1, round(strength * self.num_timesteps)) - 1
        timesteps = [t for t in timesteps if t <= start]
        if timesteps[0] < start and (self.is_consistency_tuned or timesteps == [-1]):
            timesteps = [start, *timesteps]
        noise, randn = self.noise(expand_seeds(seed, batch_size))
        x_0 = self.prepare_image(image) * 2 - 1
        x = diffuse(x_0, noise, self.alpha_bar[timesteps[0]])
        return unnormalize(final_x(self.trajectory(x, timesteps, function, randn, **options)))

    @torch.no_grad()
    def inpaint(
        self, image: Tensor, mask: Tensor, batch_size: int = 1, sampler: SamplerChoice = None,
        steps: int | None = None, seed: Seeds = None, spacing: str | None = None,
        resamples: int = 5, noise_levels: Sequence[float] | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Inpaints an image (C, H, W) where mask (H, W) is not 0: (batch_size, C, H, W).

        RePaint, algorithm 1 of Lugmayr et al. (arXiv:2201.09865): repeats each step `resamples`
        times, with noise added again in between, so that both regions come to agree. Every step
        restarts the sampler, so the multistep ones act as ddim here. For a consistency-tuned model,
        the timesteps of 4 steps are added: of 1 or 2 none has a noise level where they could agree.
        """
        if resamples < 1:
            raise UserError(f"resamples is {resamples}, but must be at least 1")
        shape = self.image_shape[1:]
        mask = torch.as_tensor(mask)
        if tuple(mask.shape[-2:]) != shape or mask.numel() != math.prod(shape):
            raise UserError(f"the mask is {tuple(mask.shape)}, but must be {shape}")
        is_known = (mask.reshape(shape) == 0).to(self.device)
        known = self.prepare_image(image) * 2 - 1
        function, timesteps = self.sampling_plan(sampler, steps, spacing, noise_levels)
        if self.is_consistency_tuned:
            timesteps = sorted({*timesteps, *self.sampling_plan(steps=4)[1]}, reverse=True)
        x, randn = self.noise(expand_seeds(seed, batch_size))
        alpha_bar = [*self.alpha_bar, 1.0]  # at -1, the clean image
        for t, s in pairwise(timesteps):
            # The last step of a consistency-tuned model is as long as any.
            for resample in range(resamples if s >= 0 or self.is_consistency_tuned else 1):
                # From s back to t, then both regions to s: generated and known.
                if resample:
                    x = diffuse(x, randn(x), alpha_bar[t] / alpha_bar[s])
                generated = final_x(self.trajectory(x, [t, s], function, randn, **options))
                x = torch.where(is_known, diffuse(known, randn(x), alpha_bar[s]), generated)
        return unnormalize(x)

    @torch.no_grad()
    def trajectory(
        self, x: Tensor, timesteps: Sequence[int], sampler: Callable, randn: Callable,
        clip: bool = True, labels: Labels = None, **options: Any,
    ) -> Iterator[State]:  # fmt: skip
        """Runs a sampler from x at timesteps[0]; its last state is (-1, sample, sample)."""
        guidance = {name: options.pop(name, None) for name in GUIDANCE_OPTIONS}
        with eval_mode(self):
            labels = self.prepare_labels(labels, len(x))
            denoiser = self.denoiser(clip, labels=labels, **guidance)
            outputs = run_sampler(sampler, denoiser, x, timesteps, randn, **options)
            for t, (x_s, x_0) in zip(timesteps, outputs, strict=False):
                yield t, x, x_0
                x = x_s
            yield -1, x, x

    def sampling_plan(
        self, sampler: SamplerChoice = None, steps: int | None = None,
        spacing: str | None = None, noise_levels: Sequence[float] | None = None,
    ) -> tuple[Callable, list[int]]:  # fmt: skip
        """Returns the sampler as a function and its timesteps, the last of which is -1.

        steps: network evaluations, not counting guidance's. spacing: one of SPACINGS, by default
        the sampler's own. noise_levels: of the sampler consistency, the sigma of each step, as in
        CONSISTENCY_LEVELS, in place of steps and spacing. UserError for unknown names, or more
        steps than the process has.
        """
        # The sampler and the number of steps.
        chosen = self.fill_sampler_defaults(sampler, steps, spacing, noise_levels)
        sampler, steps, spacing, levels = chosen
        if isinstance(sampler, str):  # still a name: none of this model's samplers
            is_known = sampler in (*SAMPLERS, *samplers.CONSISTENCY_SAMPLERS)
            reason = "this model has no" if is_known else "unknown"
            names = ", ".join(self.supported_samplers)
            raise UserError(f"{reason} sampler {sampler}; choose from {names}")
        if not 1 <= steps <= self.num_timesteps:
            bounds = f"between 1 and {self.num_timesteps} for this model"
            raise UserError(f"steps is {steps}, but must be {bounds}")
        limit = samplers.MAX_CONSISTENCY_STEPS
        if sampler is samplers.consistency and steps > limit:
            raise UserError(f"steps is {steps}, but must be at most {limit}")

        # The timesteps, by noise levels or by spacing.
        if levels:
            sigmas = [shift_sigma(level, self.log_snr_shift) for level in levels]
            return sampler, samplers.timesteps_from_sigmas(self.alpha_bar, sigmas)
        return sampler, samplers.choose_timesteps(sampler, self.alpha_bar, steps, spacing)

    def fill_sampler_defaults(
        self, sampler: SamplerChoice, steps: int | None, spacing: str | None,
        noise_levels: Sequence[float] | None,
    ) -> ResolvedSampler:  # fmt: skip
        """Fills in what is None, by the model and the sampler.

        A name of one of this model's samplers becomes its function; any other stays. Only the
        sampler consistency has noise levels, by default none where a spacing is named. UserError
        for wrong ones.
        """
        if spacing not in (None, *SPACINGS):
            raise UserError(f"unknown spacing {spacing}; choose from {', '.join(SPACINGS)}")
        sampler = self.default_sampler if sampler is None else sampler
        sampler = self.supported_samplers.get(sampler, sampler)
        if noise_levels is not None:
            samplers.check_noise_levels(noise_levels, sampler, steps)
            return ResolvedSampler(sampler, len(noise_levels), None, noise_levels)
        steps = self.sampling_timesteps if steps is None else steps
        if spacing is None and sampler is samplers.consistency and steps in CONSISTENCY_LEVELS:
            return ResolvedSampler(sampler, steps, None, CONSISTENCY_LEVELS[steps])
        return ResolvedSampler(sampler, steps, spacing or samplers.DEFAULT_SPACING, None)

    def count_nfe(
        self, sampler: Callable, timesteps: Sequence[int], guidance: float | None = None,
        **options: Any,
    ) -> int:  # fmt: skip
        """Returns the NFE of a sample, guidance's included. options: the other GUIDANCE_OPTIONS."""
        labels = torch.zeros(1, dtype=torch.long) if self.class_names else None
        denoiser = self.denoiser(guidance=guidance, labels=labels, **options)
        counter = NFECounter(denoiser)
        list(run_sampler(sampler, counter, torch.zeros(1, 1, 1, 1), timesteps, torch.zeros_like))
        return counter.count

    def noise(self, seeds: Sequence[int]) -> tuple[Tensor, SeededNoise]:
        """Returns x_T of each seed, (B, C, H, W), and the source of their further noise."""
        randn = SeededNoise(seeds)
        return randn(torch.empty(len(seeds), *self.image_shape, device=self.device)), randn

    def prepare_labels(self, labels: Labels, count: int) -> Tensor | None:
        """Returns the labels of `count` images on the model's device: int64 (count,).

        labels: one for all, or one of each, or weights of the classes, floats (count, classes).
        Raises UserError for labels that the model does not have, or of another number or shape.
        """
        if labels is None:
            return None
        num_classes = len(self.class_names)
        if not num_classes:
            raise UserError(UNCONDITIONAL_ERROR)
        try:
            labels = torch.as_tensor(labels, device=self.device)
        except (TypeError, ValueError):
            advice = "Use class_names.index(name)"
            raise UserError(f"labels are {labels!r}, but must be numbers. {advice}") from None
        if labels.ndim == 0:
            labels = labels.expand(count)
        if len(labels) != count:
            raise UserError(f"there are {len(labels)} labels for {count} images")
        shape = (count, num_classes) if labels.is_floating_point() else (count,)
        if labels.shape != shape:
            raise UserError(f"labels have the shape {tuple(labels.shape)}, but must have {shape}")
        if labels.is_floating_point():
            return labels
        if ((labels < NO_LABEL) | (labels >= num_classes)).any():
            bounds = f"between 0 and {num_classes - 1}, or {NO_LABEL} for none"
            raise UserError(f"labels are {labels.unique().tolist()[:5]}, but must be {bounds}")
        return labels.long()

    def prepare_image(self, image: Tensor) -> Tensor:
        """Returns an image as (C, H, W) on the model's device; UserError for a wrong one."""
        image = torch.as_tensor(image)
        shape = self.image_shape
        if tuple(image.shape[-3:]) != shape or image.numel() != math.prod(shape):
            raise UserError(f"the image is {tuple(image.shape)}, but must be {shape}")
        if not image.is_floating_point() or not (image.abs() <= MAX_IMAGE_VALUE).all():
            raise UserError("the image must have floats in [0, 1]. Divide one of 0 to 255 by 255")
        return image.reshape(shape).to(self.device)


def run_sampler(
    sampler: Callable, denoiser: samplers.Denoiser, x: Tensor, timesteps: Sequence[int],
    randn: Callable, **options: Any,
) -> samplers.SamplerOutput:  # fmt: skip
    """Yields what a sampler does; raises UserError if a user's does something else."""
    name = getattr(sampler, "__name__", sampler)
    error = UserError(f"the sampler {name} must yield (x_s, x_0), once for each interval")
    try:
        outputs = sampler(denoiser, x, timesteps, randn, **options)
    except TypeError as reason:  # of an option that it does not take
        raise UserError(f"the sampler {name} cannot run ({reason})") from reason
    if not isinstance(outputs, Iterator):
        raise error
    remaining = len(timesteps) - 1
    for output in outputs:
        if remaining == 0 or not (isinstance(output, tuple) and len(output) == 2):
            raise error
        remaining -= 1
        yield output
    if remaining:
        raise error


def final_x(states: Iterator[State]) -> Tensor:
    """Runs a trajectory to its end and returns the sample, in [-1, 1]."""
    return deque(states, maxlen=1).pop()[1]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and back into its mode in the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def expand_seeds(seed: Seeds, count: int) -> list[int]:
    """Returns `count` seeds; raises UserError if another number of them is given."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    try:
        is_first = hasattr(seed, "__index__") and np.ndim(seed) == 0
        seeds = range(seed, seed + count) if is_first else seed
        seeds = [operator.index(each) for each in seeds]
    except TypeError:
        raise UserError(f"seed is {seed}, but must be an integer or a list of integers") from None
    if len(seeds) != count:
        raise UserError(f"there are {len(seeds)} seeds for {count} images")
    if any(not -(2**63) <= each < 2**64 for each in seeds):
        raise UserError("a seed has more than 64 bits")
    return seeds


def unnormalize(x: Tensor) -> Tensor:
    """Maps [-1, 1] to [0, 1] and clips the rest."""
    return ((x + 1) / 2).clamp(0, 1)
