"""benchmark.py: a real run, what becomes of variants that fail, its files, the README's tables and its arithmetic."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmark
from config import resolve, tier_of
from ddpm_model import DDPMModel
from engine import measuring, report
from engine.errors import UserError
from engine.measuring import Job

ROOT = Path(__file__).resolve().parent.parent


def test_a_quick_run_measures_each_part_and_writes_both_files(tmp_path):
    flags = ["--quick", "--preset=shapes", "--image_size=16", "--dim=8", "--batch=4", "--threads=1", "--curve_steps=10"]
    flags += ["--dim_mults=1,2", "--full_attention_size=16"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmark.py"), *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "results").glob("benchmark-*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    ((preset, parts),) = report.load(path).items()
    assert preset == "shapes-16px-dim8-1,2-full16" and set(parts) == {"training", "sampling", "curves"}
    assert all(part["torch"] == torch.__version__ and part["quick"] for part in parts.values())
    model = DDPMModel(16, 8, (1, 2), full_attn=(True, True), attn_dim_head=32)
    assert all(part["parameters"] == sum(p.numel() for p in model.unet.parameters()) for part in parts.values())
    assert all((part["dim_mults"], part["full_attention_size"]) == ([1, 2], 16) for part in parts.values())
    for part in ("training", "sampling"):
        rows = {row["what"]: row for row in parts[part]["rows"] if not row["what"].startswith(benchmark.DIFFUSERS)}
        library, *ours = rows.values()
        assert library["what"].startswith("library") and any("fp32" in row["what"] for row in ours)
        for row in ours:
            ratio = row["images_per_second"] / library["images_per_second"]
            assert row["over_library"] == pytest.approx(ratio) and row["what"] in result.stdout
    curves = {(row["kind"], row["seed"]): row["losses"] for row in parts["curves"]["rows"]}
    assert all(len(losses) == 10 for losses in curves.values())
    assert curves["fast", 0] == pytest.approx(curves["fp32", 0], rel=0.02)
    assert curves["fast", 0] != curves["fp32", 0]
    assert curves["fp32", 1] != pytest.approx(curves["fp32", 0], rel=0.02)
    assert report.verdict(parts["curves"]["rows"]) in result.stdout


def good(value: int) -> dict:
    return {"value": value}


def fails() -> dict:
    raise ValueError("no such thing\nand more")


def dies() -> dict:
    os._exit(3)


def hangs() -> dict:
    time.sleep(600)


def test_a_variant_that_fails_dies_or_hangs_is_reported_and_the_others_go_on():
    def job(function, limit=60.0, **options):
        return Job({"what": function.__name__}, "one", function, options, limit)

    with measuring.Processes() as processes:
        rows = [row for _, row in processes.measured([job(good, value=1), job(hangs, 0.5), job(dies)])]
    assert rows[0] == {"what": "good", "value": 1}
    assert rows[1] == {"what": "hangs", "failed": "nothing came back within 0.5 s"}
    assert rows[2] == {"what": "dies", "failed": "its process died (exit code 3)"}
    rows = [row for _, row in measuring.measured_at_once([job(fails), job(good, value=2)])]
    assert rows == [{"what": "fails", "failed": "ValueError: no such thing"}, {"what": "good", "value": 2}]
    assert "failed: ValueError: no such thing" in report.cells(rows[0] | {"batch": 8}, training=True)
    assert report.table(["why"], [["failed: a | b"]])[-1] == "| failed: a / b |"
    assert "FAILED: ValueError" in benchmark.in_words(rows[0])


def test_what_went_on_without_compilation_is_not_measured_as_compiled(monkeypatch):
    def compiler(model, **_):
        def forward(*_):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

        return forward

    monkeypatch.setattr(torch, "compile", compiler)
    subject = benchmark.Subject("shapes", 16, 8, (1, 2, 2), 0)
    with pytest.raises(measuring.FellBack, match="no C"), measuring.nothing_given_up():
        benchmark.our_training(subject, 2, {"COMPILE_MODEL": True}, None, 0.0)


def test_a_part_takes_the_place_of_the_one_measured_before_and_of_no_other(tmp_path):
    path = tmp_path / "results" / "benchmark-x.json"
    rows = [{"what": "a", "rounds": [1.5, 2e-7, 3.0]}, {"what": "b", "failed": "[1, 2]"}]
    report.merge(path, "cifar10", "training", {"rows": rows})
    report.merge(path, "celeba", "training", {"rows": []})
    report.merge(path, "cifar10", "sampling", {"rows": rows[:1]})
    whole = report.merge(path, "cifar10", "training", {"rows": rows[1:]})
    expected = {"training": {"rows": rows[1:]}, "sampling": {"rows": rows[:1]}}
    assert json.loads(path.read_text()) == whole == {"cifar10": expected, "celeba": {"training": {"rows": []}}}
    assert '"rounds": [1.5, 2e-07, 3.0]' in path.read_text()
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        report.merge(path, "cifar10", "training", {})


def test_the_tables_in_the_readme_are_those_of_the_results(tmp_path):
    copy = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", copy)
    report.write_readme(copy, ROOT / "results")
    assert copy.read_bytes() == (ROOT / "README.md").read_bytes(), "run `python benchmark.py --readme`"
    report.write_readme(copy, tmp_path)
    assert len(copy.read_text()) < len((ROOT / "README.md").read_text())
    copy.write_text("no marks")
    with pytest.raises(UserError, match="has no lines"):
        report.write_readme(copy, ROOT / "results")


LARGE = tier_of(80.0)


def test_results_are_filed_under_the_network_that_they_are_of(monkeypatch):
    """Fails when a preset changes: then what was measured of its former network needs the key of that one."""
    monkeypatch.setattr(benchmark, "detect_tier", lambda: LARGE)
    for file in (ROOT / "results").glob("benchmark-NVIDIA*.json"):
        for key, parts in report.load(file).items():
            for part in parts.values():
                network = {**part, "dim_mults": tuple(part["dim_mults"])}
                subject = benchmark.Subject(key.split("-")[0], *(network[name.lower()] for name in benchmark.NETWORK))
                assert subject.key() == key, file
    preset = benchmark.Subject.of(resolve("cifar10", LARGE))
    assert preset.key() == "cifar10"
    changed = {"image_size": 16, "dim": 64, "dim_mults": (1, 2), "full_attention_size": 8}
    keys = {dataclasses.replace(preset, **{name: value}).key() for name, value in changed.items()}
    assert len(keys | {"cifar10"}) == 5


def test_a_peer_has_as_many_parameters_or_a_reason_to_be_left_out(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(benchmark, "detect_tier", lambda: LARGE)
    of_issue = benchmark.Subject("cifar10", 32, 64, (1, 2, 4, 8), 0)
    for subject in (of_issue, *(benchmark.Subject.of(resolve(name, LARGE)) for name in ("cifar10", "celeba", "stl10"))):
        assert not subject.without_diffusers()
        with torch.device("meta"):
            peer, ours = subject.diffusers_unet(), DDPMModel.from_config(subject.config()).unet
        assert sum(p.numel() for p in peer.parameters()) == pytest.approx(
            sum(p.numel() for p in ours.parameters()), rel=0.1
        )
    assert "parameters" in dataclasses.replace(of_issue, dim=8).without_diffusers()
    assert "multiple of 8" in benchmark.Subject("cifar10", 20, 64, (1, 2), 0).without_diffusers()


def test_on_a_gpu_the_library_and_the_fast_path_come_first_and_one_variant_is_compiled():
    subject = benchmark.Subject("cifar10", 32, 64, (1, 2, 4, 8), 0)
    jobs = benchmark.training_jobs(subject, (128, 256, 512), 1, quick=False, gpu=True, diffusers=True)
    rows = [(job.row["what"], job.row["batch"]) for job in jobs]
    library, fast = "library's Trainer, fp32", "ours, bf16, CUDA graph"
    assert rows[:4] == [(library, 128), (fast, 128), (library, 512), (fast, 512)]
    assert [what for what, batch in rows if batch == 256] == [fast]
    assert sum("compiled" in what for what, _ in rows) == 1 and len(rows) == len(set(rows))
    quick = benchmark.training_jobs(subject, (128,), 1, quick=True, gpu=True, diffusers=False)
    assert [(job.row["what"], job.row["batch"]) for job in quick][:2] == rows[:2] and len(quick) < 4


def test_sampling_is_measured_as_a_user_samples_guide_and_all():
    subject = benchmark.Subject("cifar10", 16, 8, (1, 2), 0)
    first = next(job for job in benchmark.sampling_jobs(subject, 1, quick=True, gpu=False) if "ours" in job.row["what"])
    assert (first.row["sampler"], first.row["steps"]) == ("unipc", resolve("cifar10", LARGE).SAMPLING_TIMESTEPS)
    model, calls = benchmark.untrained(subject, torch.device("cpu")), []
    for network in (model.unet, model.guide):
        network.register_forward_hook(lambda *_: calls.append(1))
    result = first.measure(**first.options)
    assert len(calls) == 2 * result["evaluations"]  # one draw before the clock starts, one on it
    assert first.row["steps"] < result["evaluations"] <= 20
    cells = report.cells(first.row | result, training=False)
    assert cells[2:4] == [str(first.row["steps"]), str(result["evaluations"])]


def test_utilisation_is_the_arithmetic_over_what_the_device_does():
    height, width, channels, features = 6, 10, 3, 5
    work = measuring.training_flops(lambda: nn.Conv2d(channels, features, 3, padding=1), (1, channels, height, width))
    assert work == 3 * 2 * 9 * channels * features * height * width
    assert measuring.utilisation(200.0, work, 1000.0 * work) == pytest.approx(0.2)


def test_the_verdict_compares_the_fast_path_with_the_spread_of_seeds():
    def rows(fast):
        ends = {("fp32", 0): 0.30, ("fp32", 1): 0.33, ("fp32", 2): 0.31, ("fast", 0): fast}
        return [{"kind": k, "seed": s, "losses": [9.0] * 400 + [end] * 100} for (k, s), end in ends.items()]

    assert report.tail(rows(0.3)[0]["losses"]) == pytest.approx(0.30)
    assert "0.02000 from fp32 of the same seed" in report.verdict(rows(0.28))
    assert "up to 0.03000 from each other: within" in report.verdict(rows(0.28))
    assert "OUTSIDE" in report.verdict(rows(0.26))
    assert "not decided" in report.verdict(rows(0.3)[:3])


def test_the_estimate_is_what_the_preset_trains_on_over_the_speed():
    line = benchmark.in_time("cifar10", {"images_per_second": 1000.0, "fit": 4096})
    minutes = 120 * (49_484 // 256) * 256 / 1000 / 60  # 120 epochs of the images that are not held out
    assert f"{minutes:.1f} minutes (120 epochs, 5.93 M images at 1,000 images/s)" in line and "up to 4096" in line
