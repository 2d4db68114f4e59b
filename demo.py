"""Checks an installation end to end: ten checks, about a minute on two CPU cores, no network.

Prints a table and writes demo_results/report.html with images. Exit code 1 if a check fails.
"""

import contextlib
import html
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from engine.cli import Parser, run_script  # first: sets what torch reads

import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torch import Tensor

from config import detect_tier, resolve
from ddpm_model import DDPMModel
from engine import plots
from engine.dataloader import BatchLoader
from engine.datasets import load_dataset
from engine.devices import default_device, device_name
from engine.errors import UserError, type_and_message
from engine.inference_jobs import psnr
from engine.noise_schedule import BETA_SCHEDULES, OBJECTIVES
from engine.samplers import SAMPLERS
from engine.trainer import train

OUTPUT_DIR = Path("demo_results")
FIGURES = {
    "data.png": "Training images",
    "samples/demo/final.png": "Samples after 3 short epochs, still blobs",
    "samples/demo/loss.png": "Loss",
    "progressive.png": "From noise to image, one row a seed",
    "interpolation.png": "Between two training images",
}
ARCHITECTURE = {"image_size": 16, "dim": 16, "dim_mults": (1, 2, 2)}
NUM_IMAGES = 4800
BATCH_SIZE = 32
MIN_PSNR = 35  # of interpolation's ends, dB


def check(condition: bool, message: str) -> None:
    """Fails the running check unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_close(a: Tensor, b: Tensor, tolerance: float, name: str) -> None:
    """Fails the running check unless two tensors agree."""
    difference = (a.cpu().double() - b.cpu().double()).abs().max().item()
    check(difference <= tolerance, f"{name}: off by {difference:.2g}, more than {tolerance:g}")


def check_data(demo: SimpleNamespace) -> str:
    """An epoch has no training image twice; seed and epoch alone determine their order."""
    demo.data = load_dataset("shapes", 16, Path("data"), progress=False)[:NUM_IMAGES]
    images = demo.data.images
    check(images.shape == (NUM_IMAGES, 3, 16, 16), f"shape {images.shape}")
    check(images.dtype == np.uint8 and np.ptp(images) > 200, "pixels are not uint8 of full range")
    loader = BatchLoader(demo.data, BATCH_SIZE, 0, torch.device("cpu"), 1)
    order, again, other = (loader.order(epoch) for epoch in (1, 1, 2))
    check(len(np.unique(order)) == order.size, "an image comes twice in an epoch")
    check(np.array_equal(order, again), "the same epoch has two orders")
    check(not np.array_equal(order, other), "two epochs have the same order")
    check(not np.intersect1d(order, loader.val_indices).size, "validation images are trained on")
    plots.save_image(plots.grid(torch.tensor(images[:36]) / 255), Path("data.png"))
    return f"{NUM_IMAGES} images, {len(loader)} batches of {BATCH_SIZE}"


def check_model(demo: SimpleNamespace) -> str:
    """The network keeps the shape; every weight gets a gradient; the initial loss is in range."""
    torch.manual_seed(0)
    demo.model = DDPMModel(**ARCHITECTURE).to(demo.device)
    x = torch.tensor(demo.data.images[:8]).to(demo.device) / 255
    t = torch.linspace(0, demo.model.num_timesteps - 1, 8, device=demo.device).long()
    check(demo.model.unet(x, t).shape == x.shape, "the network changes the shape")
    loss = demo.model(x, t, torch.randn_like(x))
    loss.backward()
    check(all(p.grad is not None for p in demo.model.parameters()), "a weight has no gradient")
    check(0 < loss.item() < 10, f"the initial loss is {loss.item()}")
    count = sum(p.numel() for p in demo.model.parameters())
    return f"{count:,} parameters, initial loss {loss.item():.3f}"


def check_training(demo: SimpleNamespace) -> str:
    """The validation loss falls at each of three epochs of the real training loop."""
    flags = {name.upper(): value for name, value in ARCHITECTURE.items()} | dict(
        RUN_NAME="demo", EPOCHS=3, BATCH_SIZE=BATCH_SIZE, LEARNING_RATE=5e-3, WARMUP_STEPS=20,
        EMA_DECAY=0.98, NUM_SAMPLE_GRIDS=1, GRID_IMAGES=16, SAMPLING_TIMESTEPS=20,
        COMPILE_MODEL=False, USE_AMP=False,
    )  # fmt: skip
    config = resolve("shapes", detect_tier(), flags=flags)
    with open("training.log", "w") as log, contextlib.redirect_stdout(log):
        final = train(DDPMModel.from_config(config), demo.data, config)
    demo.model = DDPMModel.from_file(final).to(demo.device)
    rows = plots.read_metrics(Path("samples/demo/metrics.jsonl"))
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    falls = len(losses) == 3 and losses[0] > losses[1] > losses[2]
    check(falls, f"validation losses do not fall: {losses}")
    return "validation loss " + " > ".join(f"{loss:.4f}" for loss in losses)


def exact_alpha_bar(schedule: str, timesteps: int) -> Tensor:
    """Returns the cumulative product of 1 - beta by the papers, float64 (T,)."""
    t = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * 1000 / timesteps
    else:
        # float32, as upstream computes the ends of the sigmoid.
        start, end = torch.sigmoid(torch.tensor([-3.0, 3.0])).double()
        curve = {
            "cosine": lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2,
            "sigmoid": lambda u: (end - torch.sigmoid(6 * u - 3)) / (end - start),
        }[schedule]
        betas = (1 - curve(t) / curve(t - 1 / timesteps)).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


def check_mathematics(demo: SimpleNamespace) -> str:
    """The diffusion process agrees with closed forms for every beta schedule."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(9, 3, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(9, 3, 8, 8, generator=generator)
    t = torch.tensor([0, 1, 10, 100, 250, 500, 750, 900, 990])
    for s in BETA_SCHEDULES:
        process = GaussianDiffusion(Unet(8, dim_mults=(1,)), image_size=8, beta_schedule=s)
        exact = exact_alpha_bar(s, process.num_timesteps)
        check_close(process.alphas_cumprod, exact, 1e-5, f"alpha-bar of {s}")
        # q(x_t | x_0) and the conversions, where what they divide by is multiplied again.
        signal, sigma = (x.sqrt().view(-1, 1, 1, 1) for x in (exact[t], 1 - exact[t]))
        x_t = process.q_sample(x_0, t, noise)
        check_close(x_t, signal * x_0 + sigma * noise, 1e-5, f"{s}: q(x_t | x_0)")
        v = process.predict_v(x_0, t, noise)
        check_close(process.predict_start_from_v(x_t, t, v), x_0, 1e-5, f"{s}: v to x_0")
        start = process.predict_start_from_noise(x_t, t, noise)
        check_close(signal * start, signal * x_0, 1e-5, f"{s}: noise to x_0")
        predicted = process.predict_noise_from_start(x_t, t, x_0)
        check_close(sigma * predicted, sigma * noise, 1e-4, f"{s}: x_0 to noise")
        previous = torch.cat([torch.ones(1), exact[:-1]])
        posterior = (1 - previous) / (1 - exact) * (1 - exact / previous)
        check_close(process.posterior_variance, posterior, 1e-5, f"{s}: posterior variance")
        snr = (exact[-1] / (1 - exact[-1])).item()
        check(snr < 1e-4, f"{s}: the SNR at the last timestep is {snr:.2g}")
    return f"{', '.join(BETA_SCHEDULES)}: as in the papers"


def check_gradients(demo: SimpleNamespace) -> str:
    """Gradients are finite and of similar size at all timesteps, for every objective."""
    x = torch.tensor(demo.data.images[:8]).to(demo.device) / 255
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(demo.device)
    norms = []
    for objective in OBJECTIVES:
        torch.manual_seed(0)
        model = DDPMModel(**ARCHITECTURE, objective=objective).to(demo.device)
        for t in (0, 10, 100, 300, 500, 700, 900, 990):
            model.zero_grad()
            model(x, torch.full((8,), t, device=demo.device), noise).backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            norms.append((norm / model.diffusion.loss_weight[t]).item())
            check(1e-3 < norms[-1] < 1e3, f"{objective}, t = {t}: gradient norm {norms[-1]:.3g}")
    return f"unweighted norms from {min(norms):.2g} to {max(norms):.2g}"


def check_sampling(demo: SimpleNamespace) -> str:
    """An image depends on its seed alone, not on the batch."""
    for sampler in SAMPLERS:
        options = {"sampler": sampler, "steps": 10}
        images, again = (demo.model.sample(4, seed=5, **options) for _ in range(2))
        check(torch.equal(images, again), f"{sampler}: two images of the same seed")
        single = demo.model.sample(1, seed=7, **options)
        check_close(single[0], images[2], 1e-4, f"{sampler}: seed 7 alone")
        difference = (images[0] - images[1]).abs().mean()
        check(difference > 1e-3, f"{sampler}: the same image of two seeds")
        check(((images >= 0) & (images <= 1)).all(), f"{sampler}: values outside [0, 1]")
    return f"{', '.join(SAMPLERS)}: repeatable, different across seeds"


def check_speed(demo: SimpleNamespace) -> str:
    """Measures sampling steps per second by batch size; there is no limit."""
    rates = []
    for size in (1, 8, 32):
        demo.model.sample(size, steps=5, seed=0)
        start = time.perf_counter()
        demo.model.sample(size, steps=5, seed=0).cpu()
        rates.append(f"{size}: {5 * size / (time.perf_counter() - start):.0f}")
    return f"image steps per second by batch size, {', '.join(rates)}"


def check_saving(demo: SimpleNamespace) -> str:
    """Both file formats restore the same weights and the same samples."""
    samples = demo.model.sample(2, steps=5, seed=0)
    for name in ("model.pt", "model.safetensors"):
        demo.model.save_model(name)
        loaded = DDPMModel.from_file(name).to(demo.device)
        pairs = zip(demo.model.state_dict().values(), loaded.state_dict().values(), strict=True)
        check(all(torch.equal(*pair) for pair in pairs), f"{name}: the weights differ")
        again = loaded.sample(2, steps=5, seed=0)
        check(torch.equal(samples, again), f"{name}: the samples differ")
    return f"model.pt and model.safetensors, {os.path.getsize('model.safetensors') / 1e6:.1f} MB"


def check_interpolation(demo: SimpleNamespace) -> str:
    """Interpolation starts and ends at the given images; guidance would move it away from them."""
    check(demo.model.guide is not None, "the model has no guide")
    endpoints = torch.from_numpy(demo.data.images[[0, 5]]).to(demo.device) / 255
    images = demo.model.interpolate(*endpoints, num_steps=8)
    check(images.shape == (8, 3, 16, 16), f"shape {tuple(images.shape)}")
    worst = min(psnr(images[0], endpoints[0]), psnr(images[-1], endpoints[1]))
    check(worst > MIN_PSNR, f"the ends are at {worst:.1f} dB from the given images")
    row = torch.cat([endpoints[:1], images, endpoints[1:]])
    plots.save_image(plots.grid(row, columns=10), Path("interpolation.png"))
    return f"the ends match the given images at {worst:.1f} dB PSNR"


def check_figures(demo: SimpleNamespace) -> str:
    """Every figure of the report exists and is not blank."""
    frames = demo.model.sample(3, return_all_timesteps=True, steps=50, seed=0)
    shown = frames[:, [0, 5, 15, 25, 35, 40, 45, 47, 49, 50]].flatten(0, 1)
    plots.save_image(plots.grid(shown, columns=10), Path("progressive.png"))
    for name in FIGURES:
        with plots.Image.open(name) as image:
            check(np.asarray(image.convert("L")).std() > 5, f"{name} is blank")
    return f"{len(FIGURES)} figures"


# They share `demo`, which has the device and, after the first checks, the data and the model.
CHECKS: dict[str, Callable[[SimpleNamespace], str]] = {
    "data": check_data, "model": check_model, "training": check_training,
    "mathematics": check_mathematics, "gradients": check_gradients, "sampling": check_sampling,
    "speed": check_speed, "save and load": check_saving, "interpolation": check_interpolation,
    "figures": check_figures,
}  # fmt: skip


def write_html_report(title: str, table: str) -> None:
    """Writes report.html with its images inside, as a single file."""
    page = '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
    page += "<style>body{font:16px sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    page += "img{max-width:100%}pre{overflow:auto}</style>\n"
    page += f"<title>{title}</title>\n<h1>{title}</h1>\n<pre>{html.escape(table)}</pre>\n"
    for path, caption in FIGURES.items():
        if Path(path).exists():
            uri = plots.png_data_uri(Path(path).read_bytes())
            page += f'<h2>{caption}</h2>\n<img alt="" src="{uri}">\n'
    Path("report.html").write_text(page, encoding="utf-8")


def main() -> None:
    """Runs all checks, also after one failed, and writes the report."""
    Parser(__doc__).parse_args()
    # What the demo trains stays in its own folder.
    OUTPUT_DIR.mkdir(exist_ok=True)
    os.chdir(OUTPUT_DIR)
    for folder in ("checkpoints", "samples"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in ("report.html", *FIGURES):
        Path(file).unlink(missing_ok=True)
    demo = SimpleNamespace(device=default_device())
    lines = [f"torch {torch.__version__}, {device_name(demo.device)}"]
    print(lines[0])

    failed = []
    for number, (name, function) in enumerate(CHECKS.items(), 1):
        start = time.perf_counter()
        try:
            detail = function(demo)
        except UserError as error:
            failed.append(name)
            detail = str(error)
        except Exception as error:
            failed.append(name)
            detail = type_and_message(error)
            traceback.print_exc()
        status = "failed" if name in failed else "passed"
        seconds = time.perf_counter() - start
        lines.append(f"{number:2}/{len(CHECKS)}  {name:14} {status} {seconds:6.1f} s  {detail}")
        print(lines[-1], flush=True)

    problem = f"{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}"
    title = problem if failed else f"all {len(CHECKS)} checks passed"
    write_html_report(title, "\n".join(lines))
    print(f"report: {OUTPUT_DIR / 'report.html'}")
    if failed:
        raise UserError(title, exit_code=1)


if __name__ == "__main__":
    run_script(main)
