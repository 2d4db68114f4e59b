"""setup.py, run as users and packaging tools run it; nothing here needs a network."""

import os
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from tests.helpers import ROOT


def run_setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs the setup.py of a folder with pip cut off from every index."""
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with setup.py and a requirement that exists nowhere."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "requirements.txt").write_text("tqdm>=4\nno-such-distribution>=1.0\n")
    (tmp_path / "requirements-dev.txt").write_text("-r requirements.txt\npytest>=1000\n")
    return tmp_path


@pytest.fixture
def module(copy: Path):
    """The copied setup.py as a module."""
    spec = util.spec_from_file_location("machine_setup", copy / "setup.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_check_reports_packages_and_machine():
    result = run_setup(ROOT, "--check")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert rows["torch"] == metadata.version("torch")
    assert {"Python", "denoising-diffusion-pytorch", "GPU", "tier"} <= rows.keys()


def test_check_reports_missing_and_old_packages(copy: Path):
    result = run_setup(copy, "--check", "--dev")
    assert result.returncode == 1
    assert "Missing, too old or too new: no-such-distribution, pytest." in result.stdout
    assert f"{metadata.version('pytest')} is older than 1000" in result.stdout
    assert "setup.py --dev" in result.stdout
    assert not (copy / "checkpoints").exists()


def test_check_reports_packages_that_are_too_new(copy: Path):
    (copy / "requirements.txt").write_text("tqdm >= 4, < 4.1  # the API changed\n")
    result = run_setup(copy, "--check")
    assert result.returncode == 1
    assert "Missing, too old or too new: tqdm." in result.stdout
    assert f"{metadata.version('tqdm')} is too new, must be older than 4.1" in result.stdout


def test_check_accepts_versions_within_bounds(copy: Path):
    (copy / "requirements.txt").write_text("tqdm>=4,<1000\n-r more.txt\n")
    (copy / "more.txt").write_text("no-such-distribution>=1,<2\n")
    result = run_setup(copy, "--check")
    assert "Missing, too old or too new: no-such-distribution." in result.stdout


def test_check_reports_packages_that_do_not_import(copy: Path):
    (copy / "requirements.txt").write_text("tqdm\ntorch>=2.6,<3\n")
    (copy / "torch.py").write_text("import nothing")
    (copy / "tqdm.py").write_text("raise RuntimeError('operator does not exist')\n")
    result = run_setup(copy, "--check", "--torch_index", "https://example.org/cpu")
    assert result.returncode == 1
    assert "does not import: RuntimeError: operator does not exist" in result.stdout
    assert "pip install --force-reinstall tqdm\n" in result.stdout
    index = "--index-url https://example.org/cpu"
    assert f"pip install --force-reinstall {index} 'torch>=2.6,<3'" in result.stdout


def test_install_failure_prints_command_and_reason(copy: Path):
    result = run_setup(copy)
    assert result.returncode == 1
    message = result.stderr.partition("this command failed:")[2]
    assert "-m pip install" in message
    assert "No matching distribution found for no-such-distribution" in message
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [["egg_info"], ["bdist_wheel", "-d", "dist"], ["--version"], ["--chekc"]]
)
def test_main_rejects_packaging_commands_and_unknown_flags(copy: Path, arguments: list[str]):
    result = run_setup(copy, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert arguments[0] in result.stderr and "pip install -r requirements.txt" in result.stderr
    assert not (copy / "checkpoints").exists()


def test_install_without_missing_packages_starts_no_pip(module, copy: Path, monkeypatch, capsys):
    (copy / "requirements.txt").write_text("tqdm>=4  # any\n")
    monkeypatch.setattr(module, "run", lambda command: pytest.fail(f"started {command}"))
    module.install(copy / "requirements.txt", torch_index=None)
    assert "already installed" in capsys.readouterr().out


def test_install_uses_torch_index_first_and_once(module, copy: Path, monkeypatch):
    (copy / "requirements.txt").write_text("torch>=2.6\ntorchvision>=0.21,<1\n")
    versions = {"torch": "2.6.0+cu124", "torchvision": "0.21.0+cu124"}
    commands = []
    monkeypatch.setattr(module.metadata, "version", versions.get)
    monkeypatch.setattr(module, "run", commands.append)
    module.install(copy / "requirements.txt", torch_index="https://example.org/whl/cu124/")
    assert commands == []
    module.install(copy / "requirements.txt", torch_index="https://example.org/whl/cpu")
    assert [command[-4:] for command in commands] == [
        ["--index-url", "https://example.org/whl/cpu", "torch>=2.6", "torchvision>=0.21,<1"]
    ]


def test_main_uses_a_virtual_environment_if_python_is_managed(module, copy: Path, monkeypatch):
    (copy / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(copy))
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--dev"])
    commands = []

    def run_inside(command: list[str]) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module, "run", commands.append)
    monkeypatch.setattr(module.subprocess, "run", run_inside)
    assert module.main() == 0
    python = copy / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    assert commands == [
        [sys.executable, "-m", "venv", str(copy / ".venv")],
        [str(python), "setup.py", "--dev"],
    ]
