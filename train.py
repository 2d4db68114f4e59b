"""Trains a diffusion model in plain fp32: nothing switched on that could go wrong.

    python train.py                                        CIFAR-10, or the built-in shapes
    python train.py --dataset folder --data_dir my_images --epochs 100
    python train.py --resume                               goes on with the newest run

Ends with a sample grid in samples/<run>/ and a model in checkpoints/ddpm_final.pt.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import from_command_line, memory_gib
from ddpm_model import DDPMModel
from engine.command_line import run
from engine.fitting import fit
from engine.processes import together
from engine.sources import load_images
from engine.training import estimate, train

DEFAULTS = {"USE_AMP": False, "COMPILE_MODEL": False, "LR_SCHEDULE": "constant"}


def main(description: str | None = __doc__, defaults: Mapping[str, Any] = DEFAULTS) -> None:
    """Configuration, data, model, training: what every training script does with its own defaults."""
    config, options = from_command_line(description, defaults)
    with together(lambda: "start it again") as processes:
        with processes.local_main_process_first():  # the first process decodes, the others find it done
            images = load_images(
                config.DATASET, config.IMAGE_SIZE, Path(config.DATA_DIR), workers=config.NUM_WORKERS,
                progress=processes.is_local_main_process, upsampling=config.USE_UPSAMPLING,
            )  # fmt: skip
        if config.FIT_MEMORY and processes.device.type == "cuda" and processes.num_processes == 1:
            config.split_batch(fit(DDPMModel.from_config, config, images))
        model = DDPMModel.from_config(config)
        if options.dry_run and processes.is_main_process:
            parameters = sum(p.numel() for p in model.parameters())
            memory = memory_gib(config.DIM, config.IMAGE_SIZE, config.BATCH_SIZE, parameters, config.USE_AMP)
            print(f"{config.table()}\n\n{estimate(model, len(images), config, memory)}")
        if not options.dry_run:
            train(model, images, config, options.resume)


if __name__ == "__main__":
    run(main)
