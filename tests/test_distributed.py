"""Several ranks on one machine over gloo: they compute what one does, and end together."""

import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from config import detect_tier, resolve
from ddpm_model import DDPMModel
from engine import checkpoints
from engine.dataloader import Batch
from engine.datasets import load_dataset
from engine.distributed import RankLostError, broadcast, init, session
from engine.errors import UserError
from engine.progress import LOG_EVERY
from engine.train_step import TrainStep
from engine.trainer import train
from tests.forked_script import finish, start_two_ranks, write_changed_training
from tests.helpers import (
    RANK_FLAGS,
    STEP_SETTINGS,
    error_lines,
    exit_code,
    kill_one_rank,
    max_checkpoint_difference,
    run_script_ok,
    save_images,
    torchrun,
    training_arguments,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on GPUs the ranks do not talk through gloo"
)


def train_alone(max_steps: int, resume: str = "", run_name: str = "") -> None:
    flags = RANK_FLAGS | {"MAX_STEPS": max_steps, "RUN_NAME": run_name}
    config = resolve("folder", detect_tier(), flags=flags)
    path = Path("checkpoints") / resume / "last.pt" if resume else None
    data = load_dataset("folder", 8, Path("images"))
    train(DDPMModel.from_config(config, data.class_counts), data, config, path)


def difference_of_runs(a: str, b: str) -> float:
    return max_checkpoint_difference(*(Path("checkpoints", name, "final.pt") for name in (a, b)))


# Training.


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with images to train on."""
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path)
    return tmp_path


def test_two_ranks_make_the_updates_of_one_and_resume_from_each_other(folder):
    train_alone(9, run_name="one")
    train_alone(3, run_name="two")
    flags = training_arguments("--resume", "two", "--max_steps", "6")
    assert "2 x CPU" in finish(start_two_ranks(folder, "train.py", *flags))
    names = {path.name for path in Path("checkpoints").iterdir()}
    assert names == {"one", "two", "ddpm_final.pt"}
    files = {path.name for path in Path("checkpoints/two").iterdir()} - {".lock"}
    assert files == {"last.pt", "best.pt", "final.pt"}
    # One of each session, not of each rank.
    assert len(list(Path("samples/two/tensorboard").iterdir())) == 2
    train_alone(9, resume="two")
    assert difference_of_runs("one", "two") < 1e-6
    one, two = (
        torch.load(f"checkpoints/{name}/final.pt", weights_only=True)["progress"]
        for name in ("one", "two")
    )
    assert two | {"seconds": 0, "best": 0} == one | {"seconds": 0, "best": 0}
    rows = [json.loads(line) for line in Path("samples/two/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9]


def block_rank_1_after_20_calls(loss, calls):
    while calls > 20 and os.environ["RANK"] == "1":
        time.sleep(1)
    return loss


def test_killed_rank_ends_the_run_which_resumes_on_one_rank(folder):
    train_alone(30, run_name="whole")
    flags = ["--run_name", "killed", "--max_steps", "30", "--save_every_minutes", "0"]
    script = write_changed_training(folder, block_rank_1_after_20_calls)
    kill_one_rank(torchrun(folder, script.name, *training_arguments(*flags)), "killed")
    assert torch.load("checkpoints/killed/last.pt", weights_only=True)["progress"]["step"] < 30
    train_alone(30, resume="killed")
    assert difference_of_runs("killed", "whole") < 1e-5


WAITING = """
import os, sys, time
import torch
from engine import progress
from engine.cli import run_script
from engine.distributed import session
from engine.errors import UserError

progress.GRACE_PERIOD = 1.0

def hint():
    return "Resume like this"

def main():
    with session(hint) as dist, progress.StopSignal(dist, hint):
        torch.distributed.barrier()
        print(f"rank {dist.process_index} is {os.getpid()}", flush=True)
        if dist.process_index == 1 and sys.argv[1] == "failing":
            raise UserError("a disk is full")
        time.sleep(1000)  # as in a collective operation that never returns

run_script(main)
"""


@pytest.mark.parametrize(("how", "count"), [("killed", 3), ("failing", 2)])
def test_ranks_that_wait_forever_end_when_another_is_gone(how, count, tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    launcher = torchrun(tmp_path, "waiting.py", how, count=count)
    lines = [launcher.stdout.readline() for _ in range(count)]
    pids = {int(rank): int(pid) for rank, pid in re.findall(r"rank (\d) is (\d+)", "".join(lines))}
    assert set(pids) == {*range(count)}
    if how == "killed":
        os.kill(pids[0], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 1 and errors.count("Traceback (most") == 1
    (line,) = error_lines(errors)
    expected = r"error: rank [12] is stuck\. Resume like this"
    assert re.fullmatch(expected if how == "killed" else "error: a disk is full", line)
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


PREPARING = """
import os
import signal
import time
from pathlib import Path

from engine import distributed
from engine.cli import run_script

rank = distributed.launched_rank()

def prepare():
    is_prepared = Path("prepared").exists()
    time.sleep(0.5 if rank == 0 else 0)
    Path("prepared").touch()
    return is_prepared

def main():
    choice = distributed.from_rank0("choice", lambda: f"choice-{rank}")
    is_prepared = distributed.rank0_first("prepare", prepare)
    before = signal.getsignal(signal.SIGTERM)
    with distributed.session(lambda: "Resume like this"):
        pass
    is_restored = signal.getsignal(signal.SIGTERM) == before
    with distributed.session(lambda: "Resume like this"):
        print(f"{rank} {choice} {is_prepared} {is_restored}\\n", end="", flush=True)
        distributed.broadcast_object("")
        if rank == 1:
            time.sleep(0.5)  # until the others have left the collective operation
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)  # outside of collective operations, only SIGTERM ends the others

run_script(main)
"""


def test_ranks_share_choices_wait_for_rank_0_and_end_with_one_line(tmp_path):
    (tmp_path / "preparing.py").write_text(PREPARING)
    launcher = torchrun(tmp_path, "preparing.py")
    output, errors = launcher.communicate(timeout=240)
    # Rank, choice, whether rank 0 was prepared, and whether the signal handler was restored.
    assert sorted(filter(None, output.splitlines())) == [
        "0 choice-0 False True", "1 choice-0 True True",
    ]  # fmt: skip
    assert launcher.returncode == 1
    (line,) = error_lines(errors)
    assert line == (
        "error: stopped by SIGTERM: another rank died, or the launcher was stopped. "
        "Resume like this"
    )


def test_ranks_that_get_sigterm_save_and_exit_with_its_code(folder):
    flags = training_arguments("--run_name", "stopped", "--max_steps", "100000")
    ranks = start_two_ranks(folder, "train.py", *flags)
    try:
        metrics = folder / "samples" / "stopped" / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert all(process.returncode is None for process in ranks)
            time.sleep(0.05)
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        outputs = [process.communicate()[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [128 + signal.SIGTERM] * 2
    step = checkpoints.load(folder / "checkpoints" / "stopped" / "last.pt")["progress"]["step"]
    assert step % LOG_EVERY == 0
    assert f"interrupted at step {step}. Resume with --resume stopped" in outputs[0]
    assert "interrupted" not in outputs[1]


# A step, and inference.

SHARED = f"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import inference
from ddpm_model import DDPMModel
from engine import checkpoints
from engine.cli import run_script
from engine.dataloader import Batch
from engine.distributed import session
from engine.train_step import TrainStep

# As in a new clone.
checkpoints.CHECKPOINT_DIR, checkpoints.PRETRAINED_DIR = Path("empty"), Path("checkpoints")
inference.main()
sys.argv = ["inference.py", "--num_samples", "2", "--output_dir", "alone"]
inference.main()
with session(str) as dist:
    rank, world_size = dist.process_index, dist.num_processes
    model = DDPMModel.from_file("checkpoints/cifar10.safetensors")
    samples = inference.batch_generate(
        model, total_samples=10, batch_size=3, seed=5, sampler="ddpm"
    )
    model.unet.final_conv.bias.data += rank  # rank 0's weights count
    config = SimpleNamespace(**{STEP_SETTINGS | {"BATCH_SIZE": 16}})
    step = TrainStep(model, config, rank, world_size)
    loss, norm = step(Batch(torch.load("images.pt")[16 * rank :][:16]), 3, 1e-3)
    weights = list(step.model.parameters())
    results = dict(samples=samples, loss=loss, norm=norm, weights=weights)
    torch.save(results, f"rank{{rank}}.pt")
"""
BATCH = ["--mode", "batch", "--num_samples", "600", "--format", "npz", "--output_dir"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with an untrained model and what two ranks did with it."""
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    model = DDPMModel(image_size=16, dim=8, dim_mults=(1, 2), timesteps=20, sampling_timesteps=2)
    model.save_model(folder / "checkpoints/cifar10.safetensors")
    torch.save(torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8), folder / "images.pt")
    (folder / "shared.py").write_text(SHARED)
    output = finish(start_two_ranks(folder, folder / "shared.py", *BATCH, "two"))
    assert output.count("no checkpoint in empty/ yet") == 2  # once by each script
    assert output.count("batch: 600 images: images.npz") == 1
    assert output.count("note: rank 0 works alone") == 1
    assert output.count("samples: 2 images") == len(list(folder.glob("alone/*/grid.png"))) == 1
    return folder


def test_two_ranks_sample_what_one_does(shared):
    import inference

    run_script_ok(shared, "inference.py", *BATCH, "one")
    one, two = (next((shared / name).rglob("images.npz")) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert len(np.unique(np.load(one)["images"], axis=0)) == 600
    summary = json.loads((two.parent / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["seeds"] == list(range(600))
    model = DDPMModel.from_file(shared / "checkpoints/cifar10.safetensors")
    options = dict(total_samples=10, batch_size=3, seed=5, sampler="ddpm")
    samples = inference.batch_generate(model, **options)
    for rank in range(2):
        other = torch.load(shared / f"rank{rank}.pt", weights_only=True)["samples"]
        # The ranks have one thread each, this process may have more and round differently.
        torch.testing.assert_close(other, samples, rtol=0, atol=1e-5)


def test_half_a_batch_on_each_of_two_ranks_is_a_step_on_all_of_it(shared):
    model = DDPMModel.from_file(shared / "checkpoints/cifar10.safetensors")
    step = TrainStep(model, SimpleNamespace(**STEP_SETTINGS))
    loss, norm = step(Batch(torch.load(shared / "images.pt", weights_only=True)), 3, 1e-3)
    for rank in range(2):
        two = torch.load(shared / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close((two["loss"], two["norm"]), (loss, norm))
        torch.testing.assert_close(two["weights"], list(step.model.parameters()), rtol=0, atol=1e-6)


EVALUATING = """
from engine.cli import run_script

import evaluate
from tests.helpers import MeanColors

evaluate.load_feature_networks = lambda *_: [MeanColors()]
run_script(evaluate.main)
"""


def test_two_ranks_score_a_labeled_model_as_one_does(folder):
    (folder / "evaluating.py").write_text(EVALUATING)
    torch.manual_seed(0)
    size = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 20}
    model = DDPMModel(**size, class_counts={"a": 100, "b": 100})
    model.unet.class_embedding.weight.data.normal_()
    model.save_model("model.pt")
    flags = ["--checkpoint", "model.pt", "--dataset", "folder", "--data_dir", "images"]
    flags += ["--num_samples", "21", "--steps", "2", "--output_dir"]
    script = folder / "evaluating.py"
    assert finish(start_two_ranks(folder, script, *flags, "two")).count("FD-Colors") >= 1
    run_script_ok(folder, script, *flags, "one")
    one, two = (
        json.loads(next(Path(name).glob("*.json")).read_text())["evaluations"][0]
        for name in ("one", "two")
    )
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-3)
    assert [row["class"] for row in two["classes"]] == ["a", "b"]
    assert two["classes"] == one["classes"]


def test_failed_collective_is_a_lost_rank_unless_memory_ran_out(monkeypatch):
    for error, text in ((RuntimeError("A\nB"), "died: A B"), (torch.OutOfMemoryError("C"), "^C")):
        monkeypatch.setattr(torch.distributed, "broadcast", Mock(side_effect=error))
        with pytest.raises((RankLostError, torch.OutOfMemoryError), match=text):
            broadcast(torch.zeros(1))


def test_session_raises_at_sigterm_and_restores_its_handler(monkeypatch):
    monkeypatch.setattr("engine.distributed.init", lambda: SimpleNamespace(num_processes=2))
    before = signal.getsignal(signal.SIGTERM)
    with session(str), pytest.raises(RankLostError, match="stopped by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_init_refuses_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="this machine has 2, so start at most 2"):
        init()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("LOCAL_RANK=0", "LOCAL_RANK is set without RANK, WORLD_SIZE, MASTER_PORT, MASTER_ADDR"),
        ("WORLD_SIZE=2", "WORLD_SIZE is set without RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR"),
        ("RANK=1", "RANK is set without LOCAL_RANK, WORLD_SIZE, MASTER_PORT, MASTER_ADDR"),
        ("RANK=0 LOCAL_RANK=-1", "LOCAL_RANK is '-1', but must be at least 0"),
        ("WORLD_SIZE=two", "WORLD_SIZE is 'two', but must be at least 1"),
        (
            "RANK=2 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500",
            "RANK is 2, but must be below WORLD_SIZE, 2",
        ),
        ("RANK=", "RANK is '', but must be at least 0"),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=29500", ""),  # set in some containers
        ("RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500", ""),
    ],
)
def test_script_says_which_variables_of_a_launcher_are_wrong(
    variables, message, monkeypatch, capsys
):
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    monkeypatch.setattr("engine.distributed._launcher_store", lambda: pytest.fail("may hang"))
    assert exit_code(lambda: None) == (2 if message else 0)
    errors = capsys.readouterr().err
    if message:
        assert errors.startswith(f"error: {message}. Start with torchrun or accelerate launch")
    else:
        assert errors == ""
