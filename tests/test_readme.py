"""The README's own Python, run as it is printed there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm_model import DDPMModel

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(mark: str) -> str:
    """The one Python block that contains `mark`."""
    (found,) = [text for text in BLOCKS if mark in text]
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a small trained-looking model in checkpoints/."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DDPMModel(image_size=16, dim=8, dim_mults=(1, 2)).save_model("checkpoints/ddpm_final.pt")
    return tmp_path


def execute(text: str) -> dict:
    names: dict = {}
    exec(compile(text, "README.md", "exec"), names)
    return names


def test_every_block_is_tested():
    marks = ["batch_generate", "class Stripes", "class BrighterAndDarker", "def restless_ddim", "class MyConfig"]
    assert sorted(BLOCKS) == sorted(block(mark) for mark in marks)


def test_inference_block(folder):
    names = execute(block("batch_generate").replace("total_samples=1000", "total_samples=3"))
    assert names["samples"].shape == (16, 3, 16, 16)
    assert names["way"].shape == (1, 15, 3, 16, 16)
    assert names["between"].shape == (10, 3, 16, 16)
    assert names["others"].shape == (4, 3, 16, 16)
    assert names["mended"].shape == (1, 3, 16, 16)
    assert names["many"].shape == (3, 3, 16, 16)


def test_custom_data_block(folder):
    names = execute(block("class Stripes"))
    assert names["images"].shape == (256, 3, 16, 16)
    assert (folder / "checkpoints" / "stripes" / "final.pt").exists()
    loaded = DDPMModel().load_model("checkpoints/ddpm_final.pt")
    assert loaded.architecture["image_size"] == 16 and loaded.architecture["dim"] == 16


def test_custom_model_block(folder):
    names = execute(block("class BrighterAndDarker"))
    model = names["BrighterAndDarker"](image_size=16, dim=8, dim_mults=(1, 2))
    x, t, noise = torch.rand(4, 3, 16, 16), torch.tensor([0, 300, 600, 900]), torch.randn(4, 3, 16, 16)
    assert torch.isfinite(model(x, t, noise)) and model(x, t, noise) != model(x, t, noise)


def test_custom_sampler_block(folder):
    names = execute(block("def restless_ddim"))
    assert names["images"].shape == (4, 3, 16, 16)
    plain = names["model"].sample(batch_size=4, sampler="ddim", steps=20, seed=0)
    assert not torch.equal(names["images"], plain)


def test_custom_configuration_block(folder):
    (folder / "my_config.py").write_text(block("class MyConfig"))
    (command,) = re.findall(r"^python (train\w*\.py --config my_config\.py:MyConfig.*)$", README, re.MULTILINE)
    script, *flags = command.split()
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *flags, "--dataset", "shapes"], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^DIM +48 +MyConfig$", result.stdout, re.MULTILINE)
    assert re.search(r"^BATCH_SIZE +16 +flag$", result.stdout, re.MULTILINE)


def test_every_script_that_the_readme_names_is_there():
    for name in set(re.findall(r"python (\w+\.py)", README)):
        assert (ROOT / name).exists(), name


def test_every_flag_that_the_readme_names_exists():
    from benchmark import SETTINGS as BENCHMARK
    from config import DDPMConfig
    from evaluate import OWN_SETTINGS
    from inference import FILES, SETTINGS

    known = {name.lower() for name in DDPMConfig.settings()} | {"resume", "config", "dry_run"}
    known |= {setting.alias.lower() for _, setting in DDPMConfig.settings().values()}
    known |= {name.lower() for name in SETTINGS} | {*FILES, "checkpoint", "from_png", "output_dir"}
    known |= {name.lower() for name in OWN_SETTINGS} | {"images", "inception_weights"}
    known |= {"quick", "only", "estimate", "readme", "memory", *map(str.lower, BENCHMARK)}
    known |= {"full", "dev", "check", "torch_index", "help"}
    known |= {"num_processes", "nproc_per_node", "logdir"}
    known |= {"multi_gpu", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "cpu"}  # accelerate
    known |= {"nnodes", "rdzv_backend", "rdzv_id", "rdzv_endpoint"}  # torchrun
    known |= {"nodes", "ntasks", "gpus", "cpus", "time", "signal"}  # Slurm
    for flag in set(re.findall(r"--(?:no-)?([a-z_]+)", README)):
        assert flag in known, flag
