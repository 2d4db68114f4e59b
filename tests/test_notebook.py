"""notebooks/quickstart.ipynb: its cells run from top to bottom; they hold no outputs."""

import json
import re

import torch

from config import CPU_PRESETS
from ddpm_model import DDPMModel
from engine import checkpoints, datasets
from tests.helpers import ROOT

NOTEBOOK = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TOY = {
    "IMAGE_SIZE": 8, "DIM": 8, "DIM_MULTS": (1, 2), "BATCH_SIZE": 16, "NUM_SAMPLE_GRIDS": 1,
    "SAMPLING_TIMESTEPS": 3, "WARMUP_STEPS": 1, "GRID_IMAGES": 4,
}  # fmt: skip


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    # At toy size, in a folder like the repository's, without the shell's lines.
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(checkpoints, "PRETRAINED_DIR", tmp_path)
    pretrained = DDPMModel(
        image_size=8, dim=8, dim_mults=(1, 2), class_counts={"cat": 1, "horse": 1}
    )
    pretrained.save_model(tmp_path / "cifar10.safetensors")
    monkeypatch.setitem(CPU_PRESETS, "shapes", TOY)
    monkeypatch.setattr(datasets, "SHAPES_COUNT", 128)
    names = {}
    for cell in CODE:
        source = re.sub(r'"MINUTES": [\d.]+', '"MAX_STEPS": 3', "".join(cell["source"]))
        exec(re.sub(r"^( *)[!%].*", r"\1pass", source, flags=re.M), names)

    assert names["checkpoint"].resolve().is_relative_to(tmp_path / "checkpoints")
    assert names["images"].shape == (36, 3, 8, 8) and names["trajectory"].shape == (4, 3, 8, 8)
    assert [row.shape[0] for row in names["rows"]] == [3, 3, 3, 3]
    assert not torch.equal(names["rows"][0], names["rows"][1])


def test_notebook_holds_no_outputs():
    assert CODE and all(not c["outputs"] and c["execution_count"] is None for c in CODE)
