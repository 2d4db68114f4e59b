"""Search for the largest micro-batch that fits into GPU memory."""

import copy
import gc
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoints import write_text
from engine.dataloader import Batch, fits_on_gpu
from engine.errors import OutOfMemoryWarning, UserError, warn_fallback
from engine.gpu_memory import limited_to, usable_memory
from engine.labels import NO_LABEL
from engine.train_step import TrainableModel, TrainStep

CACHE_FILE = Path("data/cache/memory.json")
HEADROOM = 0.05  # fraction of the memory that stays free for what a long run does to it
# What the memory of a step depends on, in addition to the effective batch.
CACHE_KEY_SETTINGS = (
    "IMAGE_SIZE", "DIM", "DIM_MULTS", "ATTENTION_HEADS", "ATTENTION_DIM", "FULL_ATTENTION_MAX_SIZE",
    "DROPOUT", "USE_AMP", "OPTIMIZER", "COMPILE_MODEL", "CUDA_GRAPH", "GRADIENT_CHECKPOINTING",
    "GRID_IMAGES", "CHANNELS",
)  # fmt: skip


def find_micro_batch(
    model: TrainableModel, config: Any, images: np.ndarray, cache_file: Path = CACHE_FILE
) -> int:
    """Returns a micro-batch that fits: the effective batch, halved as often as needed.

    model: on the CPU; copies of it are trained. images: those to train on, which take memory, too,
    if they are held on the GPU. The result is stored in `cache_file` by GPU, memory, model and
    configuration. UserError if not even one image fits, or if other processes hold all memory.
    """
    # What the result depends on.
    effective = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    available = available_gib(images)
    if available <= 0:
        advice = "Stop other programs that use it, or choose another GPU (CUDA_VISIBLE_DEVICES)"
        raise UserError(f"less than 0.5 GiB of GPU memory is left to train in. {advice}", 1)
    gpu = f"{torch.cuda.get_device_name()}, {available:g} GiB, torch {torch.__version__}"
    settings = " ".join(f"{name}={getattr(config, name)}" for name in CACHE_KEY_SETTINGS)
    count = sum(p.numel() for p in model.parameters())  # with a teacher's
    kind = f"{type(model).__name__}={count} guide={config.GUIDE_FRACTION > 0}"
    key = f"{gpu}: batch={effective} {settings} {kind}"

    # Search unless it is cached.
    known = read_results(cache_file)
    if key not in known:
        task = f"searching for the largest micro-batch (up to {effective}) for {available:g} GiB"
        print(f"{task} (skip with --no-auto_micro_batch)", flush=True)
        micro, peak_gib = probe_micro_batch(model, config, (1 - HEADROOM) * available)
        known[key] = {"micro_batch": micro, "peak_gib": round(peak_gib, 3)}
        write_text(cache_file, json.dumps(known, indent=1) + "\n")
    micro = known[key]["micro_batch"]
    memory = f"peak {known[key]['peak_gib']:.1f} of {available:g} GiB"
    print(f"micro-batch {micro} of {effective}, {memory} (cached in {cache_file})", flush=True)
    return micro


def read_results(cache_file: Path) -> dict[str, dict[str, Any]]:
    """Returns the stored results; none, with a warning, if the file is damaged."""
    try:
        results = json.loads(cache_file.read_text())
        pairs = [(entry["micro_batch"], entry["peak_gib"]) for entry in results.values()]
        if all(type(n) is int and n > 0 and type(p) in (int, float) for n, p in pairs):
            return results
        raise ValueError("a value of another type")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warn_fallback(f"reading {cache_file}", error)
        return {}


def available_gib(images: np.ndarray) -> float:
    """Returns the GPU memory that is left next to the images, rounded down to 0.5 GiB."""
    image_bytes = images.nbytes if fits_on_gpu(images) else 0
    return int((usable_memory() - image_bytes) / 2**29) / 2


def probe_micro_batch(model: TrainableModel, config: Any, limit_gib: float) -> tuple[int, float]:
    """Finds a micro-batch that trains, validates and samples within limit_gib.

    Returns the micro-batch, a divisor of the effective batch, and the peak memory in GiB, of an
    attempt that began with it. Raises UserError if not even one image fits.
    """
    effective = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    config = copy.copy(config)
    config.BATCH_SIZE = effective
    config.GRADIENT_ACCUMULATION = 1
    with limited_to(limit_gib), warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfMemoryWarning)
        while True:
            micro, is_enough = rehearse(model, config, effective)
            peak = torch.cuda.max_memory_reserved()
            gc.collect()
            torch.cuda.empty_cache()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            if is_enough and micro == config.BATCH_SIZE:
                return micro, peak / 2**30
            config.BATCH_SIZE = micro if is_enough else micro // 2


def rehearse(model: TrainableModel, config: Any, effective: int) -> tuple[int, bool]:
    """Trains, validates and samples as a run does, with a copy of the model.

    The images are random. Returns the micro-batch, halved as often as the training step needs, and
    whether validation and sampling fit next to it.
    """
    # Two updates, of which the second is captured.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = copy.deepcopy(model).to(device).train()
    step = TrainStep(model, config)
    if config.GUIDE_FRACTION:
        step.ema.snapshot_guide()
    shape = (effective, model.channels, model.image_size, model.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    has_labels = bool(getattr(model, "class_names", ()))
    batch = Batch(images, torch.full((effective,), NO_LABEL, device=device) if has_labels else None)
    for number in range(2):
        step(batch, number, 1e-4)
    micro = max_divisor(effective, step.micro_batch)

    # A validation and a sample grid with the guide, in parts as small as necessary; then another
    # update, next to what sampling keeps.
    def sample(part: slice) -> None:
        step.ema.sample(part.stop - part.start, steps=min(3, config.TIMESTEPS), seed=0)

    try:
        step.validate(batch.take(slice(micro)).to(torch.device("cpu")))
        step.map_eval_batches(min(micro, config.GRID_IMAGES), sample)
        step(batch, 2, 1e-4)
    except UserError:
        if micro == 1:
            raise
        return micro, False
    return max_divisor(effective, step.micro_batch), True


def max_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of a number up to a limit."""
    return max(n for n in range(1, limit + 1) if number % n == 0)
