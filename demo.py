"""Checks an installation from end to end: ten checks, about a minute on two CPU cores, no network.

    python demo.py                 everything on the built-in shapes
    python demo.py --full          also CIFAR-10, which is fetched if it is not in data/

Prints a table as it goes and writes demo_results/report.html with the pictures. Exit status 1 if a check failed.
"""

import base64
import contextlib
import html
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torch import Tensor

from config import detect_tier, resolve
from ddpm_model import BETA_SCHEDULES, OBJECTIVES, DDPMModel
from engine import plots
from engine.batches import Batches
from engine.command_line import Parser, run
from engine.errors import UserError
from engine.samplers import SAMPLERS
from engine.sources import load_images
from engine.training import train

RESULTS = Path("demo_results")
PICTURES = {
    "data.png": "Training images",
    "samples/demo/final.png": "Samples after 3 short epochs: blobs; train_optimized.py goes on to shapes",
    "samples/demo/loss.png": "Loss",
    "progressive.png": "From noise to image, one row a seed",
    "interpolation.png": "Between two training images",
}
SIZE, IMAGES, BATCH = 16, 4800, 32


@dataclass
class Demo:
    """What the checks hand on to each other."""

    device: torch.device
    images: np.ndarray = field(default_factory=lambda: np.empty((0, 3, SIZE, SIZE), np.uint8))
    model: DDPMModel = field(default_factory=lambda: DDPMModel(SIZE, dim=16, dim_mults=(1, 2, 2)))


def require(condition: bool, what: str) -> None:
    """Fails the check that is running, saying what is not as it must be."""
    if not condition:
        raise AssertionError(what)


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> float:
    """Requires two tensors to agree and returns their largest difference."""
    difference = (a.double() - b.double()).abs().max().item()
    require(difference <= tolerance, f"{what}: off by {difference:.2g}, more than {tolerance:g}")
    return difference


def check_data(demo: Demo) -> str:
    """Images arrive, and an epoch is every image once, in an order that only the seed and the epoch decide."""
    demo.images = load_images("shapes", SIZE, Path("data"), progress=False)[:IMAGES]
    require(demo.images.shape == (IMAGES, 3, SIZE, SIZE), f"shape {demo.images.shape}")
    require(demo.images.dtype == np.uint8 and np.ptp(demo.images) > 200, "pixels are not uint8 over the whole range")
    batches = Batches(demo.images, BATCH, 0, torch.device("cpu"), 1)
    order = batches.order(1)
    require(len(np.unique(order)) == order.size, "an image comes twice in an epoch")
    require(np.array_equal(order, batches.order(1)), "the same epoch has two orders")
    require(not np.array_equal(order, batches.order(2)), "two epochs have the same order")
    require(not np.intersect1d(order, batches.held_out).size, "held-out images are trained on")
    plots.save_image(plots.grid(torch.tensor(demo.images[:36]) / 255), Path("data.png"))
    return f"{IMAGES} images, {len(batches)} batches of {BATCH}"


def check_model(demo: Demo) -> str:
    """The network keeps the shape, every weight gets a gradient, and the first loss is what an ignorant one has."""
    torch.manual_seed(0)
    demo.model = DDPMModel(SIZE, dim=16, dim_mults=(1, 2, 2)).to(demo.device)
    x = torch.tensor(demo.images[:8]).to(demo.device) / 255
    t = torch.linspace(0, demo.model.num_timesteps - 1, 8, device=demo.device).long()
    require(demo.model.unet(x, t).shape == x.shape, "the network changes the shape")
    loss = demo.model(x, t, torch.randn_like(x))
    loss.backward()
    require(all(p.grad is not None for p in demo.model.parameters()), "a weight has no gradient")
    require(math.isfinite(loss.item()) and 0 < loss.item() < 10, f"the first loss is {loss.item()}")
    return f"{sum(p.numel() for p in demo.model.parameters()):,} parameters, first loss {loss.item():.3f}"


def check_training(demo: Demo) -> str:
    """Three epochs of the real loop; the validation loss must fall at every one."""
    flags = dict(
        EPOCHS=3, BATCH_SIZE=BATCH, DIM=16, DIM_MULTS=(1, 2, 2), IMAGE_SIZE=SIZE, RUN_NAME="demo", LEARNING_RATE=5e-3,
        EMA_DECAY=0.98, WARMUP_STEPS=20, SAMPLE_GRIDS=1, NUM_SAMPLES=16, SAMPLING_TIMESTEPS=20,
        COMPILE_MODEL=False, USE_AMP=False,
    )  # fmt: skip
    config = resolve("shapes", detect_tier(), flags=flags)
    model = DDPMModel.from_config(config)
    with open("training.log", "w") as log, contextlib.redirect_stdout(log):
        final = train(model, demo.images, config)
    rows = plots.read_metrics(Path("samples/demo/metrics.jsonl"))
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    require(len(losses) == 3 and losses[0] > losses[1] > losses[2], f"validation losses do not fall: {losses}")
    demo.model = DDPMModel().to(demo.device).load_model(final)
    return "validation loss " + " > ".join(f"{loss:.4f}" for loss in losses)


def alpha_bar_of(schedule: str, timesteps: int) -> Tensor:
    """Cumulative product of 1 - beta from the papers' formulas, float64 (T,)."""
    t = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    before = t - 1 / timesteps
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * 1000 / timesteps
    else:
        # float32, as the library has its ends of the sigmoid
        ends = torch.sigmoid(torch.tensor([-3.0, 3.0])).double()
        curve = {
            "cosine": lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2,
            "sigmoid": lambda u: (ends[1] - torch.sigmoid(6 * u - 3)) / (ends[1] - ends[0]),
        }[schedule]
        betas = (1 - curve(t) / curve(before)).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


def check_mathematics(demo: Demo) -> str:
    """The process against closed forms, for every beta schedule: q(x_t | x_0), conversions, posterior, terminal SNR."""
    timesteps, worst = 1000, 0.0
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(9, 3, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(9, 3, 8, 8, generator=generator)
    at = torch.tensor([0, 1, 10, 100, 250, 500, 750, 900, 990])
    for schedule in BETA_SCHEDULES:
        process = GaussianDiffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=timesteps, beta_schedule=schedule)
        exact = alpha_bar_of(schedule, timesteps)
        worst = max(worst, close(process.alphas_cumprod, exact, 1e-5, f"alpha-bar of {schedule}"))
        for i, t in enumerate(at):
            many = torch.randn(200_000, 1, 1, 1, generator=generator)
            x_t = process.q_sample(x_0[i, :1, :1, :1].expand_as(many), t.expand(len(many)), many).double()
            mean, variance = exact[t].sqrt() * x_0[i, 0, 0, 0], 1 - exact[t]
            off = (x_t.mean() - mean).abs() / (variance / len(many)).sqrt()
            require(off < 5, f"{schedule}: mean of q(x_{t} | x_0) is {off:.1f} standard errors off")
            require(abs(x_t.var() / variance - 1) < 0.02, f"{schedule}: variance of q(x_{t} | x_0)")
        x_t, v = process.q_sample(x_0, at, noise), process.predict_v(x_0, at, noise)
        # x_0 from noise is divided by sqrt(alpha-bar), which is what its error is worth
        scale = exact[at].float().sqrt().view(-1, 1, 1, 1)
        close(process.predict_start_from_noise(x_t, at, noise) * scale, x_0 * scale, 1e-5, f"{schedule}: noise to x_0")
        close(process.predict_start_from_v(x_t, at, v), x_0, 1e-5, f"{schedule}: v to x_0")
        scale = (1 - exact[at]).float().sqrt().view(-1, 1, 1, 1)
        close(process.predict_noise_from_start(x_t, at, x_0) * scale, noise * scale, 1e-4, f"{schedule}: x_0 to noise")
        previous = torch.cat([torch.ones(1, dtype=torch.float64), exact[:-1]])
        posterior = (1 - previous) / (1 - exact) * (1 - exact / previous)
        close(process.posterior_variance, posterior, 1e-5, f"{schedule}: posterior variance")
        snr = (exact[-1] / (1 - exact[-1])).item()
        require(snr < 1e-4, f"{schedule}: at the last timestep the SNR is still {snr:.2g}")
    return f"{len(BETA_SCHEDULES)} schedules, alpha-bar within {worst:.1g} of the formulas"


def check_gradients(demo: Demo) -> str:
    """Gradients are finite and of one order of size from the first timestep to the last, for every objective."""
    x = torch.tensor(demo.images[:8]).to(demo.device) / 255
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(demo.device)
    low, high = math.inf, 0.0
    for objective in OBJECTIVES:
        torch.manual_seed(0)
        model = DDPMModel(SIZE, dim=16, dim_mults=(1, 2, 2), objective=objective).to(demo.device)
        for t in (0, 10, 100, 300, 500, 700, 900, 990):
            model.zero_grad()
            model(x, torch.full((8,), t, device=demo.device), noise).backward()
            weight = model.diffusion.loss_weight[t].item()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() / weight
            require(math.isfinite(norm) and 1e-3 < norm < 1e3, f"{objective}, t = {t}: gradient norm {norm:.3g}")
            low, high = min(low, norm), max(high, norm)
    return f"unweighted norms from {low:.2g} to {high:.2g}"


def check_sampling(demo: Demo) -> str:
    """A seed is a picture: the same again, the same in another batch, another for another seed."""
    for sampler in SAMPLERS:
        a, b = (demo.model.sample(4, sampler=sampler, steps=10, seed=5) for _ in range(2))
        require(torch.equal(a, b), f"{sampler}: the same seed gave two pictures")
        close(demo.model.sample(1, sampler=sampler, steps=10, seed=7)[0], a[2], 1e-4, f"{sampler}: seed 7 alone")
        require((a[0] - a[1]).abs().mean() > 1e-3, f"{sampler}: two seeds gave one picture")
        require(bool(torch.isfinite(a).all()) and a.min() >= 0 and a.max() <= 1, f"{sampler}: values outside [0, 1]")
    return f"{', '.join(SAMPLERS)}: repeatable, different across seeds"


def check_speed(demo: Demo) -> str:
    """Images a second of the network by batch size: measured, not judged."""
    found = []
    for size in (1, 8, 32):
        demo.model.sample(size, steps=1, seed=0)
        start = time.perf_counter()
        demo.model.sample(size, steps=5, seed=0).cpu()
        found.append(f"{size}: {5 * size / (time.perf_counter() - start):.0f}")
    return f"evaluations a second by batch size, {', '.join(found)}"


def check_saving(demo: Demo) -> str:
    """Both file formats give back the same weights and the same samples."""
    before = demo.model.sample(2, steps=5, seed=0)
    for name in ("model.pt", "model.safetensors"):
        demo.model.save_model(name)
        loaded = DDPMModel().to(demo.device).load_model(name)
        for key, value in demo.model.state_dict().items():
            require(torch.equal(value, loaded.state_dict()[key]), f"{name}: {key} differs")
        require(torch.equal(before, loaded.sample(2, steps=5, seed=0)), f"{name}: the samples differ")
    return f"model.safetensors, {Path('model.safetensors').stat().st_size / 1e6:.1f} MB, and model.pt"


def check_interpolation(demo: Demo) -> str:
    """Interpolation begins and ends at the given images."""
    first, second = torch.from_numpy(demo.images[[0, 5]]).to(demo.device) / 255
    images = demo.model.interpolate(first, second, num_steps=8)
    require(images.shape == (8, 3, SIZE, SIZE), f"shape {tuple(images.shape)}")
    error = max((images[0] - first).square().mean().item(), (images[-1] - second).square().mean().item())
    psnr = -10 * math.log10(error)
    require(psnr > 20, f"the ends are {psnr:.1f} dB from the given images")
    plots.save_image(plots.grid(torch.cat([first[None], images, second[None]]), columns=10), Path("interpolation.png"))
    return f"ends within {psnr:.1f} dB of the given images"


def check_figures(demo: Demo) -> str:
    """Every picture of the report is there and shows something."""
    frames = demo.model.sample(3, return_all_timesteps=True, steps=50, seed=0)[
        :, [0, 5, 15, 25, 35, 40, 45, 47, 49, 50]
    ]
    plots.save_image(plots.grid(frames.flatten(0, 1), columns=10), Path("progressive.png"))
    for name in PICTURES:
        with plots.Image.open(name) as picture:
            require(np.asarray(picture.convert("L")).std() > 5, f"{name} is blank")
    return f"{len(PICTURES)} pictures"


def check_cifar10(demo: Demo) -> str:
    """CIFAR-10 can be had and a few steps of its preset run."""
    images = load_images("cifar10", 32, Path("..") / "data")
    flags = dict(
        MAX_STEPS=3, BATCH_SIZE=8, RUN_NAME="demo-cifar10", SAMPLE_GRIDS=0, NUM_SAMPLES=1, SAMPLING_TIMESTEPS=2
    )
    config = resolve("cifar10", detect_tier(), flags=flags)
    train(DDPMModel.from_config(config), images[:1024], config)
    return f"{len(images):,} images, 3 steps"


CHECKS: dict[str, Callable[[Demo], str]] = {
    "data": check_data,
    "model": check_model,
    "training": check_training,
    "mathematics": check_mathematics,
    "gradients": check_gradients,
    "sampling": check_sampling,
    "speed": check_speed,
    "save and load": check_saving,
    "interpolation": check_interpolation,
    "figures": check_figures,
}


def write_report(rows: list[tuple[str, bool, float, str]], about: str) -> None:
    """Writes report.html, pictures inside, so that the one file can be sent to someone."""
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td class={'ok' if passed else 'failed'}>{'passed' if passed else 'FAILED'}"
        f"</td><td>{seconds:.1f} s</td><td>{html.escape(detail)}</td></tr>\n"
        for name, passed, seconds, detail in rows
    )
    figures = "".join(
        f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(Path(name).read_bytes()).decode()}"><figcaption>{html.escape(title)}</figcaption></figure>\n'
        for name, title in PICTURES.items()
        if Path(name).exists()
    )
    failed = sum(not passed for _, passed, _, _ in rows)
    verdict = f"{failed} of {len(rows)} checks FAILED" if failed else f"All {len(rows)} checks passed"
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Demo report</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; width: 100%; }}
td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }}
.ok {{ color: #17702e; }} .failed {{ color: #b00020; font-weight: bold; }}
figure {{ margin: 2rem 0; }} img {{ max-width: 100%; }} figcaption {{ color: #555; }}
</style>
<h1>{verdict}</h1>
<p>{html.escape(about)}</p>
<table>
{cells}</table>
{figures}</html>
"""
    Path("report.html").write_text(page, encoding="utf-8")


def main() -> None:
    """Runs the checks one after the other, whatever becomes of the one before."""
    parser = Parser(__doc__)
    parser.add_argument("--full", action="store_true", help="also CIFAR-10")
    checks = CHECKS | ({"CIFAR-10": check_cifar10} if parser.parse_args().full else {})
    RESULTS.mkdir(exist_ok=True)
    os.chdir(RESULTS)  # what the demo trains stays in here and replaces no model of the user's
    for folder in ("checkpoints", "samples"):
        shutil.rmtree(folder, ignore_errors=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}"
    print(f"demo on {about}")
    demo, rows = Demo(device), []
    for number, (name, check) in enumerate(checks.items(), 1):
        start = time.perf_counter()
        try:
            passed, detail = True, check(demo)
        except Exception as problem:
            passed, detail = False, f"{type(problem).__name__}: {problem}"
            if not isinstance(problem, AssertionError | UserError):
                traceback.print_exc()
        seconds = time.perf_counter() - start
        rows.append((name, passed, seconds, detail))
        print(
            f"{number:2}/{len(checks)}  {name:14} {'passed' if passed else 'FAILED'} {seconds:6.1f} s  {detail}",
            flush=True,
        )
    write_report(rows, about)
    failed = [name for name, passed, _, _ in rows if not passed]
    print(f"{sum(row[2] for row in rows):.0f} s in all; report: {RESULTS / 'report.html'}")
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} checks failed: {', '.join(failed)}", exit_code=1)


if __name__ == "__main__":
    run(main)
