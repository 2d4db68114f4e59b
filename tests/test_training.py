"""Real runs of the real commands: interrupted, resumed, shared by processes, ill-treated."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine import checkpoints, plots, runs
from engine.batches import Batches
from engine.errors import UserError
from engine.runs import Clock
from engine.training import VERSION, go_on_from

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--dataset", "shapes", "--image_size", "8", "--dim", "8", "--dim_mults", "1,2", "--batch_size", "16"]
TINY += ["--sampling_timesteps", "4", "--num_samples", "4", "--sample_grids", "2", "--dropout", "0.1"]
TINY += ["--warmup_steps", "2", "--guide_at", "0.5"]


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *arguments]


def call(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def run(folder: Path, script: str, *arguments: str) -> str:
    result = call(folder, command(script, *arguments))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def fails(folder: Path, script: str, *arguments: str, code: int = 2) -> str:
    """What a run prints when it fails as it should: one line that begins with `error:`, and no traceback."""
    result = call(folder, command(script, *arguments))
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0])
    return lines[0]


def weights(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)
    return state["model"] | {f"ema.{name}": value for name, value in state["ema"].items()}


def largest_difference(a: Path, b: Path) -> float:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run `whole` of 40 steps."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, "train_optimized.py", *TINY, "--run_name", "whole", "--max_steps", "40")
    return folder


def test_a_run_leaves_what_it_promises(trained):
    checkpoints, samples = trained / "checkpoints", trained / "samples" / "whole"
    assert {path.name for path in (checkpoints / "whole").iterdir()} == {"last.pt", "best.pt", "final.pt"}
    assert (checkpoints / "ddpm_final.pt").read_bytes() == (checkpoints / "whole" / "final.pt").read_bytes()
    names = {path.name for path in samples.iterdir()}
    assert names == {"step_0000020.png", "final.png", "loss.png", "metrics.jsonl", "tensorboard"}
    assert list((samples / "tensorboard").glob("events*"))
    for name in ("final.png", "loss.png"):
        assert np.asarray(Image.open(samples / name).convert("L")).std() > 5
    rows = [json.loads(line) for line in (samples / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [10, 20, 30, 40]
    assert [row["step"] for row in rows if "validation_loss" in row] == [40]
    assert rows[-1]["images"] == 640


def test_saved_at_the_last_step_of_an_epoch_it_goes_on_with_the_next(monkeypatch):
    images = np.zeros((80, 3, 8, 8), np.uint8)
    batches = Batches(images, 16, 0, torch.device("cpu"), 1)
    end = len(batches)
    progress = {"step": end, "epoch": 0, "position": end}
    state = {"version": VERSION, "data": {}, "progress": progress, "run": "ended", "architecture": {}}
    state["config"] = {"BATCH_SIZE": 16, "GRADIENT_ACCUMULATION": 1}
    monkeypatch.setattr(checkpoints, "load_training", lambda path: state)
    model, config = SimpleNamespace(architecture={}), SimpleNamespace(SEED=0)
    step = SimpleNamespace(rank=1, world=2, model=model, config=config, load_state_dict=lambda state: None)
    _, found = go_on_from(Path("last.pt"), {}, step, batches)
    assert found["position"] == end and not list(batches.epoch(0, end))


def test_epochs_are_passes_over_the_images_whatever_the_batch_was_before():
    config, processes = SimpleNamespace(EPOCHS=4, MAX_STEPS=0, MINUTES=0), SimpleNamespace(num_processes=1)
    progress = {"step": 20, "epoch": 2, "position": 5, "seconds": 0.0}  # two epochs of 8 steps, then the batch doubled
    clock = Clock(config, 10, progress, processes)
    assert (clock.fraction(), clock.total(), clock.finished()) == (2.5 / 4, 35, False)
    progress |= {"epoch": 3, "position": 10}
    assert clock.finished()


def test_killed_at_a_random_step_and_resumed_ends_with_the_same_weights(trained, tmp_path):
    arguments = command("train_optimized.py", *TINY, "--run_name", "killed", "--max_steps", "40", "--save_minutes", "0")
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    last, wanted = tmp_path / "checkpoints" / "killed" / "last.pt", random.randint(1, 25)
    while not last.exists() or torch.load(last, weights_only=True)["progress"]["step"] < wanted:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    at = torch.load(last, weights_only=True)["progress"]["step"]
    assert 0 < at < 40
    run(tmp_path, "train_optimized.py", "--resume", "killed", "--save_minutes", "2")
    whole = trained / "checkpoints" / "whole" / "final.pt"
    assert largest_difference(tmp_path / "checkpoints" / "killed" / "final.pt", whole) == 0, f"killed at step {at}"
    rows = [json.loads(line) for line in (tmp_path / "samples/killed/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [10, 20, 30, 40]


def test_the_guide_is_the_average_of_that_time(tmp_path):
    run(tmp_path, "train.py", *TINY, "--run_name", "whole", "--max_steps", "8")  # at a constant rate
    run(tmp_path, "train.py", *TINY, "--run_name", "part", "--max_steps", "4", "--guide_at", "0")
    whole, part = (
        torch.load(tmp_path / f"checkpoints/{name}/final.pt", weights_only=True) for name in ("whole", "part")
    )
    guide = {name.removeprefix("guide."): value for name, value in whole["ema"].items() if name.startswith("guide.")}
    then = {name: value for name, value in part["ema"].items() if name.startswith("diffusion.model.")}
    assert len(guide) == len(then) and not any(name.startswith("guide.") for name in part["ema"])
    for name, value in guide.items():
        assert torch.equal(value, then[f"diffusion.model.{name}"])
        assert value.ndim == 0 or not torch.equal(value, whole["ema"][f"diffusion.model.{name}"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(number, tmp_path):
    arguments = command("train.py", *TINY, "--run_name", "stopped", "--max_steps", "100000")
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = tmp_path / "samples" / "stopped" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = int(re.search(r"interrupted and saved at step (\d+): go on with --resume stopped", output).group(1))
    state = torch.load(tmp_path / "checkpoints/stopped/last.pt", weights_only=True)
    assert state["progress"]["step"] == step >= 10


def test_minutes_end_with_the_schedule_at_its_end(tmp_path):
    run(tmp_path, "train_optimized.py", *TINY, "--run_name", "timed", "--minutes", "0.08")
    rows = [json.loads(line) for line in (tmp_path / "samples/timed/metrics.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert rates[-1] < 0.05 * max(rates)
    assert rows[-1]["seconds"] >= 4.8


def test_every_tenth_epoch_is_kept(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.new("RGB", (8, 8), (6 * i, 255 - 6 * i, 128)).save(tmp_path / "images" / f"{i}.png")
    flags = ["--dataset", "folder", "--data_dir", "images", *TINY[2:]]
    run(tmp_path, "train.py", *flags, "--run_name", "kept", "--epochs", "20", "--ema_decay", "0.9")
    names = {path.name for path in (tmp_path / "checkpoints/kept").glob("epoch*")}
    assert names == {"epoch_0010.pt", "epoch_0020.pt"}
    rows = [json.loads(line) for line in (tmp_path / "samples/kept/metrics.jsonl").read_text().splitlines()]
    validated = [row["step"] for row in rows if "validation_loss" in row]  # later not after each of so short epochs
    assert validated[:5] == list(range(2, 12, 2)) and validated[-1] == 40
    best = min(row["validation_loss"] for row in rows if "validation_loss" in row)
    assert torch.load(tmp_path / "checkpoints/kept/best.pt", weights_only=True)["progress"]["best"] == best


def run_with(folder: Path, change: str, *arguments: str) -> subprocess.CompletedProcess:
    """train.py whose loss is loss * (the expression `change` of `calls`, the number of losses so far)."""
    text = (ROOT / "train.py").read_text()
    text = text.replace(
        "            train(model, images,",
        "            import os\n"
        "            whole, calls = model.forward, 0\n"
        "            def forward(*a):\n"
        "                nonlocal calls\n"
        "                calls += 1\n"
        f"                return whole(*a) * ({change})\n"
        "            model.forward = forward\n"
        "            train(model, images,",
    )
    (folder / "changed.py").write_text(text)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    whole = [sys.executable, "changed.py", *TINY, *arguments]
    return subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_stopped_at_its_last_step_a_run_is_finished(trained, tmp_path):
    result = run_with(tmp_path, "1 + 0 * (calls == 12 and os.kill(os.getpid(), 15) or 0)", "--max_steps", "12")
    assert result.returncode == 0 and "done: 192 images" in result.stdout
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    final = tmp_path / "checkpoints" / "whole" / "final.pt"
    final.unlink()  # as if it had been killed before it was there
    output = run(tmp_path, "train_optimized.py", "--resume", "whole")
    assert re.search(r"done: 640 images in .* validation loss \d", output)
    assert largest_difference(final, trained / "checkpoints" / "whole" / "final.pt") == 0


def test_a_loss_that_stays_broken_stops_the_run_and_keeps_the_good_weights(tmp_path):
    flags = ["--run_name", "bad", "--max_steps", "100", "--save_minutes", "0"]
    result = run_with(tmp_path, "1 if calls <= 5 else float('nan')", *flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "20 updates in a row were not finite; stopped at step 30" in result.stderr
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "checkpoints/bad/last.pt").values())


def test_inference_uses_the_newest_checkpoint(trained):
    output = run(trained, "inference.py", "--num_samples", "5", "--batch_size", "2")
    folder = trained / "inference_results" / "samples-ddpm_final-unipc-4-seeds-0-4"
    assert "ddpm_final.pt" in output and str(folder.relative_to(trained)) in output
    names = {"grid.png", "contact_sheet.png", "summary.json", *(f"{i:06d}.png" for i in range(5))}
    assert {path.name for path in folder.iterdir()} == names
    run(trained, "inference.py", "--seeds", "3", "--checkpoint", "checkpoints/whole/best.pt")
    run(trained, "inference.py", "--mode", "interpolate", "--image1", "data:3", "--image2", "5", "--num_steps", "2")
    summary = trained / "inference_results" / "interpolate-ddpm_final-unipc-4-seeds-0-15" / "summary.json"
    assert json.loads(summary.read_text())["image1"] == "data:3"
    assert "data:20480 is asked for" in fails(trained, "inference.py", "--mode", "vary", "--image", "data:20480")
    alone = Image.open(trained / "inference_results/samples-whole-best-unipc-4-seeds-3/000003.png")
    assert alone.size == (8, 8)
    assert np.abs(np.asarray(alone, int) - np.asarray(Image.open(folder / "000003.png"), int)).max() <= 1


def test_dry_run_tells_and_leaves_nothing(trained):
    output = run(trained, "train_optimized.py", *TINY, "--epochs", "2", "--dry_run", "--run_name", "dry")
    assert re.search(r"^DIM +8 +flag$", output, re.MULTILINE)
    assert re.search(r"^LR_SCHEDULE +cosine +script$", output, re.MULTILINE)
    assert "0.1 M parameters" in output and "memory" in output and "2,496 steps, 2.0 epochs" in output
    assert not (trained / "checkpoints" / "dry").exists() and not (trained / "samples" / "dry").exists()


def test_bad_input_gets_one_line(trained):
    (trained / "empty").mkdir()
    (trained / "few").mkdir()
    Image.new("RGB", (9, 9)).save(trained / "few" / "one.png")
    (trained / "half").mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9)).save(trained / "half" / f"{i}.png")
        (trained / "half" / f"{i}.jpg").write_text("not a picture")
    (trained / "cut.pt").write_bytes((trained / "checkpoints/whole/final.pt").read_bytes()[:-2000])
    folder, resume = ["--dataset", "folder", "--data_dir"], ["--resume", "whole"]
    cases = {
        "no images in empty": ["train.py", *folder, "empty"],
        "too many of the 8 images in": ["train.py", *folder, "half", *TINY[2:]],
        "nowhere is missing": ["train_optimized.py", *folder, "nowhere"],
        "fewer than one batch of 16": ["train.py", *folder, "few", *TINY[2:]],
        "did you mean --batch_size": ["train.py", "--batchsize", "3"],
        "../whole, but must name a folder below checkpoints/": ["train.py", *TINY, "--run_name", "../whole"],
        "there is a run whole already": ["train.py", *TINY, "--run_name", "whole"],
        "is a finished run": ["train.py", *resume],
        "was trained on": ["train.py", *resume, "--image_size", "16", "--max_steps", "99"],
        "with objective pred_v, which cannot become pred_noise": ["train.py", *resume, "--objective", "pred_noise"],
        "with dim 8, which cannot become 16": ["train.py", *resume, "--dim", "16", "--max_steps", "99"],
        "cut.pt is damaged or cut short": ["inference.py", "--checkpoint", "cut.pt"],
        "steps is 4000, but": ["inference.py", "--steps", "4000"],
    }
    with ThreadPoolExecutor(2) as pool:  # most of the time goes into starting
        lines = pool.map(lambda arguments: fails(trained, *arguments), cases.values())
        for expected, line in zip(cases, lines, strict=True):
            assert expected in line


def test_a_run_goes_on_from_any_of_its_files_and_with_another_batch(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    run(tmp_path, "train.py", "--resume", "checkpoints/ddpm_final.pt", "--batch_size", "8", "--max_steps", "50")
    state = torch.load(tmp_path / "checkpoints/whole/final.pt", weights_only=True)
    assert (state["run"], state["progress"]["step"]) == ("whole", 50)
    assert (state["progress"]["images"], state["progress"]["position"]) == (40 * 16 + 10 * 8, 40 * 2 + 10)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"whole", "ddpm_final.pt"}


def test_a_copy_of_a_run_goes_on_as_a_run_of_its_own(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "whole", folder / "copy")
    (folder / "copy" / ".last.pt.4711.tmp").write_text("of a process that was killed while it saved")
    run(tmp_path, "train.py", "--resume", "copy", "--max_steps", "42")
    steps = {name: checkpoints.load(folder / name / "final.pt")["progress"]["step"] for name in ("whole", "copy")}
    assert steps == {"whole": 40, "copy": 42}
    assert {path.name for path in (folder / "copy").iterdir()} == {"last.pt", "best.pt", "final.pt"}
    shutil.copy(folder / "whole" / "last.pt", tmp_path / "elsewhere.pt")
    line = fails(tmp_path, "train.py", "--resume", "elsewhere.pt", "--max_steps", "42")
    assert "of a run whole, which checkpoints/ has too: copy it to" in line


def test_a_run_belongs_to_one_process(trained, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "datetime", SimpleNamespace(now=lambda: datetime(2026, 1, 1)))

    def lock(name: str) -> int:  # as another process would hold it
        Path("checkpoints", name).mkdir(parents=True)
        handle = os.open(Path("checkpoints", name), os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        return handle

    unnamed, named = (SimpleNamespace(RUN_NAME=name, DATASET="shapes", IMAGE_SIZE=8) for name in ("", "mine"))
    handle = lock("shapes-8px-20260101-000000")
    assert runs.new_name(unnamed) == "shapes-8px-20260101-000000-2"
    os.close(handle)
    handle = lock("mine")
    with pytest.raises(UserError, match="there is a run mine already"):
        runs.new_name(named)
    shutil.copy(trained / "checkpoints" / "whole" / "last.pt", "checkpoints/mine/last.pt")
    shutil.copytree(trained / "data", "data")
    line = fails(tmp_path, "train.py", "--resume", "mine", "--max_steps", "42")
    assert "run mine is going on in another process" in line
    os.close(handle)
    assert runs.claim("mine")
    runs.give_back("mine")


def test_a_full_disk_stops_no_run_and_leaves_no_half_file(trained, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "data")
    arguments = command("train.py", *TINY, "--run_name", "full", "--max_steps", "20", "--save_minutes", "0.01")
    result = subprocess.run(
        arguments, cwd=tmp_path, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),  # files of 300 kB at most
    )  # fmt: skip
    assert "best.pt COULD NOT BE SAVED (File too large): free some space; training goes on" in result.stdout
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: File too large (checkpoints/full/final.pt)" in result.stderr
    assert not list((tmp_path / "checkpoints").rglob("*.*"))


def test_where_nothing_can_be_written_any_more_training_ends_as_it_should_and_says_so(tmp_path):
    limit = "__import__('resource').setrlimit(1, (400, 400))"  # RLIMIT_FSIZE; torch 2.6 writes files when imported
    result = run_with(tmp_path, f"1 + 0 * (calls == 1 and {limit} or 0)", "--run_name", "full", "--max_steps", "40")
    assert "metrics.jsonl COULD NOT BE WRITTEN (File too large): free some space; training goes on" in result.stdout
    assert result.stdout.count("COULD NOT BE WRITTEN") == 1 and "best.pt COULD NOT BE SAVED" in result.stdout
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: File too large (checkpoints/full/final.pt): free some space" in result.stderr
    rows = plots.read_metrics(tmp_path / "samples/full/metrics.jsonl")
    assert rows[0]["step"] == 10 and len(rows) < 4


def test_that_no_checkpoint_can_be_written_is_said_before_the_first_step(trained, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "data")
    (tmp_path / "checkpoints").write_text("a file")
    assert "checkpoints" in fails(tmp_path, "train.py", *TINY, "--run_name", "none", "--max_steps", "40")
    assert not plots.read_metrics(tmp_path / "samples/none/metrics.jsonl")


def test_a_full_disk_leaves_the_old_checkpoint(trained, tmp_path):
    path = tmp_path / "model.pt"
    checkpoints.save(path, {"value": torch.zeros(3)})

    def fill(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_atomically(path, fill)
    assert torch.equal(checkpoints.load(path)["value"], torch.zeros(3))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
