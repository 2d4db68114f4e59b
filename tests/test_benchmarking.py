"""engine/benchmarking.py: worker processes, timing, results files and tables."""

import datetime
import json
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import benchmarking, distributed
from engine.benchmarking import BenchmarkJob, run_job
from engine.errors import FallbackWarning, UserError
from tests.forked_script import FORKSERVER
from tests.helpers import CPU, ROOT

# Workers.


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


def add_ranks(device: torch.device) -> dict:
    ranks = torch.tensor([distributed.launched_rank() + 1, 1])
    distributed.all_reduce(ranks)
    return {"sum": ranks.tolist(), "rank": distributed.launched_rank()}


def fail_on_rank_1(device: torch.device) -> dict:
    return (fail if distributed.launched_rank() else hang)(device)


def die_on_rank_1(device: torch.device) -> dict:
    return (die if distributed.launched_rank() else hang)(device)


def die_on_rank_0(device: torch.device) -> dict:
    return (hang if distributed.launched_rank() else die)(device)


def test_run_completes_the_row_of_a_job():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert run_job(BenchmarkJob({"what": "a"}, succeed)) == {"what": "a", "value": expected}


@pytest.fixture
def forked(monkeypatch):
    """A forked worker starts faster than a spawned one."""
    monkeypatch.setattr(benchmarking.multiprocessing, "get_context", lambda _: FORKSERVER)


@pytest.mark.parametrize(
    ("measure", "ranks", "limit", "reason"),
    [
        (fail, 1, 120.0, "ValueError: no such thing"),
        (fall_back, 1, 120.0, "FallbackWarning: torch.compile failed; continuing without it"),
        (die, 1, 120.0, "the process died (exit code 3)"),
        (hang, 1, 0.5, "no result within 0.5 s"),
        (fail_on_rank_1, 2, 120.0, "ValueError: no such thing"),
        (die_on_rank_1, 2, 120.0, "the process died (exit code 3)"),
        (die_on_rank_0, 2, 120.0, "the process died (exit code 3)"),
        (hang, 2, 0.5, "no result within 0.5 s"),
    ],
)
def test_run_reports_why_a_job_has_no_result(forked, measure, ranks, limit, reason):
    row = run_job(BenchmarkJob({"what": "a"}, measure, ranks=ranks, limit=limit))
    assert row == {"what": "a", "failed": reason}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU for each rank")
def test_run_returns_what_rank_0_measured_with_the_others(forked):
    row = run_job(BenchmarkJob({"what": "a"}, add_ranks, ranks=2))
    assert row == {"what": "a", "sum": [3, 2], "rank": 0}


# Timing.


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock in seconds that advances when a test says so."""
    clock = SimpleNamespace(now=0.0)
    timer = partial(benchmarking.Timer, timer=lambda: clock.now)
    monkeypatch.setattr(benchmarking, "Timer", timer)
    return clock


def test_time_steps_excludes_the_warm_up(clock):
    calls = []

    def step() -> None:
        calls.append(1)
        clock.now += 2.0 if len(calls) > 2 else 100.0

    row = benchmarking.time_steps(step, 8, CPU, round_seconds=6.0)
    assert row["images_per_second"] == 4 and row["rounds"] == [4] * benchmarking.ROUNDS
    assert (row["ms"], row["peak_gib"]) == (2000, None)
    assert len(calls) == 3 + (2 + 3) * benchmarking.ROUNDS  # 3 steps a round, 2 before each


def test_time_steps_returns_the_median_round(clock):
    seconds = iter([1.0] * 3 + [9.0, 9.0, 1.0] + [9.0, 9.0, 4.0] + [9.0, 9.0, 2.0])

    def step() -> None:
        clock.now += next(seconds)

    row = benchmarking.time_steps(step, 8, CPU, round_seconds=0.0)
    assert row["rounds"] == [8, 2, 4] and row["images_per_second"] == 4


def test_time_steps_takes_as_many_steps_on_all_ranks(monkeypatch):
    calls = []
    monkeypatch.setattr(benchmarking.distributed, "broadcast_object", lambda _: 7)  # of rank 0
    benchmarking.time_steps(lambda: calls.append(1), 8, CPU, round_seconds=0.0)
    assert len(calls) == 3 + (2 + 7) * benchmarking.ROUNDS


def test_time_steps_uses_the_threads_of_the_process(two_cores):
    threads = []
    benchmarking.time_steps(lambda: threads.append(torch.get_num_threads()), 1, CPU, 0.0)
    assert set(threads) == {2}


# Formats.


def test_rows_carry_each_figure_with_its_heading(run_rows, capsys):
    row = {"what": "ours, fp32", "batch": 8, "images_per_second": 1234.5, "rounds": [1.0]}
    row |= {"ms": 6.5, "peak_gib": None, "mfu": 0.125, "speedup": 3.25}
    loss = {"kind": "loss", "seed": 1, "ranks": 2, "validation_loss": 0.25}
    run_rows([row, loss, {"what": "a", "batch": 8, "failed": "ValueError: a | b"}])
    assert capsys.readouterr().out.splitlines()[:3] == [
        "training: ours, fp32: batch 8, images/s 1,234, ms 6.5, MFU 12.5%, speedup 3.25",
        "training: loss: seed 1, ranks 2, validation loss 0.25000, difference 0.00000",
        "training: a: batch 8, failed ValueError: a | b",
    ]


def test_failures_show_in_tables():
    row = {"what": "a", "batch": 8, "failed": "ValueError: a | b"}
    text = benchmarking.markdown_section("", RESULT | {"rows": [row]})
    assert text.splitlines()[-1] == "| a | 8 | ValueError: a / b |"


# Files.


PATH = Path("results/benchmark-NVIDIA-H100-80GB-HBM3.json")
RESULT = {"device": "none", "torch": "0", "date": "2026-01-02", "command": "python benchmark.py"}


@pytest.fixture
def run_rows(monkeypatch, tmp_path):
    """Runs a section whose jobs return given rows, or raise what stands in place of one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(sys, "argv", ["/a/folder/benchmark.py", "--quick"])

    def measure(job):
        if isinstance(job.row, BaseException):
            raise job.row
        return dict(job.row)

    def run(rows: list, section: str = "training", **about: int) -> dict:
        jobs = [BenchmarkJob(row, lambda: None) for row in rows]
        benchmarking.run_section("benchmark", "cifar10", section, about, jobs, "speedup")
        return benchmarking.read_report(PATH)

    monkeypatch.setattr(benchmarking, "run_job", measure)
    return run


def test_reports_are_read_as_they_were_written(run_rows):
    assert benchmarking.read_report(PATH) == {}
    rows = [{"what": "a", "images_per_second": 2.0, "batch": 1, "rounds": [1.5, 2e-7, 3.0]}]
    rows += [{"what": "b", "failed": "[1,  2]"}]
    result = run_rows(rows, dim=8)["cifar10"]["training"]
    assert result == {
        "device": "NVIDIA H100 80GB HBM3", "torch": torch.__version__, "rows": rows, "dim": 8,
        "date": datetime.date.today().isoformat(), "command": "python benchmark.py --quick",
    }  # fmt: skip
    assert '"rounds": [1.5, 2e-07, 3.0]' in PATH.read_text()


def test_rows_outlive_what_ends_the_script(run_rows):
    run_rows([{"what": "a"}], section="sampling")
    run_rows([{"what": "b"}])
    with pytest.raises(KeyboardInterrupt):
        run_rows([{"what": "c"}, {"what": "d"}, KeyboardInterrupt()])
    report = benchmarking.read_report(PATH)["cifar10"]
    assert {key: [row["what"] for row in report[key]["rows"]] for key in report} == {
        "sampling": ["a"],
        "training": ["c", "d"],
    }
    assert [path.name for path in PATH.parent.iterdir()] == [PATH.name]


def test_damaged_reports_are_found_before_anything_is_measured(run_rows):
    PATH.parent.mkdir()
    PATH.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        run_rows([KeyboardInterrupt()])


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"cifar10": 3}', '{"rows": []}', '{"a": {"b": {"rows": [1]}}}']
)
def test_damaged_reports_are_named(tmp_path, text):
    path = tmp_path / "benchmark-x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"benchmark-x.json is damaged .*Delete it"):
        benchmarking.read_report(path)


def test_read_report_names_a_single_result_after_its_section_and_keys_as_today(tmp_path):
    row = {"kind": "loss", "processes": 1, "over_library": 2.5, "evaluations": 19}
    path = tmp_path / "scaling-some-device.json"
    path.write_text(json.dumps(RESULT | {"rows": [row]}))
    rows = [{"kind": "loss", "ranks": 1, "speedup": 2.5, "nfe": 19}]
    assert benchmarking.read_report(path) == {"": {"scaling": RESULT | {"rows": rows}}}


# Docs.


def test_docs_are_what_the_command_writes(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = benchmarking.DOCS.read_text(encoding="utf-8")
    assert page == benchmarking.docs_page(), "run `python benchmark.py --docs`"
    assert page.startswith("# Benchmarks\n\nWritten by `python benchmark.py --docs`")


def test_docs_have_every_row_with_its_origin():
    page = benchmarking.docs_page(ROOT / "results")
    rows = 0
    for path in (ROOT / "results").glob("*.json"):
        for sections in benchmarking.read_report(path).values():
            for result in sections.values():
                rows += len(result["rows"])
                for name in ("device", "torch", "date", "command"):
                    assert result[name] in page
                for name in ("note", "agreement"):
                    assert result.get(name, "") in page
    tables = [line for line in page.splitlines() if line.startswith("| ")]
    headers = [line for line in tables if line.startswith("| ---")]
    assert len(tables) - 2 * len(headers) == rows > 50


def test_markdown_has_the_columns_that_rows_have():
    rows = [{"kind": "weak", "dim_mults": [1, 2], "batch": 128, "efficiency": 0.5}]
    rows += [{"kind": "loss", "validation_loss": 0.25, "ms": None}]
    text = benchmarking.markdown_section("a key", RESULT | {"note": "slow", "rows": rows})
    assert text.splitlines() == [
        "### a key, none",
        "",
        "`python benchmark.py`; torch: 0; date: 2026-01-02; note: slow",
        "",
        "| kind | dim_mults | batch | efficiency | validation loss |",
        "| --- | --- | --- | --- | --- |",
        "| weak | 1,2 | 128 | 50.0% |  |",
        "| loss |  |  |  | 0.25000 |",
    ]
