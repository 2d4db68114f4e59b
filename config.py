"""Configuration: one class, presets by data set and image size, tiers by GPU memory.

    class MyConfig(DDPMConfig):
        IMAGE_SIZE = 64
        DIM = 96

    python train_optimized.py --config my_config.py:MyConfig --batch_size 32 --dry_run

Later layers win: defaults, the script's own, presets (data set, image size, classes, CPU), tier,
--init_from, subclass, flags. On --resume the checkpoint stands in for the first three and the tier.
The tier leaves explicit values alone, but may multiply GRADIENT_ACCUMULATION, with a warning.
`--dry_run` prints each value with its layer.
"""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from engine.datasets import DATASETS
from engine.denoiser import GUIDANCE_MODES
from engine.errors import FallbackWarning, UserError
from engine.gpu_memory import memory_limit
from engine.settings import Setting, Settings
from engine.trackers import TRACKERS


class DDPMConfig(Settings):
    """Every setting of a training run; the defaults are the preset for images below 64 px."""

    # fmt: off
    # Data.
    DATASET = Setting("auto", "what to train on", choices=DATASETS)
    DATA_DIR = Setting("data", "folder of data sets; with --dataset folder, the images")
    IMAGE_SIZE = Setting(32, "side of the square images, px", min=4, max=1024, alias="TARGET_SIZE")
    CHANNELS = Setting(
        0, "channels of an image: gray, RGB or RGBA; 0: what the images have", choices=(0, 1, 3, 4))
    VALUE_RANGE = Setting(
        "", "LOW,HIGH: what is black and white in images of more than 8 bits",
        auto="found from all of them")
    FRAMES = Setting("first", "frames to use of files with several", choices=("first", "all"))
    USE_UPSAMPLING = Setting(False, "train even if most images are smaller than image_size")
    HORIZONTAL_FLIP = Setting(True, "mirror half of the training images")
    CLASS_CONDITIONAL = Setting(False, "train with the class labels of the data")
    LABEL_DROPOUT = Setting(0.1, "fraction of labels dropped in training", min=0, max=1)
    NUM_WORKERS = Setting(8, "threads that decode and load images; 0: none", min=0, max=256)

    # Model.
    DIM = Setting(128, "base channel width", min=8, max=1024)
    DIM_MULTS = Setting((1, 2, 2, 2), "channel multiplier of each level", min=1, max=64)
    ATTENTION_HEADS = Setting((4,), "attention heads, one number or one per level", min=1, max=64)
    ATTENTION_DIM = Setting((32,), "channels of a head, one or one per level", min=1, max=512)
    FULL_ATTENTION_MAX_SIZE = Setting(
        16, "use full attention at resolutions up to N px; the innermost level always does", min=0,
        old_name="FULL_ATTENTION_SIZE")
    DROPOUT = Setting(0.0, "dropout in the residual blocks", min=0, max=0.9)
    TIMESTEPS = Setting(1000, "timesteps of the diffusion process", min=2, max=100_000)
    SAMPLING_TIMESTEPS = Setting(
        16, "network evaluations per sample, without guidance's", min=1, max=100_000)
    GUIDANCE = Setting(2.25, "weight of guidance (arXiv:2406.02507); 1 disables it", min=1, max=10)
    GUIDANCE_MIN_SIGMA = Setting(0.1, "lowest noise level to guide (arXiv:2404.07724)", min=0)
    GUIDANCE_MAX_SIGMA = Setting(2.0, "highest noise level to guide", min=0)
    GUIDANCE_MODE = Setting(
        "autoguidance", "what samples of a class are moved away from: the guide, the network "
        "without a label (classifier-free guidance), or the guide without a label",
        choices=GUIDANCE_MODES)
    GUIDE_FRACTION = Setting(
        0.125, "fraction of training at which the EMA weights are saved as the guide, but not "
        "before 5 times the warm-up, or half of a short run; 0 disables", min=0, max=1,
        old_name="GUIDE_AT")
    OBJECTIVE = Setting("pred_v", "prediction target", choices=("pred_v", "pred_noise", "pred_x0"))
    BETA_SCHEDULE = Setting("cosine", "noise schedule", choices=("cosine", "linear", "sigmoid"))
    SCHEDULE_BASE_SIZE = Setting(
        0, "image size the noise schedule was designed for; shifted for other sizes "
        "(arXiv:2301.11093); 0 disables", min=0, max=1024, old_name="SCHEDULE_SIZE")
    LOSS_WEIGHTING = Setting(
        "edm", "min_snr (arXiv:2303.09556), or edm's weights and timesteps (arXiv:2206.00364)",
        choices=("min_snr", "edm"))
    P_MEAN = Setting(-0.8, "mean of log(sigma) at edm's timesteps; EDM has -1.2", min=-10, max=10)
    MIN_SNR_GAMMA = Setting(5.0, "upper limit of min_snr's SNR; 0 disables", min=0)

    # Length: a layer may set one of the three, which replaces what earlier layers set.
    EPOCHS = Setting(50, "passes over the training images", min=0, max=10**9)
    MAX_STEPS = Setting(0, "optimizer steps instead of epochs", min=0, max=10**9)
    MINUTES = Setting(0.0, "minutes instead of epochs", min=0, max=10**9)

    # Optimization.
    BATCH_SIZE = Setting(
        256, "the most images in one pass on a GPU (the micro-batch); times GRADIENT_ACCUMULATION, "
        "the batch of an update, over all GPUs", min=1)
    GRADIENT_ACCUMULATION = Setting(1, "micro-batches in the batch of an update", min=1)
    OPTIMIZER = Setting("muon", "Adam, or Muon for the inner matrices", choices=("adam", "muon"))
    LEARNING_RATE = Setting(1e-3, "peak learning rate, after warm-up", min=1e-8, max=1.0)
    LR_SCHEDULE = Setting("cosine", "learning rate over the run", choices=("cosine", "constant"))
    WARMUP_STEPS = Setting(500, "steps of linear learning-rate warm-up", min=0)
    WEIGHT_DECAY = Setting(
        0.3, "decoupled weight decay of matrices (arXiv:1711.05101), times the learning rate",
        min=0, max=10)
    GRAD_CLIP = Setting(1.0, "gradient clipping norm; 0 disables", min=0)
    EMA_DECAY = Setting(0.9995, "decay of the EMA per step; 0 disables", min=0, max=0.999999)
    USE_AMP = Setting(False, "mixed precision: bf16, or fp16 on GPUs without bf16")
    COMPILE_MODEL = Setting(False, "compile the training step with torch.compile")
    CUDA_GRAPH = Setting(False, "launch the kernels of a step as CUDA graphs")
    GRADIENT_CHECKPOINTING = Setting(False, "recompute activations to save memory")
    AUTO_MICRO_BATCH = Setting(False, "find the largest micro-batch (1 GPU)", old_name="FIT_MEMORY")
    MAX_MEMORY_GIB = Setting(
        0.0, "GPU memory to use at most, GiB; 0: all of it", min=0, old_name="MEMORY_GIB")
    SEED = Setting(0, "random seed", min=0, max=2**31 - 1)

    # Output.
    RUN_NAME = Setting("", "name of the run's folders", auto="data set, size and date")
    LOG_WITH = Setting("tensorboard", "tracker for metrics and sample grids", choices=TRACKERS)
    KEEP = Setting(
        5, "checkpoints kept over the run, in addition to last, best and final", min=0, max=1000)
    CHECKPOINT_EVERY = Setting(
        None, "epochs between kept checkpoints instead of --keep; 0 keeps none", min=0, type_=int,
        auto="by --keep")
    SAVE_EVERY_MINUTES = Setting(
        2.0, "minutes between updates of last.pt; 0: every step", min=0, old_name="SAVE_MINUTES")
    NUM_SAMPLE_GRIDS = Setting(
        10, "sample grids over the run; 0 disables", min=0, max=1000, old_name="SAMPLE_GRIDS")
    GRID_IMAGES = Setting(64, "images in a sample grid", min=1, max=1024, old_name="NUM_SAMPLES")
    # fmt: on


RUN_LENGTH_SETTINGS = {"EPOCHS": 0, "MAX_STEPS": 0, "MINUTES": 0.0}  # with the value for unset
MAX_SCHEDULE_RATIO = 16  # of SCHEDULE_BASE_SIZE to IMAGE_SIZE; above, early noise rounds to nothing

DATASET_PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {"CLASS_CONDITIONAL": True, "IMAGE_SIZE": 32, "EPOCHS": 120},
    "celeba": {"IMAGE_SIZE": 64},
    "stl10": {"IMAGE_SIZE": 96},
    "shapes": {"IMAGE_SIZE": 32, "HORIZONTAL_FLIP": False, "EPOCHS": 20},
}
# Of runs that do not store them, and of presets that were measured with them.
FORMER_DEFAULTS = {"GUIDANCE_MIN_SIGMA": 0.2, "GUIDANCE_MAX_SIGMA": 5.0, "P_MEAN": -1.2}
# At 64 px and above, noise is shifted, as it hides less of a larger image; full attention grows
# with the fourth power of the side; after an eighth of the few steps a guide would know too little.
HIGH_RES_SETTINGS: dict[str, Any] = {
    "SCHEDULE_BASE_SIZE": 32, "FULL_ATTENTION_MAX_SIZE": 24, "DROPOUT": 0.1, "WEIGHT_DECAY": 0.1,
    "GUIDANCE": 3.0, "GUIDE_FRACTION": 0.5, "SAMPLING_TIMESTEPS": 14, **FORMER_DEFAULTS,
}  # fmt: skip
HIGH_RES_GUIDANCE = {"GUIDANCE_MODE": "both", "GUIDANCE": 2.5}  # with class labels
SIZE_PRESETS: dict[int, dict[str, Any]] = {  # by the smallest image size that each is for, px
    64: HIGH_RES_SETTINGS | {"BATCH_SIZE": 128, "LEARNING_RATE": 2e-3},
    96: HIGH_RES_SETTINGS | {"BATCH_SIZE": 64},
}
# An extra level on top, no wider than the next: at full resolution it costs the most.
SIZE_PRESETS[128] = SIZE_PRESETS[96] | {"DIM_MULTS": (1, 1, 2, 2, 2)}
# Without a GPU: many small steps, and attention narrow where there are many pixels.
CPU_SETTINGS: dict[str, Any] = FORMER_DEFAULTS | {
    "ATTENTION_HEADS": (1, 1, 4, 4), "ATTENTION_DIM": (8, 16, 32, 32), "FULL_ATTENTION_MAX_SIZE": 0,
    "BATCH_SIZE": 32, "LEARNING_RATE": 5e-3, "WARMUP_STEPS": 100, "WEIGHT_DECAY": 0.1,
    "DROPOUT": 0.0, "EMA_DECAY": 0.998, "GUIDE_FRACTION": 0.25, "GUIDANCE": 1.5,
    "SAMPLING_TIMESTEPS": 14,
}  # fmt: skip
CPU_PRESETS = {"shapes": CPU_SETTINGS | {  # recognizable after five minutes on two cores
    "CLASS_CONDITIONAL": True, "IMAGE_SIZE": 16, "DIM": 32, "DIM_MULTS": (1, 2, 2),
    "ATTENTION_HEADS": (1, 1, 4), "ATTENTION_DIM": (8, 16, 32), "LOSS_WEIGHTING": "min_snr",
    "MINUTES": 4.75, "NUM_SAMPLE_GRIDS": 5, "GRID_IMAGES": 36,
}}  # fmt: skip
GPU_SWITCHES = ("USE_AMP", "COMPILE_MODEL", "CUDA_GRAPH", "AUTO_MICRO_BATCH")  # off on a CPU


class Tier(NamedTuple):
    """A class of machines: the widest model it should train. memory: GiB, 0 without a GPU."""

    name: str
    dim: int
    memory: float


def tier_for_memory(gib: float) -> Tier:
    """Returns the tier of a GPU by its memory, rounded: GPUs report less than their name says."""
    for below, name, dim in ((4, "Tiny", 32), (8, "Small", 64), (17, "Medium", 128)):
        if round(gib) < below:
            return Tier(name, dim, gib)
    return Tier("Large", 256, gib)


def detect_tier() -> Tier:
    """Returns the tier of the GPU, by the memory this process may use, or the CPU's."""
    if not torch.cuda.is_available():
        return Tier("CPU", 32, 0.0)
    return tier_for_memory(memory_limit() / 2**30)


def estimate_memory_gib(
    dim: int, image_size: int, batch_size: int, parameters: int, use_amp: bool
) -> float:
    """Estimates the peak memory of a training step, GiB.

    20 bytes per parameter: weights, gradients, Muon's momentum, EMA and guide. Adam takes 4 more.
    """
    # Bytes per base channel, pixel and image, measured for dim_mults 1,2,4,8 at 32 px.
    activation_bytes = 150 if use_amp else 400
    return (20 * parameters + activation_bytes * dim * image_size**2 * batch_size) / 2**30


Layer = tuple[str, Mapping[str, Any]]  # name and values


class Config(DDPMConfig):
    """A resolved configuration; `set_by` names the layer that set each value."""

    set_by: dict[str, str]

    def override(self, values: Mapping[str, Any], source: str) -> None:
        """Sets values on behalf of a layer."""
        for name, value in values.items():
            setattr(self, name, value)
            self.set_by[name] = source

    def split_batch(self, micro_batch: int, source: str = "memory search") -> None:
        """Sets the micro-batch, and the accumulation that keeps the effective batch."""
        if micro_batch != self.BATCH_SIZE:
            effective = self.BATCH_SIZE * self.GRADIENT_ACCUMULATION
            split = {"BATCH_SIZE": micro_batch, "GRADIENT_ACCUMULATION": effective // micro_batch}
            self.override(split, source)

    def table(self) -> str:
        """Returns a line for each setting: name, value, layer."""
        return "\n".join(
            f"{name:24} {getattr(self, name)!s:14} {self.set_by[name]}" for name in self.settings()
        )


def resolve(
    dataset: str, tier: Tier, script: Mapping[str, Any] = {},
    subclass: type[DDPMConfig] | None = None, flags: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None, init_from: Mapping[str, Any] | None = None,
) -> Config:  # fmt: skip
    """Merges the configuration layers in order and validates the result.

    dataset: one of DATASETS but not `auto`. checkpoint: the configuration of a run to resume; it
    stands in for script, presets and tier. init_from: what the weights to start from require.
    Raises UserError for an unknown name, a value out of range or values that exclude each other.
    Warns where the tier changes an explicit value.
    """
    explicit_layers: list[Layer] = [("init_from", init_from or {})]
    if subclass:
        explicit_layers.append((subclass.__name__, subclass_overrides(subclass)))
    explicit_layers.append(("flag", DDPMConfig.current_names(flags or {}, warn=True)))
    explicit = {name: value for _, values in explicit_layers for name, value in values.items()}
    if checkpoint:
        former = {"CHANNELS": 3, "WEIGHT_DECAY": 0.0, **FORMER_DEFAULTS}  # if not saved
        saved = former | DDPMConfig.current_names(checkpoint)
        if isinstance(saved.get("GUIDANCE"), float):  # which they allowed to be less than 1
            saved["GUIDANCE"] = max(1.0, saved["GUIDANCE"])
        base_layers = [("checkpoint", saved)]
    else:
        base_layers = [("script", script), *presets_for(dataset, tier, script, explicit)]

    # Apply the layers in order.
    config = Config()
    config.set_by = dict.fromkeys(config.settings(), "default")
    for layer, unchecked in (*base_layers, *explicit_layers):
        values = DDPMConfig.check(unchecked, layer)
        lengths = [name for name in RUN_LENGTH_SETTINGS if values.get(name)]
        if len(lengths) > 1 and layer != "checkpoint":
            raise UserError(f"set only one of {', '.join(lengths)} ({layer})")
        # One kind of length replaces another.
        config.override((RUN_LENGTH_SETTINGS if lengths else {}) | values, layer)
    if config.DATASET != dataset:
        config.override({"DATASET": dataset}, "data")

    # An explicit batch size is used as is.
    for name, value, reasons in (
        ("GRADIENT_ACCUMULATION", 1, {"BATCH_SIZE"}),
        ("AUTO_MICRO_BATCH", False, {"BATCH_SIZE", "GRADIENT_ACCUMULATION"}),
    ):
        if name not in explicit and reasons & explicit.keys():
            config.override({name: value}, "explicit batch")
    if not checkpoint:
        apply_tier(config, tier, explicit)
    # A preset's attention belongs to the preset's levels.
    for name in ("ATTENTION_HEADS", "ATTENTION_DIM"):
        is_preset = config.set_by[name].startswith("preset")
        if is_preset and len(getattr(config, name)) != len(config.DIM_MULTS):
            config.override({name: getattr(DDPMConfig, name)}, "default")
    validate(config)
    return config


def presets_for(
    dataset: str, tier: Tier, script: Mapping[str, Any], explicit: Mapping[str, Any]
) -> list[Layer]:
    """Returns the presets of the data set, the image size and a CPU, in order.

    A script for large images sets a size; the larger of it and the data set's counts, unless one
    is explicit.
    """
    by_dataset = dict(DATASET_PRESETS.get(dataset, {}))
    for_cpu = dict(CPU_PRESETS.get(dataset, CPU_SETTINGS)) if tier.name == "CPU" else {}
    script_size = script.get("IMAGE_SIZE", 0)
    for preset in (by_dataset, for_cpu):
        if preset.get("IMAGE_SIZE", script_size) < script_size:
            del preset["IMAGE_SIZE"]

    size = DDPMConfig.IMAGE_SIZE
    is_conditional = DDPMConfig.CLASS_CONDITIONAL
    for values in (script, by_dataset, for_cpu, explicit):
        size = values.get("IMAGE_SIZE", size)
        is_conditional = values.get("CLASS_CONDITIONAL", is_conditional)
    known = size if hasattr(size, "__index__") else 0  # a wrong type is reported by its layer
    preset_size = max((s for s in SIZE_PRESETS if s <= known), default=0)
    return [
        (f"preset {dataset}", by_dataset),
        (f"preset {preset_size} px", SIZE_PRESETS.get(preset_size, {})),
        ("preset classes", HIGH_RES_GUIDANCE if preset_size and is_conditional else {}),
        (f"preset {dataset} (CPU)", for_cpu),
    ]


def apply_tier(config: Config, tier: Tier, explicit: Mapping[str, Any]) -> None:
    """Caps the width and splits the batch into micro-batches estimated to fit.

    The effective batch stays, and so do explicit values: an explicit accumulation is multiplied
    where the batch must be split, with a warning.
    """
    changes: dict[str, Any] = dict.fromkeys(GPU_SWITCHES if tier.name == "CPU" else (), False)
    if config.DIM > tier.dim:
        changes["DIM"] = tier.dim
    changes = {k: v for k, v in changes.items() if k not in explicit and v != getattr(config, k)}
    config.override(changes, f"tier {tier.name}")
    if not tier.memory or "BATCH_SIZE" in explicit:
        return

    # Halve the micro-batch until it is estimated to fit.
    # Parameters grow with dim^2 * sum(mults^2); dim 64 with mults 1,2,4,8 (sum 85) has 35.7 M.
    scale = (config.DIM / 64) ** 2 * sum(m * m for m in config.DIM_MULTS) / 85
    parameters = int(35_700_000 * scale)
    batch_size = config.BATCH_SIZE
    micro = batch_size
    accumulation = config.GRADIENT_ACCUMULATION
    estimate = partial(estimate_memory_gib, config.DIM, config.IMAGE_SIZE)
    while micro % 2 == 0 and estimate(micro, parameters, config.USE_AMP) > 0.8 * tier.memory:
        micro //= 2
    config.split_batch(micro, f"tier {tier.name}")
    if micro < batch_size and "GRADIENT_ACCUMULATION" in explicit:
        warnings.warn(
            f"batches of {batch_size} are estimated not to fit into {tier.memory:.0f} GiB; "
            f"continuing with {config.GRADIENT_ACCUMULATION} x {micro} instead of "
            f"{accumulation} x {batch_size} (effective batch {accumulation * batch_size})",
            FallbackWarning, stacklevel=3,
        )  # fmt: skip


def subclass_overrides(subclass: type[DDPMConfig]) -> dict[str, Any]:
    """Returns what a subclass, and any class between it and DDPMConfig, sets itself."""
    overrides: dict[str, Any] = {}
    for cls in reversed(subclass.__mro__):
        if issubclass(cls, DDPMConfig) and cls is not DDPMConfig:
            overrides |= {name: value for name, value in vars(cls).items() if name.isupper()}
    return DDPMConfig.current_names(overrides, warn=True)


def size_advice(config: DDPMConfig) -> str:
    """Returns sizes that fit DIM_MULTS, and the levels that fit the size."""
    size = config.IMAGE_SIZE
    mults = config.DIM_MULTS
    factor = 2 ** (len(mults) - 1)
    around = size // factor * factor, -(-size // factor) * factor
    sizes = " or ".join(str(each) for each in around if 4 <= each <= 1024)
    levels = next(n for n in range(len(mults), 0, -1) if size % 2 ** (n - 1) == 0)
    return f"Use --image_size {sizes}, or --dim_mults {','.join(map(str, mults[:levels]))}"


def validate(config: DDPMConfig) -> None:
    """Raises UserError if two values exclude each other."""
    levels = len(config.DIM_MULTS)
    factor = 2 ** (levels - 1)
    drops_label = config.GUIDANCE_MODE != "autoguidance"
    for is_bad, name, requirement in (
        (config.IMAGE_SIZE % factor, "IMAGE_SIZE",
         f"the {levels} levels of DIM_MULTS need a multiple of {factor}. {size_advice(config)}"),
        (config.DIM % 2, "DIM", "must be even"),  # sine and cosine of the timestep embedding
        (config.BETA_SCHEDULE == "linear" and config.TIMESTEPS < 21, "TIMESTEPS",
         "the linear BETA_SCHEDULE needs at least 21"),
        (config.SCHEDULE_BASE_SIZE > MAX_SCHEDULE_RATIO * config.IMAGE_SIZE, "SCHEDULE_BASE_SIZE",
         f"must be at most {MAX_SCHEDULE_RATIO} times IMAGE_SIZE, {config.IMAGE_SIZE}"),
        (config.SAMPLING_TIMESTEPS > config.TIMESTEPS, "SAMPLING_TIMESTEPS",
         f"must be at most TIMESTEPS, {config.TIMESTEPS}"),
        (drops_label and not config.CLASS_CONDITIONAL, "GUIDANCE_MODE",
         "needs --class_conditional"),
        (config.GUIDANCE_MIN_SIGMA > config.GUIDANCE_MAX_SIGMA, "GUIDANCE_MIN_SIGMA",
         f"must be at most GUIDANCE_MAX_SIGMA, {config.GUIDANCE_MAX_SIGMA}"),
        (drops_label and not config.LABEL_DROPOUT, "LABEL_DROPOUT",
         f"GUIDANCE_MODE {config.GUIDANCE_MODE} needs a network trained with label dropout"),
    ):  # fmt: skip
        if is_bad:
            raise UserError(f"{name} is {getattr(config, name)}, but {requirement}")
    for name in ("ATTENTION_HEADS", "ATTENTION_DIM"):
        numbers = len(getattr(config, name))
        if numbers not in (1, levels):
            raise UserError(f"{name} has {numbers} numbers, but must have 1 or {levels}")
    if not any(getattr(config, name) for name in RUN_LENGTH_SETTINGS):
        raise UserError("EPOCHS, MAX_STEPS and MINUTES are all 0. Set one of them")
