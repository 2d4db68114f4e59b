"""Settings of how images are sampled, shared by the scripts that sample."""

import argparse
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine import samplers
from engine.denoiser import GUIDANCE_MODES, GUIDANCE_OPTIONS
from engine.errors import RenamedWarning, UserError
from engine.generation import GenerationMixin
from engine.settings import Setting, Settings


def choose_sampling(model: GenerationMixin, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sampling settings: sampler, steps, spacing and noise levels.

    Where they are not set, they are the model's own.
    """
    name = settings["sampler"]
    name = model.default_sampler if name == "auto" else name
    own_steps = model.num_timesteps if name == "ddpm" else None
    levels = parse_noise_levels(settings["noise_levels"])
    plan = model.fill_sampler_defaults(
        name, settings["steps"] or own_steps, settings["spacing"], levels
    )
    # Stored, so that other defaults will not change what the settings reproduce.
    levels = format_noise_levels(plan.noise_levels)
    return plan._asdict() | {"sampler": name, "noise_levels": levels}


def plan_kwargs(settings: Mapping[str, Any], sampler: str | Callable) -> dict[str, Any]:
    """Returns settings of any kind as the arguments of DDPMModel.sampling_plan."""
    plan = {"sampler": sampler, "steps": settings["steps"], "spacing": settings["spacing"]}
    return plan | {"noise_levels": parse_noise_levels(settings["noise_levels"])}


def guidance_kwargs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of any kind as the arguments of DDPMModel.denoiser that guide."""
    return {name: settings[name] for name in GUIDANCE_OPTIONS}


def parse_noise_levels(text: str | None) -> tuple[float, ...] | None:
    """Parses sigmas like `80,0.8`; raises UserError if they are not numbers."""
    try:
        return None if text is None else tuple(map(float, text.split(",")))
    except ValueError:
        raise UserError(f"noise_levels is {text!r}, but must be numbers like 80,0.8") from None


def format_noise_levels(levels: Sequence[float] | None) -> str | None:
    """Returns noise levels as parse_noise_levels reads them."""
    return levels and ",".join(f"{level:g}" for level in levels)


def sampling_name(settings: Mapping[str, Any], classes: str | None = None) -> str:
    """Returns how images were sampled for names of result files, e.g. unipc-16-cat-dog."""
    parts = [settings["sampler"].replace(".py:", "-").replace("/", "-"), str(settings["steps"])]
    # Noise levels or spacing, unless they are the sampler's own.
    default = samplers.DEFAULT_SPACING
    if settings["sampler"] in samplers.CONSISTENCY_SAMPLERS:
        default = format_noise_levels(samplers.CONSISTENCY_LEVELS.get(settings["steps"])) or default
    used = settings["noise_levels"] or settings["spacing"] or default
    if used != default:
        parts.append(used.replace(",", "-"))
    return "-".join([*parts, *re.findall(r"\w+", classes or "")])[:80]


class SamplingSettings(Settings):
    """How images are sampled."""

    sampler = Setting(
        "auto", f"{', '.join((*samplers.SAMPLERS, *samplers.CONSISTENCY_SAMPLERS))}, "
        "or file.py:function; auto: the model's own"
    )  # fmt: skip
    steps = Setting(
        0, "network evaluations per image, without guidance's; 0: the model's own number, "
        "for ddpm all timesteps", min=0,
    )  # fmt: skip
    guidance = Setting(
        None, "weight of guidance; 1 disables it", 1, 10, type_=float, auto="the model's own"
    )
    guidance_mode = Setting(
        None, "what samples are moved away from", choices=GUIDANCE_MODES, type_=str,
        auto="the model's own"
    )  # fmt: skip
    guidance_min_sigma = Setting(
        None, "lowest noise level to guide", min=0, type_=float, auto="the model's own"
    )
    guidance_max_sigma = Setting(
        None, "highest noise level to guide", min=0, type_=float, auto="the model's own"
    )
    spacing = Setting(
        None, "which timesteps are visited", choices=tuple(samplers.SPACINGS), type_=str,
        auto="the sampler's own",
    )  # fmt: skip
    noise_levels = Setting(
        None, "sigma of each step of consistency like 80,0.8, as at 32 px; replaces steps, spacing",
        type_=str, auto="measured ones for 1, 2 and 4 steps",
    )  # fmt: skip
    batch_size = Setting(0, "images in a batch; 0: as many as fit", min=0)
    use_amp = Setting(False, "mixed precision")

    @classmethod
    def given(cls, options: argparse.Namespace) -> dict[str, Any]:
        """Returns valid values of the flags that were given; guidance 0 once meant None."""
        if getattr(options, "guidance", None) == 0:
            message = "--guidance 0 is deprecated: leave it out for the model's own weight"
            warnings.warn(message, RenamedWarning, stacklevel=2)
            options.guidance = None
        values = super().given(options)
        for name in ("steps", "spacing"):
            if "noise_levels" in values and name in values:
                raise UserError(f"--noise_levels says what --{name} would. Drop one of them")
        return values
