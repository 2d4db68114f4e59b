"""Models as folders with a card, here and on the Hugging Face Hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from engine import checkpoints, plots
from engine.errors import UserError, type_and_message

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GRID_FILE = "samples.png"
GRID_IMAGES = 16
LOCAL_SETTINGS = ("DATA_DIR", "RUN_NAME")

CARD = """\
---
license: {license}
pipeline_tag: unconditional-image-generation
tags:
- diffusion
- ddpm
---

# {name}

![Samples of seeds 0 to {last_seed}, not selected]({grid_file})

*Seeds 0 to {last_seed}, not selected.*

A pixel-space diffusion model of {size} px images with {parameters:.1f} M parameters{classes}.

```python
from ddpm_model import DDPMModel

model = DDPMModel.from_pretrained("{name}")
images = model.sample(batch_size=16, seed=0)  # floats in [0, 1], {shape}
```

## Scores

{scores}

## Recipe

{recipe}
"""


class HubMixin:
    """Methods that save and load a model as a folder, or as a repository of the Hub."""

    architecture: dict[str, Any]
    training_info: dict[str, dict[str, Any]]
    class_names: tuple[str, ...]
    image_size: int
    unet: nn.Module

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "HubMixin":
        """Loads an included model, a folder that save_pretrained wrote, or one of the Hub.

        name: `cifar10`, a path, or `user/name`. Only .safetensors and JSON are read. Raises
        UserError if there is no such model, or the Hub cannot be reached.
        """
        weights = find_pretrained(str(name))
        model = cls.from_file(weights).eval()
        config = weights.with_name(CONFIG_FILE)
        if config.is_file():
            model.training_info = read_training_info(config)
            cls.check_types(config, {}, model.training_info)
        return model

    def save_pretrained(
        self, folder: str | Path, license: str = "mit", figures: Mapping[str, Any] = {}
    ) -> None:
        """Writes weights, config.json, a grid of samples and a model card, README.md.

        figures: further scores in the card's table, e.g. {"FID (50,000 samples)": 2.73}.
        """
        folder = Path(folder)
        self._save(folder, folder.resolve().name, license, figures)

    def push_to_hub(
        self, repo_id: str, private: bool = False, license: str = "mit",
        figures: Mapping[str, Any] = {},
    ) -> str:  # fmt: skip
        """Uploads what save_pretrained writes to the Hub and returns the model's address.

        repo_id: `user/name`, created if missing. Raises UserError if the Hub refuses.
        """
        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder:
            self._save(Path(folder), repo_id, license, figures)
            try:
                api = HfApi()
                api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message="Upload model"
                )
            except Exception as error:  # of HTTP, of the Hub, of the name
                advice = "Check the name, and log in with `hf auth login`"
                message = f"{repo_id} cannot be uploaded ({type_and_message(error)}). {advice}"
                raise UserError(message) from error
        return f"{api.endpoint}/{repo_id}"

    def _save(self, folder: Path, name: str, license: str, figures: Mapping[str, Any]) -> None:
        """Writes the folder of a model that is called `name`."""
        training_info = without_local_settings(self.training_info)
        config = {"architecture": self.architecture, "training_info": training_info}
        images = self.sample(GRID_IMAGES, seed=0)

        self.save_model(folder / WEIGHTS_FILE)
        checkpoints.write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        shown = images if self.channels in plots.FILE_CHANNELS else images[:, :1]  # as gray
        plots.save_image(plots.grid(shown.cpu()), folder / GRID_FILE)
        text = CARD.format(
            license=license, name=name, last_seed=GRID_IMAGES - 1, grid_file=GRID_FILE,
            size=self.image_size, shape=tuple(images.shape),
            parameters=sum(p.numel() for p in self.unet.parameters()) / 1e6,
            classes=f" and the classes {', '.join(self.class_names)}" if self.class_names else "",
            scores=score_table(training_info["progress"], figures),
            recipe=format_recipe(self.architecture, **training_info),
        )  # fmt: skip
        checkpoints.write_text(folder / "README.md", text)


def without_local_settings(
    training_info: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Returns a copy of training_info without run and paths of this machine."""
    config = {k: v for k, v in training_info["config"].items() if k not in LOCAL_SETTINGS}
    prefix, _, path = str(config.get("DATASET", "")).partition(":")
    if Path(path).is_absolute():
        config["DATASET"] = f"{prefix}:{Path(path).name}"
    return {"config": config, "progress": dict(training_info["progress"])}


def score_table(progress: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """Returns the validation loss and further scores as a Markdown table."""
    best = progress.get("best")
    known = {} if best is None else {"validation loss (weighted, EMA weights)": f"{best:.4f}"}
    rows = [f"| {name} | {value} |" for name, value in {**known, **scores}.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows]) if rows else "None were measured."


def format_recipe(
    architecture: Mapping[str, Any], config: Mapping[str, Any], progress: Mapping[str, Any]
) -> str:
    """Returns what a model is and how it was trained, as Markdown."""
    text = ""
    if {"step", "images", "seconds"} <= progress.keys():
        images = progress["images"]
        minutes = progress["seconds"] / 60
        text = f"{progress['step']:,} steps on {images:,} images in {minutes:.1f} minutes.\n\n"
    settings = "\n".join(f"{name:24} {value}" for name, value in (config or architecture).items())
    return f"{text}```\n{settings}\n```"


def find_pretrained(name: str) -> Path:
    """Returns the weights of an included model, a folder or a repository of the Hub."""
    included = checkpoints.PRETRAINED_DIR / f"{name}.safetensors"
    if included.is_file() and Path(name).name == name:  # a path may lead to another file
        return included
    if Path(name).is_dir():
        weights = Path(name) / WEIGHTS_FILE
        if not weights.is_file():
            advice = "Load another file with from_file"
            raise UserError(f"no checkpoint {weights}: not a folder of save_pretrained. {advice}")
        return weights
    if Path(name).is_file():
        raise UserError(f"{name} is a file. Load it with from_file")
    if name.count("/") == 1:
        return download(name)
    known = sorted(file.stem for file in checkpoints.PRETRAINED_DIR.glob("*.safetensors"))
    choices = f"{', '.join(known)}, a folder, or user/name of the Hugging Face Hub"
    raise UserError(f"unknown pretrained model {name}; choose from {choices}")


def download(repo_id: str) -> Path:
    """Downloads a model from the Hub, if this version of it is not there yet."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(repo_id, CONFIG_FILE)
        return Path(hf_hub_download(repo_id, WEIGHTS_FILE))
    except Exception as error:  # of HTTP, of the Hub, of the name
        advice = "Check its name; a private model needs `hf auth login`"
        reason = type_and_message(error)
        where = "not found on the Hugging Face Hub, or the Hub cannot be reached"
        raise UserError(f"no folder {repo_id}, and {where} ({reason}). {advice}") from error


def read_training_info(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the training_info of a config.json; raises UserError if it has none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["training_info"]
        return {name: dict(stored[name]) for name in ("config", "progress")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or not of this project") from error
