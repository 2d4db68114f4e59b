"""engine/benchmarking.py: worker processes, timing, results files, tables and plots."""

import itertools
import json
import os
import signal
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from engine import benchmarking
from engine.benchmarking import BenchmarkJob, run_job
from engine.errors import FallbackWarning, UserError
from tests.forked_script import FORKSERVER
from tests.helpers import CPU, ROOT

# --- workers


def succeed(device: torch.device) -> dict:
    return {"value": device.type}


def fail(device: torch.device) -> dict:
    raise ValueError("no such thing\nand more")


def fall_back(device: torch.device) -> dict:
    warnings.warn("torch.compile failed; continuing without it", FallbackWarning, stacklevel=2)
    return {"images_per_second": 1.0}


def die(device: torch.device) -> dict:
    os._exit(3)


def hang(device: torch.device) -> dict:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
    return {}


def test_run_completes_the_row_of_a_job():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert run_job(BenchmarkJob({"what": "a"}, succeed)) == {"what": "a", "value": expected}


@pytest.mark.parametrize(
    ("measure", "limit", "reason"),
    [
        (fail, 120.0, "ValueError: no such thing"),
        (fall_back, 120.0, "FallbackWarning: torch.compile failed; continuing without it"),
        (die, 120.0, "the process died (exit code 3)"),
        (hang, 0.5, "no result within 0.5 s"),
    ],
)
def test_run_reports_why_a_job_has_no_result(monkeypatch, measure, limit, reason):
    # A forked worker starts faster than a spawned one.
    monkeypatch.setattr(benchmarking.multiprocessing, "get_context", lambda _: FORKSERVER)
    start = time.monotonic()
    row = run_job(BenchmarkJob({"what": "a"}, measure, limit))
    assert row == {"what": "a", "failed": reason}
    assert time.monotonic() - start < 120


# --- timing


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock in seconds that advances when a test says so."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(benchmarking, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_time_steps_excludes_the_warm_up(clock):
    calls = []

    def step() -> None:
        calls.append(1)
        clock.now += 2.0 if len(calls) > benchmarking.WARM_UP else 100.0

    def make_step():
        clock.now += 1000.0
        return step

    row = benchmarking.time_steps(make_step, 8, CPU, round_seconds=6.0)
    assert row["images_per_second"] == 4 and row["rounds"] == [4] * benchmarking.ROUNDS
    assert (row["ms"], row["first_step"], row["peak_gib"]) == (2000, 1100, None)
    assert len(calls) == 1 + benchmarking.WARM_UP + 3 * benchmarking.ROUNDS


def test_time_steps_returns_the_median_round(clock):
    seconds = itertools.chain([1.0] * (1 + benchmarking.WARM_UP), [1.0, 4.0, 2.0])

    def step() -> None:
        clock.now += next(seconds)

    row = benchmarking.time_steps(lambda: step, 8, CPU, round_seconds=0.0)
    assert row["rounds"] == [8, 2, 4] and row["images_per_second"] == 4


class Convolution(nn.Conv2d):
    """A network of known arithmetic that takes timesteps, too."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_training_flops_counts_forward_and_backward():
    with torch.device("meta"):
        network = Convolution(3, 5, 3, padding=1)
    assert benchmarking.training_flops(network, 6) == 3 * 2 * 9 * 3 * 5 * 6 * 6


@pytest.mark.parametrize(("is_gpu", "size"), [(True, 8192), (False, 2048)])
def test_matmul_flops_is_arithmetic_over_time(monkeypatch, is_gpu, size):
    shapes = []
    device = torch.device("cuda" if is_gpu else "cpu")
    randn = lambda *shape, **options: shapes.append((shape, options)) or (None, None)  # noqa: E731
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(benchmarking, "amp_dtype", lambda device: torch.float16)
    rates = {"images_per_second": 10.0}
    monkeypatch.setattr(benchmarking, "time_steps", lambda *_: rates)
    assert benchmarking.matmul_flops(device) == 2 * size**3 * 10
    dtype = torch.float16 if is_gpu else torch.float32
    assert shapes == [((2, size, size), {"device": device, "dtype": dtype})]


# --- formats


def test_rows_carry_each_figure_with_its_heading():
    row = {"what": "ours, fp32", "batch": 8, "images_per_second": 1234.5, "rounds": [1.0]}
    row |= {"ms": 6.5, "peak_gib": None, "mfu": 0.125, "over_library": 3.25}
    text = "ours, fp32: batch 8, images/s 1,234, ms 6.5, MFU 12.5%, speedup 3.25"
    assert benchmarking.format_row(row) == text
    loss = {"kind": "loss", "seed": 1, "processes": 2, "validation_loss": 0.25}
    text = "loss: seed 1, ranks 2, validation loss 0.25000"
    assert benchmarking.format_row(loss) == text


def test_failures_show_in_lines_and_tables():
    row = {"what": "a", "batch": 8, "failed": "ValueError: a | b"}
    assert benchmarking.format_row(row) == "a: batch 8, failed ValueError: a | b"
    text = benchmarking.markdown_section("", RESULT | {"rows": [row]})
    assert text.splitlines()[-1] == "| a | 8 | ValueError: a / b |"


@pytest.mark.parametrize(("loss", "verdict"), [(0.105, ": within"), (0.13, ": not within")])
def test_compare_losses_measures_by_the_spread_of_seeds(loss, verdict):
    seeds = [("1 ranks", 0.11), ("1 ranks", 0.10), ("1 ranks", 0.115)]
    others = [("2 ranks", 0.11), ("4 ranks", loss)]
    text = benchmarking.compare_losses(seeds + others, "1 ranks")
    assert f"{verdict} the spread of three seeds, 0.01500" in text
    assert f"0.00000 (2 ranks), {abs(loss - 0.11):.5f} (4 ranks)" in text
    assert "too few" in benchmarking.compare_losses(seeds[1:] + others, "1 ranks")
    assert "too few" in benchmarking.compare_losses(seeds, "1 ranks")


# --- files


RESULT = {"device": "none", "torch": "0", "date": "2026-01-02", "command": "python benchmark.py"}


def test_reports_are_read_as_they_were_written(tmp_path):
    rows = [{"what": "a", "images_per_second": 2.0, "batch": 1, "rounds": [1.5, 2e-7, 3.0]}]
    rows += [{"what": "b", "failed": "[1, 2]"}]
    report = {"cifar10": {"training": RESULT | {"rows": rows}}}
    path = tmp_path / "results" / "benchmark-x.json"
    assert benchmarking.read_report(path) == {}
    benchmarking.write_report(path, report)
    assert benchmarking.read_report(path) == report
    assert '"rounds": [1.5, 2e-07, 3.0]' in path.read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    path.write_text(path.read_text().replace('"batch"', '"evaluations"'))  # the old name of NFE
    assert benchmarking.read_report(path)["cifar10"]["training"]["rows"][0]["nfe"] == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"cifar10": 3}', '{"rows": []}', '{"a": {"b": {"rows": [1]}}}']
)
def test_damaged_reports_are_named(tmp_path, text):
    path = tmp_path / "benchmark-x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"benchmark-x.json is damaged .*Delete it"):
        benchmarking.read_report(path)


def test_files_with_a_single_result_are_named_after_its_section(tmp_path):
    result = RESULT | {"rows": [{"kind": "loss", "processes": 1}]}
    path = tmp_path / "scaling-some-device.json"
    benchmarking.write_report(path, result)
    assert json.loads(path.read_text()) == result
    assert benchmarking.read_report(path) == {"": {"scaling": result}}


def test_results_path_is_made_of_the_device(monkeypatch):
    path = benchmarking.results_path("scaling", "NVIDIA H100 80GB HBM3")
    assert path.as_posix() == "results/scaling-NVIDIA-H100-80GB-HBM3.json"


# --- docs


def test_docs_are_what_the_command_writes():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == benchmarking.docs_page(ROOT / "results"), "run `python benchmark.py --docs`"


def test_docs_have_every_row_with_its_origin():
    page = benchmarking.docs_page(ROOT / "results")
    rows = 0
    for path in (ROOT / "results").glob("*.json"):
        for sections in benchmarking.read_report(path).values():
            for result in sections.values():
                rows += sum(row.get("kind") != "loss" for row in result["rows"])
                for name in ("device", "torch", "date", "command"):
                    assert result[name] in page
                for name in ("note", "agreement"):
                    assert result.get(name, "") in page
    tables = [line for line in page.splitlines() if line.startswith("| ")]
    headers = [line for line in tables if line.startswith("| ---")]
    assert len(tables) - 2 * len(headers) == rows > 50


def test_markdown_has_the_columns_that_rows_have():
    rows = [{"kind": "weak", "dim_mults": [1, 2], "batch": 128, "efficiency": 0.5}]
    rows += [{"kind": "loss", "validation_loss": 0.25}]
    text = benchmarking.markdown_section("a key", RESULT | {"note": "slow", "rows": rows})
    assert text.splitlines() == [
        "### a key, none",
        "",
        "`python benchmark.py`; torch: 0; date: 2026-01-02; note: slow",
        "",
        "| kind | dim_mults | batch | efficiency |",
        "| --- | --- | --- | --- |",
        "| weak | 1,2 | 128 | 50.0% |",
    ]


def test_plot_shows_speeds_and_curves(tmp_path):
    speeds = [{"what": str(i), "batch": 8, "images_per_second": 1.0 + i} for i in range(3)]
    curve = {"what": "ours", "seed": 0, "losses": [3.0, 2.0, 1.0]}
    report = {"a": {"training": RESULT | {"rows": speeds}, "curves": RESULT | {"rows": [curve]}}}
    benchmarking.plot_report(report, tmp_path / "plot.png")
    pixels = np.asarray(Image.open(tmp_path / "plot.png").convert("L"))
    height = len(pixels)
    assert pixels[: height // 2].std() > 5 and pixels[height // 2 :].std() > 5
