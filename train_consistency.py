"""Tunes a trained model so that it samples in one or two steps: consistency tuning.

    python train_consistency.py                            the newest run, or the pretrained model
    python train_consistency.py --checkpoint my_run --minutes 60
    python train_consistency.py --resume                   resumes the newest run, if it is tuning

Data, classes, precision and all other settings are those of the run that trained the model. Ends
with a sample grid in samples/<run>/, one step above two, and a model in checkpoints/ddpm_final.pt.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

from engine.cli import run_script  # first: sets what torch reads

from torch import Tensor

import train
import train_optimized
from ddpm_model import DDPMModel
from engine import distributed
from engine.consistency import ConsistencyLoss, Teacher, without_teacher
from engine.denoiser import call_network, weaker_network
from engine.errors import UserError
from engine.samplers import MAX_CONSISTENCY_STEPS

# Settings that replace those of the run that trained the model. No dropout: it would differ between
# the two predictions that the loss compares.
TUNING = {
    "MINUTES": 10.0, "LEARNING_RATE": 5e-4, "LR_SCHEDULE": "cosine", "DROPOUT": 0.0,
    "GUIDE_FRACTION": 0.0, "SAMPLING_TIMESTEPS": 2, "RUN_NAME": "", "WEIGHT_DECAY": 0.0,
}  # fmt: skip


class ConsistencyModel(DDPMModel):
    """A model that is trained by the consistency loss; sampled as any DDPMModel.

    guidance, guidance_mode: how its teacher is guided; guidance 1: there is no teacher. Raises
    UserError for networks that do not predict v, whose x_0 is not exact without noise.
    """

    grid_steps = (1, 2)  # of the sample grids

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"consistency": True})

    def _build(self, **architecture: Any) -> None:
        super()._build(**architecture)
        self.teacher = Teacher()
        if self.diffusion.objective != "pred_v" or self.unet.self_condition:
            raise UserError("consistency tuning needs a model of objective pred_v. Use another")
        if self.sampling_timesteps > MAX_CONSISTENCY_STEPS:
            most = f"a tuned model's must be at most {MAX_CONSISTENCY_STEPS}"
            raise UserError(f"sampling_timesteps is {self.sampling_timesteps}, but {most}")
        self.loss = ConsistencyLoss(self.diffusion, self.log_snr_shift)
        self.timestep_cdf.copy_(self.loss.timestep_cdf)

    def start_from(self, source: DDPMModel) -> None:
        """Copies the network of a model, which becomes the teacher if it can be guided."""
        super().start_from(source)
        guide = copy.deepcopy(source.guide)
        if self.guidance != 1 and (guide or self.guidance_mode == "cfg"):
            if source.class_names != self.class_names:  # labels would mean others to the teacher
                reason = "the model and the data have other classes, but its teacher needs the same"
                raise UserError(f"{reason}. Tune without one: --guidance 1")
            self.teacher.set_networks(copy.deepcopy(source.unet), guide)
            kind = f"the guided model (weight {self.guidance:g})"
        else:
            kind = "no teacher"
        distributed.print0(f"consistency tuning with {kind}")

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads the weights, those of the teacher too if there was one and guidance is not 1."""
        if self.guidance == 1:
            state_dict = without_teacher(state_dict)
        self.add_teacher(state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def add_teacher(self, state_dict: Mapping[str, Any]) -> None:
        """Gives the teacher the networks that it has in a state_dict; not their weights."""
        if self.guidance == 1:
            return
        parts = {".".join(name.split(".")[:2]) for name in state_dict}
        unet = copy.deepcopy(self.unet) if "teacher.unet" in parts else None
        guide = copy.deepcopy(self.unet) if "teacher.guide" in parts else None
        if unet and not guide and self.guidance_mode != "cfg":
            why = f"the teacher of this run has no guide, which {self.guidance_mode} needs"
            raise UserError(f"{why}. Resume with --guidance_mode cfg")
        if unet and self.class_names and "teacher.unet.class_embedding.weight" not in state_dict:
            raise UserError("the teacher of this run has no classes. Drop --class_conditional")
        self.teacher.set_networks(unet, guide)

    def set_fraction(self, fraction: float) -> None:
        """Sets how much of the run is done, 0 to 1."""
        self.loss.fraction.fill_(min(fraction, 1.0))

    def forward(
        self, images: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Returns the consistency loss, a scalar; arguments as DDPMModel's."""
        network = partial(call_network, self.unet, previous=None, labels=labels)
        teacher = partial(self.predict_by_teacher, labels) if self.teacher.unet else None
        return self.loss(network, images * 2 - 1, t, noise, teacher)

    def predict_by_teacher(self, labels: Tensor | None, x: Tensor, t: Tensor) -> Tensor:
        """Predicts x_0 in [-1, 1] from x_t (B, C, H, W) as the guided model before tuning."""
        unet = self.teacher.unet
        weaker, weaker_labels = weaker_network(self.guidance_mode, unet, self.teacher.guide, labels)
        networks = (
            partial(call_network, unet, previous=None, labels=labels),
            partial(call_network, weaker, previous=None, labels=weaker_labels),
        )
        return self.loss.predict_guided(*networks, x, t, self.guidance, self.guidance_interval)


def main() -> None:
    """Runs the training script on a ConsistencyModel."""
    train.main(__doc__, train_optimized.DEFAULTS, ConsistencyModel, TUNING)


if __name__ == "__main__":
    run_script(main)
