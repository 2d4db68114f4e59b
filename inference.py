"""Draws images with a trained model.

    python inference.py                                    16 samples from the newest checkpoint
    python inference.py --checkpoint checkpoints/my_run/best.pt --num_samples 64 --steps 20
    python inference.py --sampler ddpm --seed 7            1000 ancestral steps

Writes grid.png and the single images into inference_results/<checkpoint>-<sampler>-<steps>-<seed>/. Image i is drawn
from seed + i, so it is the same picture whatever the number of images.
"""

import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_model import DDPMModel
from engine import checkpoints, plots
from engine.command_line import Parser, Setting, run
from engine.samplers import SAMPLERS

RESULTS = Path("inference_results")
SETTINGS = {
    "NUM_SAMPLES": (int, Setting("images to draw", 1, 10_000_000), 16),
    "BATCH_SIZE": (int, Setting("images drawn at a time", 1), 64),
    "SEED": (int, Setting("seed of the first image; image i has seed + i", 0, 2**31 - 1), 0),
    "STEPS": (int, Setting("network evaluations (NFE), 0: all timesteps for ddpm, else the model's own choice", 0), 0),
    "SAMPLER": (str, Setting("how to go from noise to image", choices=tuple(SAMPLERS)), "ddim"),
    "ETA": (float, Setting("fresh noise in ddim: 0 none, 1 as much as ddpm", 0, 1), 0.0),
}


def batch_generate(
    model: DDPMModel,
    total_samples: int = 1000,
    batch_size: int = 32,
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    **options: float,
) -> Tensor:
    """Draws many images, batch by batch, with a progress bar: (total_samples, C, H, W) in [0, 1] on the CPU.

    Image i comes from seed + i, whatever the batch size. sampler, steps and options as in DDPMModel.sample.
    """
    parts = []
    with tqdm(total=total_samples, unit="image", desc="sampling") as bar:
        for start in range(0, total_samples, batch_size):
            count = min(batch_size, total_samples - start)
            parts.append(model.sample(count, sampler=sampler, steps=steps, seed=seed + start, **options).cpu())
            bar.update(count)
    return torch.cat(parts)


def main() -> None:
    """Reads the command line, draws, writes."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint or .safetensors file (default: the newest)")
    for name, (kind, setting, default) in SETTINGS.items():
        parser.add_setting(name, kind, setting, default)
    given = parser.parse_args()
    options = {
        name: setting.check(f"--{name.lower()}", getattr(given, name, default), kind)
        for name, (kind, setting, default) in SETTINGS.items()
    }
    sampler, seed = options["SAMPLER"], options["SEED"]
    path = given.checkpoint or checkpoints.newest()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DDPMModel().to(device).load_model(path)
    steps = options["STEPS"] or (model.num_timesteps if sampler == "ddpm" else model.sampling_timesteps)
    print(f"{path}: {model.image_size} px, {sampler}, {steps} steps, on {device}")
    start = time.perf_counter()
    images = batch_generate(
        model, options["NUM_SAMPLES"], options["BATCH_SIZE"], seed, sampler, steps,
        **({"eta": options["ETA"]} if sampler == "ddim" else {}),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    run_name = path.resolve().parent.name
    label = path.stem if run_name == checkpoints.FOLDER.name else f"{run_name}-{path.stem}"
    folder = RESULTS / f"{label}-{sampler}-{steps}-{seed}"
    for i, image in enumerate(images):
        plots.save_image(plots.to_image(image), folder / f"{seed + i:06d}.png")
    plots.save_image(plots.grid(images[:256]), folder / "grid.png")
    print(f"{len(images)} images in {seconds:.1f} s: {folder / 'grid.png'}, single images beside it")


if __name__ == "__main__":
    run(main)
