"""Several processes on one machine, talking through gloo: they compute what one computes, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import inference
from config import detect_tier, resolve
from ddpm_model import DDPMModel
from engine.errors import UserError
from engine.processes import join
from engine.sources import load_images
from engine.step import Step
from engine.training import train
from tests.test_step import SETTINGS
from tests.test_training import ROOT, largest_difference

FLAGS = {"IMAGE_SIZE": 8, "DIM": 8, "DIM_MULTS": (1, 2), "BATCH_SIZE": 32, "WARMUP_STEPS": 5, "LR_SCHEDULE": "constant"}
FLAGS |= {"SAMPLING_TIMESTEPS": 4, "NUM_SAMPLES": 4, "SAMPLE_GRIDS": 2}  # no dropout, whose masks differ by process
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs the processes do not talk through gloo")


def start(folder: Path, arguments: list[str], **environment: str) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(arguments, cwd=folder, env=environment, text=True, **pipes)


def torchrun(folder: Path, script: str, *arguments: str, count: int = 2) -> subprocess.Popen:
    """`count` processes of a script in the folder, or else of the repository."""
    path = folder / script if (folder / script).exists() else ROOT / script
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return start(folder, [*launcher, str(path), *arguments])


def finish(process: subprocess.Popen) -> str:
    """What a process that ends well prints."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    return output


def train_with_two(*arguments: str) -> subprocess.Popen:
    flags = []
    for name, value in FLAGS.items():
        flags += [f"--{name.lower()}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return torchrun(Path.cwd(), "train.py", "--dataset", "shapes", *flags, *arguments)


def train_alone(max_steps: int, resume: str = "", run_name: str = "") -> None:
    config = resolve("shapes", detect_tier(), flags=FLAGS | {"MAX_STEPS": max_steps, "RUN_NAME": run_name})
    path = Path("checkpoints") / resume / "last.pt" if resume else None
    train(DDPMModel.from_config(config), load_images("shapes", 8, Path("data")), config, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


def test_two_processes_make_the_updates_of_one_from_which_they_resume_and_which_resumes_from_them(folder, monkeypatch):
    monkeypatch.chdir(folder)
    train_alone(9, run_name="one")
    train_alone(3, run_name="two")
    assert "2 x CPU" in finish(train_with_two("--resume", "two", "--max_steps", "6"))
    assert {path.name for path in Path("checkpoints").iterdir()} == {"one", "two", "ddpm_final.pt"}
    assert {path.name for path in Path("checkpoints/two").iterdir()} == {"last.pt", "best.pt", "final.pt"}
    assert len(list(Path("samples/two/tensorboard").iterdir())) == 2  # one of each session, not of each process
    train_alone(9, resume="two")
    assert largest_difference(Path("checkpoints/one/final.pt"), Path("checkpoints/two/final.pt")) < 1e-6
    one, two = (torch.load(f"checkpoints/{name}/final.pt", weights_only=True)["progress"] for name in ("one", "two"))
    assert two | {"seconds": 0, "best": 0} == one | {"seconds": 0, "best": 0}
    rows = [json.loads(line) for line in Path("samples/two/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9]


def kill_one_of(launcher: subprocess.Popen, run_name: str) -> None:
    """Kills process 1 as soon as something is saved, and sees that all end within a minute and say so in one line."""
    while not Path(f"checkpoints/{run_name}/last.pt").exists():
        assert launcher.poll() is None
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
    workers = [int(pid) for pid in children.stdout.split()]
    (victim,) = [pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    lines = re.findall(r"^error: .*", errors, re.MULTILINE)
    assert len(lines) == 1 and lines[0].startswith("error: process 1 (") and f"pid {victim};" in lines[0]
    assert lines[0].endswith(f"so all stop: go on with --resume {run_name}")
    assert errors.count("Traceback (most") == 1  # the launcher's own


def test_a_killed_worker_ends_the_run_which_goes_on_as_one_process(folder, monkeypatch):
    monkeypatch.chdir(folder)
    train_alone(30, run_name="whole")
    kill_one_of(train_with_two("--run_name", "killed", "--max_steps", "30", "--save_minutes", "0"), "killed")
    assert torch.load("checkpoints/killed/last.pt", weights_only=True)["progress"]["step"] < 30
    train_alone(30, resume="killed")
    assert largest_difference(Path("checkpoints/killed/final.pt"), Path("checkpoints/whole/final.pt")) < 1e-5


WAITING = """
import os, sys, time
from engine.command_line import run
from engine.errors import UserError
from engine.processes import together

def main():
    with together(lambda: "go on like this") as processes:
        if os.fork() == 0:  # as a data worker, which may outlive its parent
            os.close(1), os.close(2)
            os._exit(len(sys.stdin.read()))
        print("there", flush=True)
        if processes.process_index == 2 and sys.argv[1] == "failing":
            raise UserError("a disk of its own is full")
        time.sleep(1000)  # as in a collective operation that never ends

run(main)
"""


@pytest.mark.parametrize(("how", "lost"), [("killed", 0), ("failing", 2)])
def test_processes_that_wait_for_ever_end_when_one_is_gone(how, lost, tmp_path):
    """As on three machines: no launcher ends the others, and each says why on its own."""
    (tmp_path / "waiting.py").write_text(WAITING)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    arguments = [sys.executable, "-W", "ignore", "waiting.py", how]
    processes = [start(tmp_path, arguments, RANK=str(rank), **common) for rank in range(3)]
    for process in processes:
        assert process.stdout.readline() == "there\n"
    if how == "killed":
        processes[lost].kill()
    for rank, process in enumerate(processes):
        code, errors = process.wait(30), process.stderr.read()
        if rank != lost:
            what = r"was lost \(.*\)" if how == "killed" else "failed"
            line = rf"error: process {lost} \(.*, pid {processes[lost].pid}; .*\) {what}, so all stop: go on like this"
            assert code == 1 and re.fullmatch(line, errors.strip())
        elif how == "failing":
            assert code == 2 and errors == "error: a disk of its own is full\n"
    for process in processes:
        process.stdin.close()


SHARED = f"""
from pathlib import Path
from types import SimpleNamespace

import torch

import inference
from ddpm_model import DDPMModel
from engine import checkpoints
from engine.processes import together
from engine.step import Step

checkpoints.FOLDER, checkpoints.SHIPPED = Path("empty"), Path("checkpoints")  # as in a fresh clone
inference.main()
with together(str) as processes:
    rank, world = processes.process_index, processes.num_processes
    model = DDPMModel().load_model("checkpoints/cifar10.safetensors")
    drawn = inference.batch_generate(model, total_samples=10, batch_size=3, seed=5, sampler="ddpm")
    step = Step(model, SimpleNamespace(**{SETTINGS | {"BATCH_SIZE": 16}}), rank, world)
    loss, norm = step(torch.load("images.pt")[16 * rank :][:16], 3, 1e-3)
    results = dict(drawn=drawn, loss=loss, norm=norm, weights=list(step.model.parameters()))
    torch.save(results, f"rank{{rank}}.pt")
"""
BATCH = ["--mode", "batch", "--num_samples", "600", "--format", "npz", "--output_dir"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with an untrained model and what two processes did with it."""
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    model = DDPMModel(image_size=16, dim=8, dim_mults=(1, 2), timesteps=20, sampling_timesteps=2)
    model.save_model(folder / "checkpoints/cifar10.safetensors")
    torch.save(torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8), folder / "images.pt")
    (folder / "shared.py").write_text(SHARED)
    output = finish(torchrun(folder, "shared.py", *BATCH, "two"))
    assert output.count("nothing was trained in empty/ yet") == 1
    assert output.count("batch: 600 images: images.npz") == 1
    return folder


def test_two_processes_draw_what_one_draws(shared, monkeypatch):
    monkeypatch.chdir(shared)
    monkeypatch.setattr(sys, "argv", ["inference.py", *BATCH, "one"])
    inference.main()
    one, two = (next((shared / name).rglob("images.npz")) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes() and len(np.unique(np.load(one)["images"], axis=0)) == 600
    summary = json.loads((two.parent / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["seeds"] == list(range(600))
    model = DDPMModel().load_model("checkpoints/cifar10.safetensors")
    drawn = inference.batch_generate(model, total_samples=10, batch_size=3, seed=5, sampler="ddpm")
    for rank in range(2):  # the processes have one thread each, this one may have more and round otherwise
        other = torch.load(f"rank{rank}.pt", weights_only=True)["drawn"]
        torch.testing.assert_close(other, drawn, rtol=0, atol=1e-5)


def test_half_a_batch_in_each_of_two_processes_is_a_step_of_the_whole(shared, monkeypatch):
    monkeypatch.chdir(shared)
    step = Step(DDPMModel().load_model("checkpoints/cifar10.safetensors"), SimpleNamespace(**SETTINGS))
    loss, norm = step(torch.load("images.pt", weights_only=True), 3, 1e-3)
    for rank in range(2):
        two = torch.load(f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close((two["loss"], two["norm"]), (loss, norm))
        torch.testing.assert_close(two["weights"], list(step.model.parameters()), rtol=0, atol=1e-6)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="this machine takes 2 at most"):
        join()
