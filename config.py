"""Configuration: one class, presets by dataset, tiers by GPU memory, and a flag for every attribute.

    class MyConfig(DDPMConfig):
        IMAGE_SIZE = 64
        DIM = 128

    python train_optimized.py --config my_config.py:MyConfig --batch_size 32 --dry_run

Where a value is set in several places the last of these wins: the class's default, the script's, the presets of the
data set, of the image size and of a CPU, the tier, the subclass, the flag. `--dry_run` shows which it was.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch

from engine import checkpoints
from engine.command_line import Parser, Setting, load_from_file, nearest
from engine.errors import UserError
from engine.memory import cap_memory, memory_limit
from engine.processes import say_once
from engine.sources import DATASETS, resolve_auto


class DDPMConfig:
    """Every setting of a training run. Subclass it and overwrite what should differ."""

    # data
    DATASET: Annotated[str, Setting("what to train on", choices=DATASETS)] = "auto"
    DATA_DIR: Annotated[str, Setting("where data sets lie, or the folder of images of --dataset folder")] = "data"
    IMAGE_SIZE: Annotated[int, Setting("side of the square images, pixels", 4, 1024, alias="TARGET_SIZE")] = 32
    USE_UPSAMPLING: Annotated[bool, Setting("enlarge images that have fewer pixels than image_size")] = False
    HORIZONTAL_FLIP: Annotated[bool, Setting("mirror half of the training images")] = True
    NUM_WORKERS: Annotated[int, Setting("threads that decode and load images", 1, 256)] = 8

    # model
    DIM: Annotated[int, Setting("width of the Unet's first level, channels", 8, 1024)] = 64
    DIM_MULTS: Annotated[tuple, Setting("width of each level, as multiples of dim", 1, 64)] = (1, 2, 4, 8)
    ATTENTION_HEADS: Annotated[tuple, Setting("attention heads, one number or one for each level", 1, 64)] = (4,)
    ATTENTION_DIM: Annotated[tuple, Setting("channels of a head, one number or one for each level", 1, 512)] = (32,)
    FULL_ATTENTION_SIZE: Annotated[
        int, Setting("levels of so many pixels a side or fewer have full attention; the innermost has it always", 0)
    ] = 0
    DROPOUT: Annotated[float, Setting("dropout in the residual blocks, fraction", 0, 0.9)] = 0.0
    TIMESTEPS: Annotated[int, Setting("steps of the diffusion process", 2, 100_000)] = 1000
    SAMPLING_TIMESTEPS: Annotated[
        int, Setting("network evaluations of a sample; the guide's come on top", 1, 100_000)
    ] = 14
    GUIDANCE: Annotated[
        float, Setting("how far samples are led away from the guide's (arXiv:2406.02507), 1: not at all", 0, 10)
    ] = 2.0  # on CIFAR-10 the best of 1.5 to 3 after 8 minutes, of 1.5 to 2 after 20 (docs/recipe.md)
    GUIDE_AT: Annotated[
        float, Setting("share of the training after which the averaged weights are kept as the guide, 0: none", 0, 1)
    ] = 0.125  # but not before twice the warm-up: see engine.training
    OBJECTIVE: Annotated[str, Setting("what the network predicts", choices=("pred_v", "pred_noise", "pred_x0"))] = (
        "pred_v"
    )
    BETA_SCHEDULE: Annotated[str, Setting("noise schedule", choices=("cosine", "linear", "sigmoid"))] = "cosine"
    SCHEDULE_SIZE: Annotated[
        int, Setting("image size that noise levels are for; shifted for others (arXiv:2301.11093), 0: never", 0, 1024)
    ] = 0
    LOSS_WEIGHTING: Annotated[
        str,
        Setting("min_snr (arXiv:2303.09556), or edm's weights and timesteps (2206.00364)", choices=("min_snr", "edm")),
    ] = "edm"
    MIN_SNR_GAMMA: Annotated[float, Setting("limit of min_snr's SNR, 0: none", 0)] = 5.0

    # length: the last of the three that is set counts
    EPOCHS: Annotated[int, Setting("passes over the training images", 0)] = 50
    MAX_STEPS: Annotated[int, Setting("optimiser steps instead of epochs", 0)] = 0
    MINUTES: Annotated[float, Setting("minutes instead of epochs", 0)] = 0.0

    # optimisation
    BATCH_SIZE: Annotated[int, Setting("images in one forward pass (the micro-batch)", 1)] = 128
    GRADIENT_ACCUMULATION: Annotated[int, Setting("forward passes in one optimiser step", 1)] = 1
    OPTIMIZER: Annotated[str, Setting("muon: matrices by Muon, the rest by Adam", choices=("adam", "muon"))] = "muon"
    LEARNING_RATE: Annotated[float, Setting("learning rate after warm-up", 1e-8, 1.0)] = 2e-3
    LR_SCHEDULE: Annotated[str, Setting("learning rate after warm-up", choices=("cosine", "constant"))] = "cosine"
    WARMUP_STEPS: Annotated[int, Setting("steps over which the learning rate rises", 0)] = 500
    GRAD_CLIP: Annotated[float, Setting("largest norm of the gradient, 0: no limit", 0)] = 1.0
    EMA_DECAY: Annotated[float, Setting("decay of the averaged weights per step, 0: none", 0, 0.999999)] = 0.9995
    USE_AMP: Annotated[bool, Setting("mixed precision: bf16, or fp16 on GPUs without bf16")] = False
    COMPILE_MODEL: Annotated[bool, Setting("compile the training step with torch.compile")] = False
    CUDA_GRAPH: Annotated[bool, Setting("launch a step's kernels as CUDA graphs")] = False
    GRADIENT_CHECKPOINTING: Annotated[bool, Setting("keep less for the backward pass, compute it again")] = False
    FIT_MEMORY: Annotated[bool, Setting("find the largest micro-batch that fits by trying (one GPU)")] = False
    MEMORY_GIB: Annotated[float, Setting("GPU memory that this process may allocate, GiB, 0: all of it", 0)] = 0.0
    SEED: Annotated[int, Setting("seed of everything random", 0, 2**31 - 1)] = 0

    # output
    RUN_NAME: Annotated[str, Setting("name of the run's folders; data set, size and date unless given")] = ""
    CHECKPOINT_EVERY: Annotated[int, Setting("epochs between kept checkpoints, 0: none", 0)] = 10
    SAVE_MINUTES: Annotated[float, Setting("minutes between updates of last.pt", 0)] = 2.0
    SAMPLE_GRIDS: Annotated[int, Setting("sample grids over the whole run, 0: none", 0, 1000)] = 10
    NUM_SAMPLES: Annotated[int, Setting("images in a sample grid", 1, 1024)] = 64

    @classmethod
    def settings(cls) -> dict[str, tuple[type, Setting]]:
        """Type and meaning of each attribute by name, in order."""
        hints = get_type_hints(DDPMConfig, include_extras=True)
        return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Annotated}

    @classmethod
    def values(cls) -> dict[str, Any]:
        """Value of each attribute by name."""
        return {name: getattr(cls, name) for name in cls.settings()}


@dataclass(frozen=True)
class Tier:
    """What a class of machines gets: the widest model it should train. `memory` is in GiB, 0 without a GPU."""

    name: str
    dim: int
    memory: float


TIERS = (("Tiny", 32), ("Small", 64), ("Medium", 128), ("Large", 256))  # below 4, 4 to 8, 8 to 16, above 16 GiB
LENGTHS = ("EPOCHS", "MAX_STEPS", "MINUTES")
MOST_SHIFT = 16  # of SCHEDULE_SIZE over IMAGE_SIZE: above, the first timesteps' noise is lost in rounding

PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": dict(IMAGE_SIZE=32, EPOCHS=120, CHECKPOINT_EVERY=20),
    "celeba": dict(IMAGE_SIZE=64),
    "stl10": dict(IMAGE_SIZE=96),
    "shapes": dict(IMAGE_SIZE=32, HORIZONTAL_FLIP=False, EPOCHS=20),
}
# For large images, whatever they show. What was compared is in docs/recipe.md; the rest is the papers'.
LARGE_IMAGES: dict[str, Any] = dict(
    # the finer the pixels the more neighbours agree, so that the same noise hides less: simple diffusion
    # (arXiv:2301.11093) shifts the noise for it, and that of the CIFAR-10 preset is for 32 px. Without it photographs
    # were 8 % further away, drawings 30 % at 64 px and 36 % at 128
    SCHEDULE_SIZE=32,
    # that is at 16 and 8 pixels a side, or 24 and 12: ADM (arXiv:2105.05233) attends at several levels, and the work
    # grows with the fourth power of the side
    FULL_ATTENTION_SIZE=24,
    # as in DDIM's CelebA model (arXiv:2010.02502): after 72 s it made no difference; small data sets are seen often
    DROPOUT=0.1,
    # photographs 14.0 with 1.5 and 19.5 with 2 after 8 minutes, emoji a tenth nearer with 2
    GUIDANCE=1.5,
)
# by the smallest size that they are for
SIZE_PRESETS: dict[int, dict[str, Any]] = {
    # Measured on CIFAR-10 (docs/recipe.md): wide where the pixels are and no wider below, full attention from 16 px on.
    # Ahead of dim 64 with (1,2,4,8) and linear attention at equal time, though it sees a third fewer images.
    8: dict(DIM=128, DIM_MULTS=(1, 2, 2, 2), FULL_ATTENTION_SIZE=16, BATCH_SIZE=256),
    # Measured at 64 px (docs/recipe.md): with these levels 2,930 images/s instead of 2,040 of (1,2,4,8), and nearer to
    # the photographs in equal time; a little nearer with a learning rate of 2e-3 than with 1e-3
    64: LARGE_IMAGES | dict(DIM=128, DIM_MULTS=(1, 2, 2, 2), BATCH_SIZE=128),
    # dim 160 is behind after 84 s and after 8 minutes of emoji; 2e-3 is ahead after 84 s and behind after 8 minutes
    96: LARGE_IMAGES | dict(DIM=128, DIM_MULTS=(1, 2, 2, 2), BATCH_SIZE=64, LEARNING_RATE=1e-3),
    # the network for 64 px and one more level on top, not wider than the next: most work is where the pixels are.
    # Ahead of (1,2,2,2) after 84 s
    128: LARGE_IMAGES | dict(DIM=128, DIM_MULTS=(1, 1, 2, 2, 2), BATCH_SIZE=64, LEARNING_RATE=1e-3),
}
# Without a GPU: small enough that the shapes can be named after five minutes on two cores (docs/cpu.md has what was
# tried). Attention takes half of the time unless it is made small at the upper levels. Min-SNR rather than EDM: what
# shape it is shows at the higher noise levels, on which EDM spends less.
CPU_PRESETS: dict[str, dict[str, Any]] = {
    "shapes": dict(
        IMAGE_SIZE=16, DIM=32, DIM_MULTS=(1, 2, 2), ATTENTION_HEADS=(1, 1, 4), ATTENTION_DIM=(8, 16, 32),
        FULL_ATTENTION_SIZE=0, BATCH_SIZE=32, LEARNING_RATE=5e-3, LOSS_WEIGHTING="min_snr", WARMUP_STEPS=100,
        EMA_DECAY=0.998, GUIDE_AT=0.25, GUIDANCE=1.5, MINUTES=4.75, SAMPLE_GRIDS=5, NUM_SAMPLES=36,
    ),
}  # fmt: skip
# neither compilation (60 to 100 s before the first step) nor bf16 made it faster on the CPUs it was tried on
CPU_LIMITS = dict(USE_AMP=False, COMPILE_MODEL=False, CUDA_GRAPH=False, FIT_MEMORY=False)


def detect_tier() -> Tier:
    """The tier of the current GPU by the memory that this process may have of it, or the CPU's."""
    if not torch.cuda.is_available():
        return Tier("CPU", 32, 0.0)
    return tier_of(memory_limit() / 2**30)


def tier_of(memory: float) -> Tier:
    """The tier of a GPU with so many GiB. Cards report slightly less than their name says, hence the rounding."""
    rounded = round(memory)
    index = (rounded >= 4) + (rounded >= 8) + (rounded > 16)
    name, dim = TIERS[index]
    return Tier(name, dim, memory)


def memory_gib(dim: int, image_size: int, batch_size: int, parameters: int, use_amp: bool) -> float:
    """Estimated peak memory of a training step in GiB.

    Weights, gradients, moments, EMA and guide take 20 bytes a parameter with Muon; what the backward pass needs grows
    with dim * pixels. The constants were measured for dim_mults (1,2,4,8), 32 px, on an H200 (docs/speed.md).
    """
    activations = (ACTIVATION_BYTES_AMP if use_amp else ACTIVATION_BYTES) * dim * image_size**2 * batch_size
    return (20 * parameters + activations) / 2**30


ACTIVATION_BYTES = 400
ACTIVATION_BYTES_AMP = 150


class Resolved(argparse.Namespace):
    """A configuration with every attribute set; `origin` says where each value came from."""

    origin: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The attributes alone, as plain values."""
        return {name: getattr(self, name) for name in DDPMConfig.settings()}

    def split_batch(self, micro_batch: int) -> None:
        """Computes the effective batch in micro-batches of the given size, which divides it."""
        if micro_batch != self.BATCH_SIZE:
            self.GRADIENT_ACCUMULATION = self.BATCH_SIZE * self.GRADIENT_ACCUMULATION // micro_batch
            self.BATCH_SIZE = micro_batch
            self.origin["BATCH_SIZE"] = self.origin["GRADIENT_ACCUMULATION"] = "fits (tried)"

    def table(self) -> str:
        """One line for each attribute: name, value, where it came from."""
        return "\n".join(f"{name:22} {getattr(self, name)!s:14} {self.origin[name]}" for name in self.origin)


def resolve(
    dataset: str,
    tier: Tier,
    script: Mapping[str, Any] | None = None,
    subclass: type[DDPMConfig] | None = None,
    flags: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> Resolved:
    """Lays the sources of configuration over each other and checks the result.

    dataset: one of DATASETS but not `auto`. checkpoint: the configuration of a run that goes on; it stands in
    for script, preset and tier. Raises UserError for a name that does not exist or a value out of range.
    """
    settings = DDPMConfig.settings()
    script, own, flags = script or {}, own_values(subclass) if subclass else {}, flags or {}
    named = {**own, **flags}
    layers = [("default", DDPMConfig.values())]
    if checkpoint:
        layers += [("checkpoint", checkpoint)]
    else:
        layers += [("script", script), *presets_for(dataset, tier, script, named)]
        layers += [("tier", {})]
    layers += [(getattr(subclass, "__name__", ""), own), ("flag", flags)]

    value: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, layer in layers:
        lengths = [name for name in LENGTHS if layer.get(name)]
        if source not in ("default", "checkpoint") and len(lengths) > 1:
            raise UserError(f"{' and '.join(lengths)} are set together ({source}): choose one")
        if lengths:  # a length set here replaces another kind of length set before
            value.update(dict.fromkeys(LENGTHS, 0))
            origin.update(dict.fromkeys(LENGTHS, source))
        for name, given in layer.items():
            if name not in settings:
                raise UserError(f"{source} sets {name}, which does not exist{nearest(name, settings)}")
            kind, setting = settings[name]
            value[name], origin[name] = setting.check(name, given, kind), source
        if source == "tier":
            apply_tier(value, origin, tier, has_width=any("DIM" in layer for _, layer in layers[1:-2]))
    value["DATASET"] = dataset
    if "BATCH_SIZE" in named and "GRADIENT_ACCUMULATION" not in named:
        value["GRADIENT_ACCUMULATION"] = 1  # who names the batch means that batch
    if ("BATCH_SIZE" in named or "GRADIENT_ACCUMULATION" in named) and "FIT_MEMORY" not in named:
        value["FIT_MEMORY"], origin["FIT_MEMORY"] = False, "batch named"
    for name in ("ATTENTION_HEADS", "ATTENTION_DIM"):  # a preset's attention goes with the preset's levels
        if origin[name].startswith("preset") and len(value[name]) != len(value["DIM_MULTS"]):
            value[name], origin[name] = getattr(DDPMConfig, name), "default"
    check_together(value)
    config = Resolved(**value)
    config.origin = origin
    return config


def presets_for(
    dataset: str, tier: Tier, script: Mapping[str, Any], named: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """The presets by data set, by image size and for a CPU, by name, in the order in which they are laid.

    A script for large images asks for a size; of a data set's and its own it gets the larger, unless one is named.
    """
    layers = [(f"preset {dataset}", PRESETS.get(dataset, {}))]
    if tier.name == "CPU":
        layers += [(f"preset {dataset} (CPU)", CPU_PRESETS.get(dataset, {}))]
    wanted = script.get("IMAGE_SIZE", 0)
    layers = [(n, {k: v for k, v in layer.items() if k != "IMAGE_SIZE" or v >= wanted}) for n, layer in layers]
    size = DDPMConfig.IMAGE_SIZE
    for layer in (script, *(layer for _, layer in layers), named):
        size = layer.get("IMAGE_SIZE", size)
    least = max((s for s in SIZE_PRESETS if type(size) is int and s <= size), default=0)
    return [layers[0], (f"preset {least} px", SIZE_PRESETS.get(least, {})), *layers[1:]]


def apply_tier(value: dict[str, Any], origin: dict[str, str], tier: Tier, has_width: bool) -> None:
    """Caps the width and splits the batch into micro-batches that fit; the effective batch stays."""
    changes: dict[str, Any] = dict(CPU_LIMITS) if tier.name == "CPU" else {}
    if not has_width or value["DIM"] > tier.dim:
        changes["DIM"] = tier.dim
    if tier.memory:
        dim, micro = changes.get("DIM", value["DIM"]), value["BATCH_SIZE"]
        parameters = 35_700_000 * (dim / 64) ** 2 * sum(m * m for m in value["DIM_MULTS"]) / 85
        while micro % 2 == 0 and memory_gib(dim, value["IMAGE_SIZE"], micro, int(parameters), value["USE_AMP"]) > (
            0.8 * tier.memory
        ):
            micro //= 2
        if micro < value["BATCH_SIZE"]:
            changes["GRADIENT_ACCUMULATION"] = value["BATCH_SIZE"] // micro
            changes["BATCH_SIZE"] = micro
    for name, new in changes.items():
        if value[name] != new:
            value[name], origin[name] = new, f"tier {tier.name}"


def own_values(subclass: type[DDPMConfig]) -> dict[str, Any]:
    """What a subclass, and any class between it and DDPMConfig, sets itself."""
    own: dict[str, Any] = {}
    for cls in reversed(subclass.__mro__):
        if issubclass(cls, DDPMConfig) and cls is not DDPMConfig:
            own.update({name: v for name, v in vars(cls).items() if name.isupper()})
    return own


def check_together(value: Mapping[str, Any]) -> None:
    """Raises UserError where two values cannot go together."""
    factor = 2 ** (len(value["DIM_MULTS"]) - 1)
    if value["IMAGE_SIZE"] % factor:
        raise UserError(f"IMAGE_SIZE is {value['IMAGE_SIZE']}, but the levels of DIM_MULTS need a multiple of {factor}")
    if value["DIM"] % 2:  # sine and cosine of the timestep
        raise UserError(f"DIM is {value['DIM']}, but must be even")
    if value["BETA_SCHEDULE"] == "linear" and value["TIMESTEPS"] < 20:
        raise UserError(f"TIMESTEPS is {value['TIMESTEPS']}, but the linear BETA_SCHEDULE needs at least 20")
    if value["SCHEDULE_SIZE"] > MOST_SHIFT * value["IMAGE_SIZE"]:
        raise UserError(
            f"SCHEDULE_SIZE is {value['SCHEDULE_SIZE']}, but must be at most {MOST_SHIFT} times IMAGE_SIZE, "
            f"{value['IMAGE_SIZE']}"
        )
    for name in ("ATTENTION_HEADS", "ATTENTION_DIM"):
        if len(value[name]) not in (1, len(value["DIM_MULTS"])):
            raise UserError(f"{name} has {len(value[name])} numbers, but must have 1 or {len(value['DIM_MULTS'])}")
    if value["SAMPLING_TIMESTEPS"] > value["TIMESTEPS"]:
        raise UserError(
            f"SAMPLING_TIMESTEPS is {value['SAMPLING_TIMESTEPS']}, but must be at most TIMESTEPS, {value['TIMESTEPS']}"
        )
    if not any(value[name] for name in LENGTHS):
        raise UserError("EPOCHS, MAX_STEPS and MINUTES are all 0: set one of them")


def load_subclass(reference: str) -> type[DDPMConfig]:
    """The class that `file.py:Class` names, which must derive from DDPMConfig."""
    module, name = load_from_file(reference, "--config", "my_config.py:MyConfig")
    subclasses = {k: v for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, DDPMConfig)}
    if name not in subclasses:
        known = [k for k, v in subclasses.items() if v is not DDPMConfig]
        raise UserError(f"{module.__file__} has no subclass of DDPMConfig named {name}{nearest(name, known)}")
    return subclasses[name]


def from_command_line(
    description: str | None, script: Mapping[str, Any], argv: Sequence[str] | None = None
) -> tuple[Resolved, argparse.Namespace]:
    """Reads a training script's command line.

    Returns the configuration and the options that are not part of it: `dry_run` and `resume` (a Path or None).
    """
    parser = Parser(description)
    parser.add_argument("--config", metavar="FILE.py:CLASS", help="a subclass of DDPMConfig")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="show each setting after presets and tier, what would be done and how long it takes; stop",
    )
    parser.add_argument(
        "--resume", nargs="?", const="newest", metavar="CHECKPOINT",
        help="go on with a run: a checkpoint, a run's folder, or nothing for the newest run",
    )  # fmt: skip
    for name, (kind, setting) in DDPMConfig.settings().items():
        parser.add_setting(name, kind, setting, script.get(name, getattr(DDPMConfig, name)))
    options = parser.parse_args(argv)
    flags = {name: getattr(options, name) for name in DDPMConfig.settings() if hasattr(options, name)}
    subclass = load_subclass(options.config) if options.config else None

    checkpoint = None
    if options.resume is not None:
        if "RUN_NAME" in flags:
            raise UserError("--run_name is for a new run, and --resume goes on with one: choose one of them")
        options.resume = checkpoints.find(options.resume)
        checkpoint = checkpoints.load_training(options.resume)["config"]
    layers = [DDPMConfig.values(), script, checkpoint or {}, own_values(subclass) if subclass else {}, flags]
    settings = DDPMConfig.settings()
    dataset, data_dir, memory_gib = (
        settings[name][1].check(name, next(v[name] for v in reversed(layers) if name in v), settings[name][0])
        for name in ("DATASET", "DATA_DIR", "MEMORY_GIB")
    )
    if memory_gib:
        cap_memory(memory_gib)
    tier = detect_tier()
    if dataset == "auto":
        dataset = resolve_auto(Path(data_dir), tier.name != "CPU", say_once)
    return resolve(dataset, tier, script, subclass, flags, checkpoint), options
