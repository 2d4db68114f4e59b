"""Trains a diffusion model in plain fp32, no optimizations: the reference script.

    python train.py                                        CIFAR-10, or the built-in shapes
    python train.py --dataset folder --data_dir my_images --epochs 100
    python train.py --resume                               resumes the newest run

Ends with a sample grid in samples/<run>/ and a model in checkpoints/ddpm_final.pt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.cli import Parser, import_from_file, run_script

from config import Config, DDPMConfig, detect_tier, estimate_memory_gib, resolve, subclass_overrides
from ddpm_model import DDPMModel
from engine import checkpoints, distributed
from engine.checkpoints import TrainingCheckpoint
from engine.datasets import choose_default_dataset, load_dataset, placeholder
from engine.errors import UserError
from engine.gpu_memory import cap_memory
from engine.image_source import ReadOptions
from engine.micro_batch import find_micro_batch
from engine.settings import suggest
from engine.trackers import check_installed
from engine.trainer import estimate, train

DEFAULTS = {"USE_AMP": False, "COMPILE_MODEL": False, "LR_SCHEDULE": "constant"}


def main(description: str | None = __doc__, defaults: Mapping[str, Any] = DEFAULTS) -> None:
    """Runs a training script, which differs from the others in its defaults only."""
    # Configuration: flags, checkpoint, data set and GPU.
    request = parse_command_line(description, defaults)
    checkpoint = checkpoints.load_training(request.resume) if request.resume else None
    config = configure(request, checkpoint)
    check_installed(config.LOG_WITH)

    # Data: rank 0 fetches and decodes before the process group exists, the others read the cache.
    data = None
    if request.dry_run:
        data = placeholder(config.DATASET, config.IMAGE_SIZE, config.CLASS_CONDITIONAL)
    if data is None:
        data = distributed.rank0_first("data", lambda: load_dataset(
            config.DATASET, config.IMAGE_SIZE, Path(config.DATA_DIR), workers=config.NUM_WORKERS,
            progress=distributed.launched_rank() == 0, upsampling=config.USE_UPSAMPLING,
            options=ReadOptions.from_config(config.as_dict()),
            use_labels=config.CLASS_CONDITIONAL,
        ))  # fmt: skip
    if not config.CHANNELS:
        config.override({"CHANNELS": data.images.shape[1]}, "data")
    make_model = partial(DDPMModel.from_config, classes=data.classes)

    with distributed.session(lambda: "start it again") as dist:
        model = make_model(config)
        if config.AUTO_MICRO_BATCH and dist.device.type == "cuda" and dist.num_processes == 1:
            config.split_batch(find_micro_batch(make_model, config, data.images))
        if not request.dry_run:
            train(model, data, config, checkpoint)
        elif dist.is_main_process:
            count = sum(p.numel() for p in model.parameters())
            shape = config.DIM, config.IMAGE_SIZE, config.BATCH_SIZE
            memory = estimate_memory_gib(*shape, count, config.USE_AMP)
            print(f"{config.table()}\n\n{estimate(model, len(data), config, memory)}")


@dataclass(frozen=True)
class TrainingRequest:
    """What a training script was asked to do, before data set, GPU and checkpoint are looked at."""

    script: Mapping[str, Any]  # values that the script sets by default
    subclass: type[DDPMConfig] | None
    flags: Mapping[str, Any]
    resume: Path | None  # the checkpoint
    dry_run: bool

    def value(self, name: str, checkpoint: Mapping[str, Any] | None) -> Any:
        """Returns the value of a setting that no preset or tier sets. checkpoint: its config."""
        base = DDPMConfig.current_names(checkpoint) if checkpoint else self.script
        overrides = subclass_overrides(self.subclass) if self.subclass else {}
        values = {**DDPMConfig.values(), **base, **overrides, **self.flags}
        return DDPMConfig.settings()[name].check(name, values[name])


def parse_command_line(
    description: str | None, script: Mapping[str, Any], argv: Sequence[str] | None = None
) -> TrainingRequest:
    """Parses a training script's command line. script: the values it sets by default."""
    parser = Parser(description)
    parser.add_argument("--config", metavar="FILE.py:CLASS", help="a subclass of DDPMConfig")
    parser.add_argument(
        "--dry_run", action="store_true",
        help="print each setting, the work and the time a run would take; train nothing",
    )  # fmt: skip
    parser.add_argument(
        "--resume", nargs="?", const="newest", metavar="CHECKPOINT",
        help="resume a run: a checkpoint, a run's folder or name; without a value, the newest run",
    )  # fmt: skip
    DDPMConfig.add_flags(parser, script)
    options = parser.parse_args(argv)
    flags = DDPMConfig.given(options)
    if options.resume is not None and "RUN_NAME" in flags:
        raise UserError("--run_name is for a new run and --resume continues one: choose one")
    subclass = load_subclass(options.config) if options.config else None
    resume = None if options.resume is None else checkpoints.resolve_checkpoint(options.resume)
    return TrainingRequest(script, subclass, flags, resume, options.dry_run)


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


def configure(request: TrainingRequest, checkpoint: TrainingCheckpoint | None) -> Config:
    """Resolves the configuration on this machine; caps its GPU memory and chooses a data set."""
    resumed = checkpoint.config if checkpoint else None
    if max_memory := request.value("MAX_MEMORY_GIB", resumed):
        cap_memory(max_memory)
    tier = detect_tier()

    dataset = request.value("DATASET", resumed)
    if dataset == "auto":
        where = Path(request.value("DATA_DIR", resumed)), tier.name != "CPU", not request.dry_run
        dataset = distributed.from_rank0("dataset", lambda: choose_default_dataset(*where))
    return resolve(dataset, tier, request.script, request.subclass, request.flags, resumed)


if __name__ == "__main__":
    run_script(main)
