"""scaling.py: what each number of ranks measures, and what the rows add up to."""

import json
import sys

import pytest
import torch

import benchmark
import scaling
from engine import benchmarking
from engine.benchmarking import BenchmarkJob
from engine.errors import UserError
from scaling import ScalingSettings
from tests.helpers import CPU, RecordedStep


def settings(**values) -> ScalingSettings:
    small = {"DIM": 8, "IMAGE_SIZE": 16, "BATCHES": (3, 5), "LARGE_BATCH": 2}
    return ScalingSettings(**small | {"EFFECTIVE_BATCH": 16, "STEPS": 10, "SECONDS": 6.0} | values)


# Jobs.


def test_configuration_is_the_presets_with_the_local_batch():
    configs = [job.measure.args[0] for job in scaling.jobs_on_ranks(settings(), 2)]
    cifar10, *_, stl10, _ = configs
    assert (cifar10.BATCH_SIZE, cifar10.GRADIENT_ACCUMULATION) == (3, 1)
    assert (cifar10.DIM, cifar10.IMAGE_SIZE, cifar10.DATASET) == (8, 16, "cifar10")
    assert (stl10.BATCH_SIZE, stl10.GRADIENT_ACCUMULATION, stl10.DATASET) == (2, 4, "stl10")
    *_, weak, _, _, _ = scaling.jobs_on_ranks(ScalingSettings(), 2)
    config = weak.measure.args[0]
    assert (config.BATCH_SIZE, config.DIM, config.IMAGE_SIZE) == (64, 128, 96)


def test_parts_of_a_batch_are_equal():
    for job in scaling.jobs_on_ranks(settings(LARGE_BATCH=4, EFFECTIVE_BATCH=18), 1):
        (config,) = job.measure.args
        assert config.BATCH_SIZE * config.GRADIENT_ACCUMULATION == job.row["batch"]
        assert config.BATCH_SIZE <= 4 or config.DATASET != "stl10"


@pytest.mark.parametrize("is_gpu", [True, False])
def test_gpus_are_measured_in_mixed_precision_and_cuda_graphs(is_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_gpu)
    for job in scaling.jobs_on_ranks(settings(), 2):
        (config,) = job.measure.args
        assert config.USE_AMP is config.CUDA_GRAPH is is_gpu


def test_work_is_divided_among_ranks():
    def work(count: int, **values) -> list[tuple]:
        jobs = scaling.jobs_on_ranks(settings(**values), count)
        assert {job.ranks for job in jobs} == {job.row["ranks"] for job in jobs} == {count}
        keys = ("kind", "preset", "batch", "seed")
        return [tuple(job.row.get(key) for key in keys) for job in jobs]

    weak = [("weak", "cifar10", 3, None), ("weak", "cifar10", 5, None), ("weak", "stl10", 2, None)]
    strong = [("strong", "cifar10", 4, None), ("strong", "stl10", 4, None)]
    assert work(4) == [*weak, *strong, ("loss", "cifar10", 4, 0)]
    assert work(1)[-3:] == [("loss", "cifar10", 16, seed) for seed in scaling.SEEDS]
    assert work(4, STEPS=0) == [*weak, *strong]


def test_speed_is_that_of_all_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    made = []
    monkeypatch.setattr(RecordedStep, "made", made)
    monkeypatch.setattr(benchmark, "TrainStep", RecordedStep)
    monkeypatch.setattr(benchmark, "compute_mfu", lambda *_: 0.5)

    def time_steps(step, images, device, seconds):
        step()
        return {"images_per_second": float(images), "seconds": seconds}

    monkeypatch.setattr(benchmark, "time_steps", time_steps)
    for job in scaling.jobs_on_ranks(settings(STEPS=0, TIME_LIMIT=7.0), 4):
        row = job.row | job.measure(device=CPU)
        config = made[-1].config
        assert (made[-1].ranks, row["seconds"], job.limit) == ((3, 4), 6.0, 7.0)
        assert config.BATCH_SIZE * config.GRADIENT_ACCUMULATION == row["batch"]
        assert 4 * row["batch"] == row["images_per_second"]
        assert (config.DATASET, config.DIM) == (row["preset"], row["dim"])
        assert (row["image_size"], row["dim_mults"]) == (16, config.DIM_MULTS)


def test_loss_is_of_the_effective_batch():
    *_, job = scaling.jobs_on_ranks(settings(), 4)
    (config,) = job.measure.args
    assert job.measure.func is benchmark.learning_curve
    assert job.measure.keywords == {"steps": 10, "seed": 0}
    assert (config.BATCH_SIZE, config.GRADIENT_ACCUMULATION, config.DATASET) == (4, 1, "cifar10")
    found = {key: job.row[key] for key in ("kind", "seed", "steps", "ranks", "batch")}
    assert found == {"kind": "loss", "seed": 0, "steps": 10, "ranks": 4, "batch": 4}


# Main.


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """Calls main on a CPU with speeds by (kind, preset, ranks, batch); returns the report.

    A row without a speed fails.
    """

    def call(speeds: dict[tuple, float], *flags: str) -> dict:
        def run(job: BenchmarkJob) -> dict:
            row = job.row
            if row["kind"] == "loss":
                loss = 0.1 + row["seed"] / 100 - (0.01 if row["ranks"] > 1 else 0)
                return row | {"validation_loss": loss}
            key = (row["kind"], row["preset"], row["ranks"], row["batch"])
            speed = speeds.get(key)
            return row | ({"images_per_second": speed} if speed else {"failed": "no memory"})

        monkeypatch.setattr(benchmarking, "run_job", run)
        monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
        scaling.main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return call


def written(folder) -> dict:
    (path,) = (folder / "results").glob("scaling-*.json")
    return json.loads(path.read_text())[""]["scaling"]


SPEEDS = {
    ("weak", "cifar10", 1, 128): 100.0, ("weak", "cifar10", 1, 512): 300.0,
    ("weak", "stl10", 1, 64): 9.0, ("weak", "stl10", 4, 64): 9.0,
    ("strong", "cifar10", 1, 512): 300.0, ("strong", "stl10", 1, 512): 10.0,
    ("weak", "cifar10", 4, 128): 360.0, ("weak", "cifar10", 4, 512): 600.0,
    ("strong", "cifar10", 4, 128): 900.0, ("strong", "stl10", 4, 128): 38.0,
}  # fmt: skip


def test_efficiency_is_over_single_gpus_with_the_same_work(run_main, tmp_path):
    run_main(SPEEDS, "--ranks", "4,1", "--dim", "64")
    rows = written(tmp_path)["rows"]
    found = {
        (row["kind"], row["preset"], row["ranks"], row["batch"]): row["efficiency"]
        for row in rows if row["kind"] != "loss"
    }  # fmt: skip
    assert found == {key: 1 for key in found if key[2] == 1} | {
        ("weak", "cifar10", 4, 128): 0.9, ("weak", "cifar10", 4, 512): 0.5,
        ("weak", "stl10", 4, 64): 0.25, ("strong", "cifar10", 4, 128): 0.75,
        ("strong", "stl10", 4, 128): 0.95,
    }  # fmt: skip
    losses = [row for row in rows if row["kind"] == "loss"]
    assert [row["ranks"] for row in losses] == [1, 1, 1, 4]
    differences = [row["loss_difference"] for row in losses]
    assert differences == pytest.approx([0, 0.01, 0.02, -0.01])

    # Rows of the same work stand together.
    table = benchmarking.markdown_section("", written(tmp_path)).splitlines()[4:]
    columns = "| ranks | batch | images/s | efficiency | validation loss | difference |"
    assert table[0].endswith(columns) and len(table) == 2 + len(rows)
    start = table.index(
        "| weak | cifar10 | 32 | 64 | 1,2,2,2 |  |  | 1 | 128 | 100 | 100.0% |  |  |"
    )
    assert table[start + 1 : start + 4] == [
        "| weak | cifar10 | 32 | 64 | 1,2,2,2 |  |  | 4 | 128 | 360 | 90.0% |  |  |",
        "| weak | cifar10 | 32 | 64 | 1,2,2,2 |  |  | 1 | 512 | 300 | 100.0% |  |  |",
        "| weak | cifar10 | 32 | 64 | 1,2,2,2 |  |  | 4 | 512 | 600 | 50.0% |  |  |",
    ]


def test_main_writes_what_was_measured_next_to_a_failure(run_main, tmp_path):
    speeds = {key: value for key, value in SPEEDS.items() if key != ("weak", "stl10", 1, 64)}
    with pytest.raises(UserError, match="1 of 10 rows have no result") as error:
        run_main(speeds, "--ranks", "1,4", "--steps", "0")
    assert error.value.exit_code == 1
    report = written(tmp_path)
    assert report["command"] == "python scaling.py --ranks 1,4 --steps 0"
    found = {row["ranks"]: row for row in report["rows"] if row["preset"] == "stl10"}
    assert sum("efficiency" in row for row in report["rows"]) == 8
    failed = [row for row in report["rows"] if "failed" in row]
    assert [(row["kind"], row["ranks"]) for row in failed] == [("weak", 1)] and len(found) == 2


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--ranks", "3"], "cannot be divided by 3 ranks"),
        (["--ranks", "8"], "asks for 8, but there are 4 GPUs"),
    ],
)
def test_main_refuses_impossible_numbers_of_ranks(monkeypatch, flags, reason):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
    with pytest.raises(UserError, match=reason) as error:
        scaling.main()
    assert error.value.exit_code == 2
