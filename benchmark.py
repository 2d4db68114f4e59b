"""Measures this machine: training by precision, launching and batch, the data path, sampling by sampler and steps.

    python benchmark.py                                    the CIFAR-10 preset's model, untrained for sampling
    python benchmark.py --checkpoint checkpoints/ddpm_final.pt --quick

The peers, in the same run: the library's own Trainer step and its 1000 ancestral steps, in fp32 without compilation.
Where there is a GPU, 500 steps in plain fp32 and as train_optimized.py does them show that both learn the same.
Writes results/benchmark-<device>.json and, with a GPU, .png.
"""

import gc
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from ema_pytorch import EMA
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from config import resolve, tier_of
from ddpm_model import DDPMModel
from engine import batches
from engine.checkpoints import write_atomically
from engine.command_line import Parser, run
from engine.sources import load_images
from engine.step import Step, amp_dtype

RESULTS = Path("results")
ROUNDS = 3
WANTED = (("ddim", 50), ("dpmpp_2m", 20), ("unipc", 10), ("heun", 19), ("ddpm", 50))


def seconds(draw, rounds: int = ROUNDS) -> list[float]:
    """Seconds that each of `rounds` calls of draw() took, the device waited for, after one call to warm up."""
    draw()
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        draw().cpu()
        took.append(time.perf_counter() - start)
    return took


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def library_step(batch: int, device: torch.device) -> Callable[[], Any]:
    """A step as the library's Trainer does it, on images that are on the device already."""
    process = GaussianDiffusion(Unet(64), image_size=32, objective="pred_v").to(device)
    accelerator, average = Accelerator(), EMA(process, beta=0.995, update_every=10).to(device)
    optimizer = torch.optim.Adam(process.parameters(), lr=1e-4, betas=(0.9, 0.99))
    process, optimizer = accelerator.prepare(process, optimizer)
    images = torch.rand(batch, 3, 32, 32, device=device)

    def step() -> None:
        with accelerator.autocast():
            loss = process(images)
        loss.item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(process.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return step


def our_step(batch: int, device: torch.device, **flags: Any) -> Callable[[], Any]:
    """A step of the CIFAR-10 preset's model with the given switches, the same data every time."""
    step, number = make_step(batch, device, **flags), iter(range(10**9))
    images = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    return lambda: step(images, next(number), 1e-4)


def make_step(batch: int, device: torch.device, **flags: Any) -> Step:
    """The CIFAR-10 preset's step with the given switches."""
    config = resolve("cifar10", tier_of(1000.0), flags={"BATCH_SIZE": batch, **flags})
    return Step(DDPMModel.from_config(config).to(device).train(), config)


def measure(make: Callable[[], Callable[[], Any]], batch: int, device: torch.device, seconds_a_round: float) -> dict:
    """Rates (images/s) of ROUNDS rounds, seconds until the first step was done, peak memory (GiB)."""
    gc.collect()
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    step = make()
    step()
    wait(device)
    first = time.perf_counter() - start
    start = time.perf_counter()
    step()
    wait(device)
    count = max(1, int(seconds_a_round / (time.perf_counter() - start)))
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            step()
        wait(device)
        rates.append(count * batch / (time.perf_counter() - start))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else None
    return {"batch": batch, "images_per_second": statistics.median(rates), "rounds": rates, "first_step": first,
            "peak_gib": peak}  # fmt: skip


def measure_training(device: torch.device, quick: bool) -> list[dict]:
    """The library's Trainer step and ours, by batch, precision and launching; prints each as it comes."""
    gpu = device.type == "cuda"
    variants: list[tuple[str, dict]] = [("fp32", {})]
    if gpu:
        variants += [("amp", {"USE_AMP": True}), ("fp32, graph", {"CUDA_GRAPH": True})]
        variants += [("amp, graph", {"USE_AMP": True, "CUDA_GRAPH": True})]
    with FlopCounterMode(display=False) as counter:
        Unet(64)(torch.zeros(1, 3, 32, 32), torch.zeros(1))
    work = 3 * counter.get_total_flops()  # the backward pass does twice as much as the forward pass
    peak = matmul_rate(device) if gpu else None
    rows = []
    for batch in ((128,) if quick else (128, 512)) if gpu else (8,):
        makers = [("library's Trainer, fp32", lambda batch=batch: library_step(batch, device))]
        makers += [(name, lambda batch=batch, f=flags: our_step(batch, device, **f)) for name, flags in variants]
        reference = None
        for name, make in makers:
            row = {"what": name} | measure(make, batch, device, 0.5 if quick else 2.0)
            reference = reference or row["images_per_second"]
            row |= {"over_library": row["images_per_second"] / reference}
            row |= {"mfu": row["images_per_second"] * work / peak if peak else None}
            rows.append(row)
            rate = row["images_per_second"]
            more = f", {100 * row['mfu']:.1f} % MFU, {row['peak_gib']:.2f} GiB" if peak else ""
            print(
                f"train {name:24} batch {batch:4} {rate:9.1f} images/s ({min(row['rounds']):.1f} to "
                f"{max(row['rounds']):.1f}), {1000 * batch / rate:.2f} "
                f"ms, {row['over_library']:.2f} x, first step after {row['first_step']:.1f} s{more}",
                flush=True,
            )
    return rows


def matmul_rate(device: torch.device) -> float:
    """What this GPU does at most, FLOP/s: a product of two large matrices of random numbers in 16 bits."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=amp_dtype(device)) for _ in range(2))
    times = seconds(lambda: (a @ b)[0, 0], 10)
    return 2 * 8192**3 / statistics.median(times)


def measure_data(device: torch.device) -> list[dict]:
    """The optimised step at batch 512, its images on the GPU or brought by 8 workers from a memory map."""
    pool = np.random.default_rng(0).integers(0, 256, (50_000, 3, 32, 32), dtype=np.uint8)
    share, rows = batches.GPU_SHARE, []
    step = make_step(512, device, USE_AMP=True, CUDA_GRAPH=True)
    try:
        for name, batches.GPU_SHARE in (("on the GPU", 1.0), ("8 workers", 0.0)):
            source, rates = batches.Batches(pool, 512, 0, device, 8), []
            for epoch in range(ROUNDS + 1):
                start = None
                for number, images in enumerate(source.epoch(epoch)):
                    step(images, number, 1e-4)
                    if number == 3:  # workers have started
                        wait(device)
                        start = time.perf_counter()
                wait(device)
                rates.append(512 * (len(source) - 4) / (time.perf_counter() - start))
            rows.append({"what": name, "images_per_second": statistics.median(rates[1:]), "rounds": rates[1:]})
            print(f"data {name:25} batch  512 {rows[-1]['images_per_second']:9.1f} images/s", flush=True)
    finally:
        batches.GPU_SHARE = share
    return rows


def learning_curves(device: torch.device, steps: int = 500) -> dict[str, list[float]]:
    """Losses of `steps` steps on the built-in shapes: plain fp32 and the optimised step with seed 0, fp32 with seed 1.

    The last shows how far two seeds are apart, beside which the first two should be close.
    """
    images = torch.from_numpy(np.array(load_images("shapes", 32, Path("data"))[:12800])).to(device)
    fast, curves = {"USE_AMP": True, "CUDA_GRAPH": True}, {}
    for name, flags in (("fp32", {}), ("optimised", fast), ("fp32, other seed", {"SEED": 1})):
        step = make_step(128, device, HORIZONTAL_FLIP=False, **flags)
        losses = [step(images[i % 100 * 128 :][:128], i, min(1, i / 100) * 4e-4)[0].clone() for i in range(steps)]
        curves[name] = torch.stack(losses).tolist()
        print(f"curve {name:24} mean loss of the last 100 steps {np.mean(curves[name][-100:]):.5f}", flush=True)
    return curves


def picture(report: dict) -> bytes:
    """Training rates as bars and the learning curves, a PNG."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    labels = [f"{row['what']}, batch {row['batch']}" for row in report["training"]]
    bars.barh(labels, [row["images_per_second"] for row in report["training"]])
    bars.invert_yaxis()
    bars.set(xlabel="images/s", title=f"training step, {report['device']}")
    for name, losses in report["curves"].items():
        curves.plot(np.convolve(losses, np.ones(20) / 20, "valid"), label=name, linewidth=1)
    curves.set(xlabel="step", ylabel="loss, mean of 20", yscale="log", title="the same training in both")
    curves.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def main() -> None:
    """Measures, prints as it goes, writes."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", help="a model to measure instead of an untrained one")
    parser.add_argument("--quick", action="store_true", help="small batches and few samplers: two minutes at most")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    model = DDPMModel().to(device).eval()
    if options.checkpoint:
        model.load_model(options.checkpoint)
    batches = (64, 256) if device.type == "cuda" and not options.quick else (4, 16)
    wanted = WANTED[:2] if options.quick else WANTED
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}, torch {torch.__version__}, {parameters / 1e6:.1f} M parameters, {model.image_size} px", flush=True)
    torch.backends.cudnn.benchmark = True
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "parameters": parameters}
    report["training"] = measure_training(device, options.quick)
    if device.type == "cuda" and not options.quick:
        report["data"] = measure_data(device)
        report["curves"] = learning_curves(device)
    rows = []

    def note(what: str, sampler: str, steps: int, batch: int, took: list[float]) -> None:
        rate = batch / statistics.median(took)
        rows.append({"what": what, "sampler": sampler, "steps": steps, "batch": batch, "images_per_second": rate})
        rows[-1]["seconds"] = took
        times = f"{rate / rows[0]['images_per_second']:7.1f} x" if len(rows) > 1 else ""
        spread = f"{batch / max(took):.1f} to {batch / min(took):.1f}"
        print(f"{what:22} {sampler:9} {steps:5} {batch:4} {rate:9.2f} images/s ({spread}) {times}", flush=True)

    # the peer, all 1000 steps; on a CPU so slow that a few steps have to stand for them
    library, batch = model.diffusion, batches[0]
    if device.type == "cuda":
        library.p_sample(torch.randn(batch, 3, model.image_size, model.image_size, device=device), 999)  # warms up
        start = time.perf_counter()
        library.p_sample_loop((batch, 3, model.image_size, model.image_size)).cpu()
        note("library, fp32", "ddpm", library.num_timesteps, batch, [time.perf_counter() - start])
    else:
        x = torch.randn(batch, 3, model.image_size, model.image_size)
        start = time.perf_counter()
        for t in (999, 500, 100, 10):
            x, _ = library.p_sample(x, t)
        whole = (time.perf_counter() - start) / 4 * library.num_timesteps
        note("library, fp32 (4 steps)", "ddpm", library.num_timesteps, batch, [whole])

    variants = [("fp32", False, False, batches)]
    if device.type == "cuda":
        variants = [("fp32", False, False, batches[:1])]
        variants += [("amp", True, False, batches), ("amp, compiled", True, True, batches[-1:])]
    for what, amp, compiled, sizes in variants:
        if compiled:
            model.unet.compile(dynamic=False)
        for batch in sizes:
            for sampler, steps in wanted:
                with torch.autocast(device.type, amp_dtype(device), enabled=amp):
                    took = seconds(lambda n=batch, s=sampler, k=steps: model.sample(n, sampler=s, steps=k, seed=0))
                note(what, sampler, steps, batch, took)
    path = RESULTS / f"benchmark-{name.replace(' ', '-')}.json"
    report["sampling"] = rows
    write_atomically(path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
    print(f"written: {path}")
    if "curves" in report:
        write_atomically(path.with_suffix(".png"), lambda file: file.write(picture(report)))
        print(f"written: {path.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
