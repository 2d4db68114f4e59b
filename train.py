"""Trains a diffusion model in fp32 with a constant learning rate; the rest as train_optimized.py.

    python train.py                                        CIFAR-10, or the built-in shapes
    python train.py --dataset folder --data_dir my_images --minutes 60
    python train.py --resume                               resumes the newest run
    python train.py --init_from my_run --dataset folder --data_dir more    starts from its weights

Ends with a sample grid in samples/<run>/ and a model in checkpoints/ddpm_final.pt.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.cli import Parser, import_from_file, run_script  # first: sets what torch reads

from config import Config, DDPMConfig, detect_tier, estimate_memory_gib, resolve, subclass_overrides
from ddpm_model import DDPMModel
from engine import checkpoints, distributed, plots
from engine.checkpoints import TrainingCheckpoint
from engine.dataloader import ImageDataset
from engine.datasets import check_stored, choose_default_dataset, load_dataset, placeholder
from engine.denoiser import GUIDANCE_OPTIONS
from engine.errors import FallbackWarning, UserError
from engine.gpu_memory import cap_memory
from engine.image_source import ReadOptions
from engine.micro_batch import find_micro_batch
from engine.settings import suggest
from engine.trackers import check_installed
from engine.trainer import estimate, train

# Of the architecture, what --init_from may change: nothing that gives the weights of the network
# another meaning, except the classes, whose embedding starts anew.
MUTABLE_ON_INIT = {
    *GUIDANCE_OPTIONS, "image_size", "sampling_timesteps", "loss_weighting", "min_snr_gamma",
    "p_mean", "schedule_base_size", "dropout", "class_counts", "consistency",
}  # fmt: skip
KEPT_IN_TUNING = (
    *GUIDANCE_OPTIONS, "schedule_base_size", "loss_weighting", "min_snr_gamma", "p_mean",
)  # fmt: skip
DEFAULTS_NOTE = (
    "Defaults shown are those before presets and the GPU's tier; --dry_run shows what a run gets."
)
DEFAULTS = {"LR_SCHEDULE": "constant"}


def main(
    description: str | None = __doc__, defaults: Mapping[str, Any] = DEFAULTS,
    model_class: type[DDPMModel] = DDPMModel, tuning: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Runs a training script, which differs from the others in its defaults only.

    tuning: of a script that tunes a trained model, the settings that replace those of its run.
    """
    # Configuration: flags, the run to resume or the model to start from, data set and GPU.
    request = parse_command_line(description, defaults, tuning=tuning)
    checkpoint = checkpoints.load_training(request.resume) if request.resume else None
    init_model = None
    if request.init_from:
        # lucidrains' checkpoints do not store their image size.
        init_model = DDPMModel.from_file(request.init_from, request.explicit.get("IMAGE_SIZE"))
    config = configure(request, checkpoint, init_model)
    check_installed(config.LOG_WITH)

    # Data, and what was found in the images, for a resumed run and for input images.
    data = load_training_data(config, request.dry_run)
    found = {"CHANNELS": data.images.shape[1], **data.read_as}
    config.override({k: v for k, v in found.items() if v != getattr(config, k)}, "data")
    if tuning is not None:
        config.override({"GUIDE_FRACTION": 0.0}, "tuning")  # a tuned model is not guided

    # Model, and training or an estimate of it.
    with distributed.session(lambda: "Start it again") as dist:
        model = model_class.from_config(config, data.class_counts)
        if init_model:
            init_weights(model, init_model, request.init_from)
        elif checkpoint:
            with checkpoints.refuse_damaged(checkpoint.path):
                # Empty, so that its memory and time are counted; train() loads the weights.
                model.add_teacher(checkpoint.state["model"])
        is_cuda = dist.device.type == "cuda"
        if config.AUTO_MICRO_BATCH and is_cuda and dist.num_processes == 1:
            config.split_batch(find_micro_batch(model, config, data.images))
        if dist.is_main_process:
            names = [*model.state_dict(), *(checkpoint.state["ema"] if checkpoint else ())]
            has_weaker = any(name.startswith(("guide.", "teacher.")) for name in names)
            warn_of_unused(
                request.explicit, config, is_cuda, dist.num_processes,
                has_weaker=has_weaker, is_tuning=tuning is not None,
            )  # fmt: skip
        if not request.dry_run:
            train(model, data, config, checkpoint)
        elif dist.is_main_process:
            # Of the 20 bytes that the estimate gives each parameter, a frozen one takes 4.
            parameters = sum(p.numel() // (1 if p.requires_grad else 5) for p in model.parameters())
            memory = estimate_memory_gib(
                config.DIM, config.IMAGE_SIZE, config.BATCH_SIZE, parameters, config.USE_AMP
            )
            print(f"{config.table()}\n\n{estimate(model, len(data), config, memory)}")


def load_training_data(config: Config, dry_run: bool) -> ImageDataset:
    """Loads a configuration's data set; in a dry run only its numbers, where these are known.

    Rank 0 fetches and decodes before the process group exists; the others read the cache.
    """
    known = (config.DATASET, config.IMAGE_SIZE, config.CLASS_CONDITIONAL, config.CHANNELS)
    if dry_run and (data := placeholder(*known)) is not None:
        return data
    return distributed.rank0_first("data", lambda: load_dataset(
        config.DATASET, config.IMAGE_SIZE, Path(config.DATA_DIR), workers=config.NUM_WORKERS,
        progress=distributed.launched_rank() == 0, upsampling=config.USE_UPSAMPLING,
        options=ReadOptions.from_config(config.as_dict()), use_labels=config.CLASS_CONDITIONAL,
    ))  # fmt: skip


@dataclass(frozen=True)
class TrainingRequest:
    """What a training script was asked to do; data set, GPU and checkpoint do not count yet."""

    defaults: Mapping[str, Any]  # of the script, where they are not DDPMConfig's
    subclass: type[DDPMConfig] | None
    flags: Mapping[str, Any]
    resume: Path | None  # the checkpoint
    dry_run: bool
    init_from: Path | None = None  # the checkpoint whose EMA weights a new run starts from
    tuning: Mapping[str, Any] | None = None  # as in main

    @property
    def explicit(self) -> dict[str, Any]:
        """What the subclass and the flags set."""
        return {**(subclass_overrides(self.subclass) if self.subclass else {}), **self.flags}

    def setting(self, name: str, earlier_run: Mapping[str, Any] | None) -> Any:
        """Returns a setting: of flags, subclass, earlier_run or defaults, in this order.

        Not for settings that presets or the tier choose. earlier_run: settings to continue with.
        """
        base = DDPMConfig.current_names(earlier_run) if earlier_run else self.defaults
        values = {**DDPMConfig.values(), **base, **self.explicit}
        return DDPMConfig.settings()[name].check(name, values[name])


def parse_command_line(
    description: str | None, defaults: Mapping[str, Any], argv: Sequence[str] | None = None,
    tuning: Mapping[str, Any] | None = None,
) -> TrainingRequest:  # fmt: skip
    """Parses a training script's command line.

    defaults, tuning: as in main; with tuning, --checkpoint names the model, by default the newest.
    """
    # Flags of this script, and one for each setting.
    parser = Parser(f"{description or ''}\n{DEFAULTS_NOTE}")
    parser.add_argument("--config", metavar="FILE.py:CLASS", help="a subclass of DDPMConfig")
    parser.add_argument(
        "--dry_run", action="store_true",
        help="print each setting, the work and the time a run would take; train nothing",
    )  # fmt: skip
    parser.add_argument(
        "--resume", nargs="?", const="newest", metavar="CHECKPOINT",
        help="resume a run: a checkpoint, a run's folder or name; without a value, the newest run",
    )  # fmt: skip
    init_flag = "init_from" if tuning is None else "checkpoint"
    init_help = "start a new run from the EMA weights of a run, .pt or .safetensors, on any data"
    if tuning is not None:
        init_help = "the model to tune (default: the newest checkpoint)"
    parser.add_argument(f"--{init_flag}", dest="init_from", metavar="CHECKPOINT", help=init_help)
    DDPMConfig.add_flags(parser, defaults if tuning is None else tuning)

    # Flags that exclude each other; files that they name.
    options = parser.parse_args(argv)
    flags = DDPMConfig.given(options)
    for name, is_given in (("run_name", "RUN_NAME" in flags), (init_flag, options.init_from)):
        if options.resume is not None and is_given:
            raise UserError(f"--{name} is for a new run and --resume continues one. Choose one")
    subclass = load_subclass(options.config) if options.config else None
    resume = None
    init_from = None
    if options.resume is not None:
        resume = find_checkpoint("resume", options.resume)
    elif options.init_from is not None or tuning is not None:
        init_from = find_checkpoint(init_flag, options.init_from)
    return TrainingRequest(defaults, subclass, flags, resume, options.dry_run, init_from, tuning)


def find_checkpoint(flag: str, reference: str | None) -> Path:
    """Returns the checkpoint that a flag's value means, on all ranks what rank 0 finds."""
    resolve = partial(checkpoints.resolve_checkpoint, reference, f"--{flag}")
    return Path(distributed.from_rank0(flag, lambda: str(resolve())))


def load_subclass(reference: str) -> type[DDPMConfig]:
    """Returns the class that `file.py:Class` names, which must derive from DDPMConfig."""
    module, name = import_from_file(reference, "--config", "my_config.py:MyConfig")
    subclasses = {
        k: v for k, v in vars(module).items()
        if isinstance(v, type) and issubclass(v, DDPMConfig) and v is not DDPMConfig
    }  # fmt: skip
    if name not in subclasses:
        missing = f"no subclass of DDPMConfig named {name}{suggest(name, subclasses)}"
        raise UserError(f"{module.__file__} has {missing}")
    return subclasses[name]


def configure(
    request: TrainingRequest, checkpoint: TrainingCheckpoint | None,
    init_model: DDPMModel | None = None,
) -> Config:  # fmt: skip
    """Resolves the configuration; also caps the GPU's memory, and looks for data sets on the disk.

    init_model: the model of --init_from, whose network and noise schedule the new run has. A
    tuning run has all other settings of that model's run, too.
    """
    # The settings to continue with, if any: of the run to resume, or of the one to tune.
    is_tuning = request.tuning is not None
    earlier_run = checkpoint.state["config"] if checkpoint else None
    if checkpoint and checkpoint.state["architecture"].get("consistency", False) != is_tuning:
        advice = "Resume it with train_consistency.py"
        if is_tuning:
            advice = "Resume it with the script that trained it, or tune it with --checkpoint"
        raise UserError(f"{checkpoint.path} was not written by this script. {advice}")
    if init_model and is_tuning:
        if init_model.is_consistency_tuned:
            advice = "Name the model to tune with --checkpoint, or continue with --resume"
            raise UserError(f"{request.init_from} is tuned already. {advice}")
        earlier_run = init_model.training_info["config"] or None

    # The GPU, and with it the data set.
    if max_memory := request.setting("MAX_MEMORY_GIB", earlier_run):
        cap_memory(max_memory)
    tier = detect_tier()
    dataset = choose_dataset(request, earlier_run, has_gpu=tier.name != "CPU")

    # What the model to start from requires.
    required = None
    if init_model:
        if init_model.channels not in plots.FILE_CHANNELS:
            reason = f"is of {init_model.channels} channels, but image files have 1, 3 or 4"
            raise UserError(f"{request.init_from} {reason}. Use another model")
        # The model's own size, unless another is named.
        image_size = request.setting("IMAGE_SIZE", {"IMAGE_SIZE": init_model.image_size})
        required = network_settings(init_model.architecture, image_size)
        if is_tuning:
            required |= {
                **{name.upper(): init_model.architecture[name] for name in KEPT_IN_TUNING},
                "GUIDANCE_MODE": init_model.guidance_mode,
                "CLASS_CONDITIONAL": bool(init_model.class_names), **request.tuning,
            }  # fmt: skip
    return resolve(
        dataset, tier, request.defaults, request.subclass, request.flags, earlier_run, required
    )


def choose_dataset(
    request: TrainingRequest, earlier_run: Mapping[str, Any] | None, has_gpu: bool
) -> str:
    """Returns the data set to train on, on all ranks what rank 0 finds.

    earlier_run: settings to continue with. Raises UserError for a folder without a data set.
    """
    dataset = request.setting("DATASET", earlier_run)
    if dataset == "auto" and request.tuning is not None and request.init_from:
        # On other data than it was trained on, the model would be ruined.
        if request.init_from.resolve().parent != checkpoints.PRETRAINED_DIR:
            raise UserError(f"{request.init_from} does not name its training images. Add --dataset")
        dataset = "cifar10"
    data_dir = Path(request.setting("DATA_DIR", earlier_run))
    is_named = request.explicit.get("DATASET", "auto") != "auto"
    if "DATA_DIR" in request.explicit and not is_named and not earlier_run:
        default = "cifar10" if dataset == "auto" else dataset
        distributed.rank0_first("data_dir", lambda: check_stored(default, data_dir))
    if dataset == "auto":
        may_download = not request.dry_run
        dataset = distributed.from_rank0(
            "dataset", lambda: choose_default_dataset(data_dir, has_gpu, may_download)
        )
    return dataset


def warn_of_unused(
    explicit: Mapping[str, Any], config: DDPMConfig, is_cuda: bool, num_processes: int,
    has_weaker: bool = False, is_tuning: bool = False,
) -> None:  # fmt: skip
    """Warns of explicit settings that have no effect in this run.

    has_weaker: whether there is a guide already, or in a tuning run a teacher.
    """
    if not is_tuning:
        has_weaker |= 0 < config.GUIDE_FRACTION < 1 or config.GUIDANCE_MODE == "cfg"
    has_files = config.DATASET.startswith(("folder", "hf:"))
    has_frames = has_files and config.FRAMES == explicit.get("FRAMES")
    needs_weaker = "is for guide_fraction between 0 and 1, or guidance_mode cfg"
    if is_tuning:
        needs_weaker = "is for tuning with a teacher"
    has_data_dir = config.DATASET != "shapes" and not config.DATASET.startswith("hf:")
    for name, is_used, use in (
        ("AUTO_MICRO_BATCH", is_cuda and num_processes == 1, "is for a single GPU"),
        ("CUDA_GRAPH", is_cuda, "is for a GPU"),
        ("LABEL_DROPOUT", config.CLASS_CONDITIONAL, "is for class_conditional"),
        ("LOSS_WEIGHTING", not is_tuning, "is not for tuning"),
        ("GUIDE_FRACTION", not is_tuning, "is not for tuning"),
        ("DATA_DIR", has_data_dir, "is not for shapes, which are drawn, nor for hf: data sets"),
        ("MIN_SNR_GAMMA", config.LOSS_WEIGHTING == "min_snr", "is for loss_weighting min_snr"),
        ("P_MEAN", is_tuning or config.LOSS_WEIGHTING == "edm", "is for loss_weighting edm"),
        ("P_MEAN", not is_tuning, "is not for tuning"),
        ("VALUE_RANGE", has_files and config.VALUE_RANGE, "is for images of more than 8 bits"),
        ("FRAMES", has_frames, "is for files of several frames"),
        ("KEEP", config.CHECKPOINT_EVERY is None, "is for runs without checkpoint_every"),
        ("GUIDANCE", has_weaker or config.GUIDANCE == 1, needs_weaker),
        *((name.upper(), has_weaker, needs_weaker) for name in GUIDANCE_OPTIONS[1:]),
    ):
        if explicit.get(name) and not is_used:
            line = f"{name.lower()} {use}; continuing without it"
            warnings.warn(line, FallbackWarning, stacklevel=2)


def network_settings(architecture: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Returns the settings that build the network of an architecture, at some size."""
    sizes = [image_size // 2**level for level in range(len(architecture["dim_mults"]))]
    full = [size for size, is_full in zip(sizes, architecture["full_attn"], strict=True) if is_full]
    return {
        "IMAGE_SIZE": image_size, "CHANNELS": architecture["channels"], "DIM": architecture["dim"],
        "DIM_MULTS": tuple(architecture["dim_mults"]),
        "ATTENTION_HEADS": tuple(architecture["attn_heads"]),
        "ATTENTION_DIM": tuple(architecture["attn_dim_head"]),
        "FULL_ATTENTION_MAX_SIZE": max(full, default=0), "OBJECTIVE": architecture["objective"],
        "TIMESTEPS": architecture["timesteps"], "BETA_SCHEDULE": architecture["beta_schedule"],
    }  # fmt: skip


def init_weights(model: DDPMModel, init_model: DDPMModel, path: Path) -> None:
    """Copies the network of another model; raises UserError if it is another kind."""
    architectures = init_model.architecture, model.architecture
    advice = "Drop the flag that says so"
    checkpoints.check_architecture(path, *architectures, MUTABLE_ON_INIT, advice)
    with checkpoints.refuse_damaged(path, "has another network than --init_from can start from"):
        model.start_from(init_model)
    distributed.print0(f"starting from the EMA weights of {path}")


if __name__ == "__main__":
    run_script(main)
