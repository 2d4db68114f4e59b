"""Tunes a trained model so that it samples in one or two evaluations: consistency tuning.

    python train_consistency.py                            the newest run, or the pretrained model
    python train_consistency.py --checkpoint my_run --minutes 60
    python train_consistency.py --resume                   resumes the newest run, if it is tuning

Data, classes, precision and whatever else are those of the run that trained the model. Ends with a
sample grid in samples/<run>/, one evaluation above two, and a model in checkpoints/ddpm_final.pt.
"""

from functools import partial
from typing import Any

from engine.cli import run_script

from torch import Tensor

import train
import train_optimized
from ddpm_model import DDPMModel, call_network
from engine.consistency import ConsistencyLoss
from engine.errors import UserError

# What is not as in the run that trained the model. Without dropout, as it would differ between the
# two predictions that the loss compares.
TUNING = {
    "MINUTES": 10.0, "LEARNING_RATE": 5e-4, "LR_SCHEDULE": "cosine", "DROPOUT": 0.0,
    "GUIDE_FRACTION": 0.0, "GUIDANCE": 1.0, "SAMPLING_TIMESTEPS": 2, "RUN_NAME": "",
}  # fmt: skip


class ConsistencyModel(DDPMModel):
    """A model that is trained by the consistency loss; sampled as any DDPMModel.

    Raises UserError for networks that do not predict v, whose x_0 is not exact without noise.
    """

    grid_steps = (1, 2)  # of the sample grids

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"consistency": True})

    def _build(self, **architecture: Any) -> None:
        super()._build(**architecture)
        if self.diffusion.objective != "pred_v" or self.unet.self_condition:
            raise UserError("consistency tuning needs a model of objective pred_v: use another")
        self.loss = ConsistencyLoss(self.diffusion, self.log_snr_shift)
        self.timestep_cdf.copy_(self.loss.timestep_cdf)

    def set_fraction(self, fraction: float) -> None:
        """Sets how much of the run is done, 0 to 1."""
        self.loss.fraction.fill_(min(fraction, 1.0))

    def forward(
        self, images: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Returns the consistency loss, a scalar; arguments as DDPMModel's."""
        network = partial(call_network, self.unet, previous=None, labels=labels)
        return self.loss(network, images * 2 - 1, t, noise)


def main() -> None:
    """Runs the training script on a ConsistencyModel."""
    train.main(__doc__, train_optimized.DEFAULTS, ConsistencyModel, TUNING)


if __name__ == "__main__":
    run_script(main)
