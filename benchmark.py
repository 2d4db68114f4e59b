"""Measures sampling on this machine: images a second by sampler, network evaluations, batch and precision.

    python benchmark.py                                    untrained weights of the CIFAR-10 preset's model
    python benchmark.py --checkpoint checkpoints/ddpm_final.pt --quick

The peer, in the same run: the library's own 1000 ancestral steps, in fp32 without compilation. Writes
results/benchmark-<device>.json. Training speed is not measured here yet.
"""

import json
import platform
import statistics
import time
from pathlib import Path

import torch

from ddpm_model import DDPMModel
from engine.checkpoints import write_atomically
from engine.command_line import Parser, run
from engine.step import amp_dtype

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
    report = {"device": name, "torch": torch.__version__, "parameters": parameters, "sampling": rows}
    write_atomically(path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
    print(f"written: {path}")


if __name__ == "__main__":
    run(main)
