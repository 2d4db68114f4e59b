"""Settings of how images are sampled, which inference.py and evaluate.py share."""

import argparse
import warnings
from collections.abc import Mapping
from typing import Any

from engine.denoiser import GUIDANCE_MODES
from engine.errors import RenamedWarning
from engine.generation import GenerationMixin
from engine.samplers import CONSISTENCY_SAMPLERS, DEFAULT_SPACING, SAMPLERS, SPACINGS
from engine.settings import Setting, Settings


def choose_sampling(model: GenerationMixin, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings sampler and steps; for `auto` and 0 the model's own."""
    sampler = settings["sampler"]
    sampler = model.default_sampler if sampler == "auto" else sampler
    own = model.num_timesteps if sampler == "ddpm" else model.sampling_timesteps
    return {"sampler": sampler, "steps": settings["steps"] or own}


class SamplingSettings(Settings):
    """How images are sampled."""

    sampler = Setting(
        "auto", f"{', '.join((*SAMPLERS, *CONSISTENCY_SAMPLERS))}, or file.py:function; auto: "
        "the model's own"
    )  # fmt: skip
    steps = Setting(0, "sampler steps; 0: the model's own number, for ddpm all timesteps", min=0)
    guidance = Setting(
        None, "weight of guidance; 1 disables it", 0, 10, type_=float, auto="the model's own"
    )
    guidance_mode = Setting(
        None, "what samples are moved away from", choices=GUIDANCE_MODES, type_=str,
        auto="the model's own"
    )  # fmt: skip
    spacing = Setting(DEFAULT_SPACING, "which timesteps are visited", choices=tuple(SPACINGS))
    batch_size = Setting(0, "images in a batch; 0: as many as fit", min=0)
    use_amp = Setting(False, "mixed precision")

    @classmethod
    def given(cls, options: argparse.Namespace) -> dict[str, Any]:
        """Returns valid values of the flags that were given; guidance 0 once meant None."""
        values = super().given(options)
        if values.get("guidance") == 0:
            message = "--guidance 0 is deprecated: leave it out for the model's own weight"
            warnings.warn(message, RenamedWarning, stacklevel=2)
            values["guidance"] = None
        return values
