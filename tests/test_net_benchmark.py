"""Which rate, which network, which clock: the wiring of benchmark.py and scaling.py."""

import argparse
import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmark
import scaling
from config import Tier, resolve, tier_of
from engine import batches, measuring
from engine.measuring import Job

CPU = torch.device("cpu")
LARGE = tier_of(80.0)
SUBJECT = benchmark.Subject("cifar10", 16, 8, (1, 2), 0)
DIFFUSERS = f"{benchmark.DIFFUSERS}, bf16"


# --- rows


def speed(what: str, batch: int, rate: float, **more) -> dict:
    return {"what": what, "batch": batch, "images_per_second": rate, "rounds": [rate]} | more


def test_training_is_compared_with_the_library_at_the_same_batch():
    rows = [
        speed("library's Trainer, fp32", 128, 100.0),
        speed("library's Trainer, fp32", 512, 200.0),
        {"what": "library's Trainer, fp32", "batch": 64, "failed": "no memory"},
    ]
    for batch, expected in ((128, 4.0), (512, 2.0), (64, None), (256, None)):
        row = speed("ours, fp32", batch, 400.0)
        benchmark.complete(row, [*rows, row], {}, None)
        assert row.get("over_library") == expected and "mfu" not in row


def test_sampling_is_compared_with_the_only_row_of_the_library():
    rows = [speed("library, fp32", 64, 2.0, sampler="ddpm")]
    row = speed("ours, fp32", 256, 50.0, sampler="heun")
    benchmark.complete(row, [*rows, row], {}, None)
    assert row["over_library"] == 25


def test_utilization_is_by_the_work_of_the_network_that_ran():
    flops = {"library": 10, "diffusers": 30}
    for what, expected in (("library's Trainer, fp32", 0.5), ("ours, fp32", 0.5), (DIFFUSERS, 1.5)):
        row = speed(what, 8, 5.0)
        benchmark.complete(row, [], flops, 100.0)
        assert row["mfu"] == expected


def test_words_carry_each_figure_with_its_unit():
    row = speed("ours, fp32", 8, 1234.5, ms=6.5, over_library=3.25, mfu=0.125, peak_gib=1.5)
    words = benchmark.in_words(row | {"rounds": [1200.0, 1300.0, 1234.5], "first_step": 7.0})
    assert "1,234.50 images/s (1,200.00 to 1,300.00)" in words
    assert words.endswith("6.50 ms, 3.25 x, 12.5% MFU, 1.50 GiB, first step after 7.0 s")


class Measured:
    """Stands in for Processes: gives every job the rate that its batch is."""

    def __init__(self):
        self.jobs: list[Job] = []

    def measured(self, jobs):
        for job in jobs:
            self.jobs.append(job)
            rate = float(job.row.get("batch", 0))
            if job.measure is measuring.matmul_rate:
                yield job, {"flops_per_second": 3000.0}
            elif job.measure is benchmark.learning_curve:
                yield job, job.row | {"losses": [rate]}
            else:
                yield (
                    job,
                    job.row | {"images_per_second": rate, "rounds": [rate], "first_step": 1.0},
                )


def measured(monkeypatch, part: str, gpu: bool, **changes) -> tuple[list[dict], list[Job]]:
    """What benchmark.measure makes of a part, and the jobs that it has done."""
    monkeypatch.setattr(benchmark, "load_images", lambda *_: None)
    monkeypatch.setattr(benchmark, "work_of", lambda *_, **__: {"library": 30})
    monkeypatch.setattr(benchmark.Subject, "without_diffusers", lambda _: "it is not installed")
    options = {"batch": (8, 2), "threads": 1, "quick": False, "curve_steps": 20} | changes
    processes = Measured()
    rows = benchmark.measure(part, SUBJECT, argparse.Namespace(**options), gpu, processes)
    return rows, processes.jobs


@pytest.mark.parametrize("gpu", [False, True])
def test_training_rows_get_ratio_and_utilization_in_order_of_batch(monkeypatch, gpu):
    rows, jobs = measured(monkeypatch, "training", gpu)
    assert jobs[0].measure is measuring.matmul_rate
    assert jobs[0].options["size"] == (8192 if gpu else 2048)
    assert [row["batch"] for row in rows] == sorted(job.row["batch"] for job in jobs[1:])
    assert all(row["over_library"] == 1 and row["mfu"] == row["batch"] / 100 for row in rows)


def test_data_is_measured_with_the_last_batch_and_curves_with_the_first(monkeypatch):
    rows, jobs = measured(monkeypatch, "data", True)
    assert [row["batch"] for row in rows] == [job.options["batch"] for job in jobs] == [2, 2]
    rows, jobs = measured(monkeypatch, "curves", False)
    assert [row["batch"] for row in rows] == [job.options["batch"] for job in jobs] == [8] * 4


def test_curves_run_at_once_where_memory_allows_it_alone(monkeypatch):
    at_once = []
    monkeypatch.setattr(measuring, "measured_at_once", lambda jobs: at_once.extend(jobs) or ())
    for memory, count in ((24.0, 0), (80.0, 4)):
        monkeypatch.setattr(benchmark, "detect_tier", lambda memory=memory: tier_of(memory))
        _, jobs = measured(monkeypatch, "curves", True)
        assert (len(at_once), len(jobs)) == (count, 4 - count)


# --- jobs


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_training_jobs_do_what_their_rows_say(monkeypatch, gpu, quick):
    monkeypatch.setattr(measuring, "has_cpu_bf16", lambda: True)
    jobs = benchmark.training_jobs(SUBJECT, (4, 6, 8), 3, quick, gpu, diffusers=True)
    for job in jobs:
        what, options = job.row["what"], job.options
        assert options["batch"] == job.row["batch"] and options["subject"] == SUBJECT
        assert options["threads"] == (1 if "1 thread" in what else 3)
        limit = benchmark.LIMIT if gpu else benchmark.CPU_LIMIT
        assert job.limit == limit * (2 if "compiled" in what else 1)
        assert ("compiled" in job.process) == ("compiled" in what)
        if what.startswith("ours"):
            assert job.measure is benchmark.our_training
            words = {"USE_AMP": "bf16", "CUDA_GRAPH": "CUDA graph", "COMPILE_MODEL": "compiled"}
            assert options["flags"] == {name: True for name, word in words.items() if word in what}
        else:
            peers = {"library": benchmark.library_training, "diffuse": benchmark.diffusers_training}
            assert job.measure is peers[what[:7]] and options["amp"] == ("bf16" in what)


@pytest.mark.parametrize("gpu", [False, True])
def test_sampling_jobs_do_what_their_rows_say(monkeypatch, gpu):
    monkeypatch.setattr(measuring, "has_cpu_bf16", lambda: True)
    library, *ours = benchmark.sampling_jobs(SUBJECT, 3, False, gpu)
    assert library.measure is benchmark.library_sampling
    assert f"({library.options['done']} of 1000 steps)" in library.row["what"]
    assert library.row["batch"] == library.options["batch"] and library.row["steps"] == 1000
    for job in ours:
        assert job.measure is benchmark.our_sampling and job.options["threads"] == 3
        same = ("sampler", "steps", "batch")
        assert [job.options[name] for name in same] == [job.row[name] for name in same]
        assert job.options["amp"] == ("bf16" in job.row["what"])
        assert job.options["graph"] == ("CUDA graph" in job.row["what"])
        assert job.options["rounds"] == measuring.ROUNDS


def test_curves_are_of_three_seeds_in_fp32_and_of_the_fast_path_by_the_first():
    for gpu in (False, True):
        jobs = benchmark.curve_jobs(SUBJECT, 4, 20, 3, gpu)
        found = [(job.row["kind"], job.options["seed"], job.options["flags"]) for job in jobs]
        fast = {"USE_AMP": True, "CUDA_GRAPH": gpu}
        assert found == [("fp32", 0, {}), ("fast", 0, fast), ("fp32", 1, {}), ("fp32", 2, {})]
        assert all(job.row["seed"] == job.options["seed"] for job in jobs)
        assert [f"{job.row['what']}"[:4] for job in jobs] == ["fp32", "fast", "fp32", "fp32"]


def test_data_jobs_do_what_their_rows_say():
    found = {job.row["what"]: job.options["resident"] for job in benchmark.data_jobs(SUBJECT, 4)}
    assert found == {"on the GPU": True, "from 8 workers": False}


# --- what is measured


def test_librarys_sampling_counts_all_steps_for_those_that_were_done(monkeypatch):
    taken = []

    class Process(torch.nn.Module):
        num_timesteps = 1000

        def p_sample(self, x, t):
            taken.append(t)
            return x, None

    def draw_rates(draw, batch, rounds):
        taken.clear()
        assert draw().shape == (4, 3, 16, 16) and (batch, rounds) == (4, 1)
        return {"images_per_second": 80.0, "rounds": [80.0]}

    monkeypatch.setattr(benchmark.Subject, "library_process", lambda _: Process())
    monkeypatch.setattr(measuring, "draw_rates", draw_rates)
    found = benchmark.library_sampling(SUBJECT, 4, 5, None)
    assert found == {"images_per_second": 0.4, "rounds": [0.4], "evaluations": 1000}
    assert len(taken) == 5 and (taken[0], taken[-1]) == (999, 0)


@pytest.mark.parametrize("amp", [False, True])
def test_our_sampling_draws_as_it_is_asked(monkeypatch, amp):
    drawn = []

    class Model(SimpleNamespace):
        def plan(self, sampler, steps):
            return sampler, range(steps)

        def evaluations(self, sampler, timesteps):
            return 10 * len(timesteps)

        def sample(self, batch, sampler, steps, seed):
            drawn.append((batch, sampler, steps, seed, torch.is_autocast_enabled("cpu")))
            return torch.zeros(batch)

    model = Model()
    monkeypatch.setattr(benchmark, "untrained", lambda *_: model)
    found = benchmark.our_sampling(SUBJECT, 4, "heun", 7, amp, True, None, 2)
    assert drawn == [(4, "heun", 7, 0, amp)] * 3 and model.cuda_graph is True
    assert found["evaluations"] == 70 and len(found["rounds"]) == 2


def test_our_training_is_with_the_given_flags_and_batch(monkeypatch):
    made, numbers = [], []

    def make_step(subject, device, **flags):
        made.append(flags)
        return lambda images, number, rate: numbers.append((number, images.shape, images.dtype))

    monkeypatch.setattr(benchmark, "make_step", make_step)
    found = benchmark.our_training(SUBJECT, 6, {"USE_AMP": True}, None, 0.0)
    assert made == [{"BATCH_SIZE": 6, "USE_AMP": True}]
    assert numbers == [(i, (6, 3, 16, 16), torch.uint8) for i in range(len(numbers))]
    assert len(numbers) == 1 + measuring.WARM_UP + measuring.ROUNDS
    assert found["ms"] == pytest.approx(1000 * 6 / found["images_per_second"])


def ticking(monkeypatch, module) -> SimpleNamespace:
    """A clock in place of a module's, in seconds, that goes on when a test says so."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.mark.parametrize("resident", [False, True])
def test_data_path_is_timed_once_workers_have_started(monkeypatch, resident):
    clock = ticking(monkeypatch, benchmark)
    monkeypatch.setattr(batches, "GPU_SHARE", 0.25)
    flags = {}

    def make_step(subject, device, **given):
        flags.update(given)
        steps = itertools.count()

        def step(images, number, rate):
            first_epoch = next(steps) < 100
            clock.now += 50.0 if number < 4 else 5.0 if first_epoch else 0.5

        return step

    monkeypatch.setattr(benchmark, "make_step", make_step)
    found = benchmark.data_path(benchmark.Subject("cifar10", 4, 8, (1, 2), 0), 2, resident)
    assert found["images_per_second"] == 4 and found["rounds"] == [4] * measuring.ROUNDS
    assert (1.0 if resident else 0.0) == batches.GPU_SHARE
    assert flags == {"BATCH_SIZE": 2, "USE_AMP": True, "CUDA_GRAPH": True}


def test_learning_curve_is_of_the_shapes_seed_and_rate_that_it_says(monkeypatch):
    made, given = [], []

    def make_step(subject, device, **flags):
        made.append(flags)

        def step(images, number, rate):
            given.append((images[0, 0, 0, 0].item(), len(images), number, rate))
            return torch.tensor(number / 7), None

        return step

    images = np.arange(250, dtype=np.uint8).reshape(250, 1, 1, 1)
    monkeypatch.setattr(benchmark, "make_step", make_step)
    monkeypatch.setattr(benchmark, "SHAPES_COUNT", 250)
    monkeypatch.setattr(benchmark, "load_images", lambda *_: images)
    monkeypatch.setattr(measuring, "prepare", lambda threads: CPU)
    found = benchmark.learning_curve(SUBJECT, 100, 2, 150, {"USE_AMP": True}, 1)
    assert made == [{"BATCH_SIZE": 100, "SEED": 2, "HORIZONTAL_FLIP": False, "USE_AMP": True}]
    assert [first for first, *_ in given] == [0, 100] * 75 and {row[1] for row in given} == {100}
    assert [number for _, _, number, _ in given] == list(range(150))
    rates = [rate for *_, rate in given]
    assert rates[0] == 0 and rates[50] == pytest.approx(2e-4) and rates[149] == 4e-4
    assert found["losses"] == pytest.approx([i / 7 for i in range(150)], abs=1e-5)


@pytest.mark.parametrize(
    ("free", "fragile", "fit"), [(30.0, 999, 128), (34.0, 200, 128), (1.0, 1, 1)]
)
def test_a_presets_fit_is_the_power_of_two_that_runs(monkeypatch, free, fragile, fit):
    tried = []

    def our_training(subject, batch, flags, threads, seconds):
        tried.append((batch, flags["CUDA_GRAPH"], seconds))
        if seconds == 0.0 and len(tried) > 3 and batch > fragile:
            raise torch.OutOfMemoryError
        return {"peak_gib": 1 + batch / 8, "images_per_second": 5.0}

    monkeypatch.setattr(benchmark, "our_training", our_training)
    monkeypatch.setattr(benchmark, "detect_tier", lambda: LARGE)
    monkeypatch.setattr(measuring, "prepare", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30 / 0.95, 0))
    found = benchmark.preset_speed("cifar10", 1)
    config = resolve("cifar10", LARGE, benchmark.train_optimized.DEFAULTS)
    assert found == {"peak_gib": 1 + config.BATCH_SIZE / 8, "images_per_second": 5.0, "fit": fit}
    assert tried[0] == (config.BATCH_SIZE, config.CUDA_GRAPH, 1.0)
    assert tried[1:3] == [(16, False, 0.0), (64, False, 0.0)]


# --- estimates and options


def test_the_estimate_of_minutes_is_what_they_are_enough_for(monkeypatch):
    monkeypatch.setattr(benchmark, "detect_tier", lambda: Tier("CPU", 32, 0.0))
    line = benchmark.in_time("shapes", {"images_per_second": 1000.0})
    assert "4.8 minutes (4.75 minutes, 0.28 M images at 1,000 images/s), batch 32 x 1" in line


def test_each_memory_case_is_of_its_size_and_card():
    cases = benchmark.memory_cases((32, 128))
    assert len(cases) == 2 * len(benchmark.CAPS)
    for name, config in cases.items():
        size, gib = name.removesuffix(" GiB").split(" px, ")
        assert (int(size), float(gib)) == (config.IMAGE_SIZE, config.MEMORY_GIB)
        assert tier_of(float(gib)).dim >= config.DIM
        assert benchmark.PRESET_OF[int(size)] == config.DATASET
    assert cases["32 px, 3 GiB"].DIM < cases["32 px, 12 GiB"].DIM


def options(gpu: bool, **given) -> argparse.Namespace:
    usual = {"quick": False, "preset": None, "batch": None, "threads": None, "curve_steps": None}
    return benchmark.options_of(argparse.Namespace(**usual | given), gpu)


@pytest.mark.parametrize(
    ("gpu", "given", "preset", "batch", "steps"),
    [
        (True, {}, "cifar10", (128, 256, 512), 500),
        (True, {"quick": True}, "cifar10", (128,), 100),
        (True, {"PRESET": "stl10"}, "stl10", (64,), 100),
        (False, {}, "shapes", (32,), 200),
        (False, {"quick": True, "CURVE_STEPS": 7, "BATCH": (3, 5)}, "shapes", (3, 5), 7),
    ],
)
def test_what_is_left_open_is_filled_in(monkeypatch, gpu, given, preset, batch, steps):
    tier = LARGE if gpu else Tier("CPU", 32, 0.0)
    monkeypatch.setattr(benchmark, "detect_tier", lambda: tier)
    found = options(gpu, **given)
    assert (found.preset, found.batch, found.curve_steps) == (preset, batch, steps)
    assert found.threads == measuring.cores()
    assert found.subject == benchmark.Subject.of(resolve(preset, tier))


# --- scaling


def scaling_options(**changes) -> argparse.Namespace:
    usual = {"dim": 8, "image_size": 16, "batches": (3, 5), "large_batch": 2, "effective_batch": 16}
    return argparse.Namespace(**usual | {"steps": 10, "seconds": 6.0} | changes)


def processes(count: int, index: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        device=CPU,
        num_processes=count,
        process_index=index,
        is_main_process=index == 0,
        wait_for_everyone=lambda: None,
    )


def test_scaling_trains_with_its_own_settings():
    config = scaling.configuration(scaling_options(), "cifar10", 7, 3)
    assert (config.BATCH_SIZE, config.SEED, config.DIM, config.IMAGE_SIZE) == (7, 3, 8, 16)
    assert (config.HORIZONTAL_FLIP, config.GRADIENT_ACCUMULATION) == (False, 1)
    config = scaling.configuration(scaling_options(dim=0, image_size=0), "stl10", 7)
    assert (config.SEED, config.DIM, config.IMAGE_SIZE) == (0, 128, 96)


def test_a_step_is_of_its_process_among_all(monkeypatch):
    monkeypatch.setattr(scaling, "Step", lambda model, config, rank, world: (rank, world))
    config = scaling.configuration(scaling_options(), "cifar10", 2)
    assert scaling.make_step(config, processes(4, 3)) == (3, 4)


@pytest.mark.parametrize(("preset", "micro_batch"), [("cifar10", 8), ("stl10", 2)])
def test_rates_are_of_all_processes_together(monkeypatch, preset, micro_batch):
    clock, made, steps = ticking(monkeypatch, scaling), [], []

    def make_step(config, _):
        made.append(config)

        def step(images, number, rate):
            steps.append((len(images), number))
            clock.now += 2.0 if number >= scaling.WARM_UP else 100.0

        return step

    monkeypatch.setattr(scaling, "make_step", make_step)
    found = scaling.measure(scaling_options(), preset, 8, processes(4))
    assert micro_batch == made[0].BATCH_SIZE and preset == made[0].DATASET
    assert found["images_per_second"] == 8 * 4 / 2.0 and found["rounds"] == [16.0] * scaling.ROUNDS
    assert (found["steps_a_round"], found["batch"], found["preset"]) == (3, 8, preset)
    assert steps == [(8, i) for i in range(scaling.WARM_UP + 1 + 3 * scaling.ROUNDS)]


def test_work_is_shared_out_among_processes(monkeypatch):
    monkeypatch.setattr(scaling, "measure", lambda _, preset, share, __: {"of": (preset, share)})
    monkeypatch.setattr(scaling, "validation_loss", lambda _, seed, __: {"of": seed})

    def rows(count: int, **changes) -> list[tuple]:
        found = scaling.rows_of(scaling_options(**changes), processes(count))
        return [(row["kind"], row["of"]) for row in found]

    weak = [("weak", ("cifar10", 3)), ("weak", ("cifar10", 5)), ("weak", ("stl10", 2))]
    strong = [("strong", ("cifar10", 4)), ("strong", ("stl10", 4))]
    assert rows(4) == [*weak, *strong, ("loss", 0)]
    assert rows(1)[-3:] == [("loss", 0), ("loss", 1), ("loss", 2)]
    assert rows(4, steps=0) == [*weak, *strong]


@pytest.mark.parametrize("index", [0, 1])
def test_validation_loss_is_on_held_out_images_after_all_steps(monkeypatch, index):
    seen, made = [], []
    images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)

    class Step:
        def __call__(self, batch, number, rate):
            seen.append((batch.flatten().tolist(), number, rate))

        def validate(self, batch):
            return batch.flatten().tolist()

    def make_step(config, _):
        made.append(config)
        return Step()

    monkeypatch.setattr(scaling, "make_step", make_step)
    monkeypatch.setattr(scaling, "load_images", lambda *_, **__: images)
    group = processes(2, index)
    group.local_main_process_first = lambda: io.StringIO()
    found = scaling.validation_loss(scaling_options(), 5, group)
    expected = batches.Batches(images, 16, 5, CPU, 1, index, 2)
    order = [batch.flatten().tolist() for epoch in range(4) for batch in expected.epoch(epoch)]
    assert [batch for batch, *_ in seen] == order[:10]
    assert [number for _, number, _ in seen] == list(range(10))
    assert (made[0].BATCH_SIZE, made[0].SEED, made[0].DATASET) == (8, 5, "cifar10")
    rates = [rate / made[0].LEARNING_RATE for *_, rate in seen]
    assert rates[0] == pytest.approx(0.5) and max(rates[2:]) == rates[2] > 0.8 > rates[9] > 0
    held_out = batches.split(60)[1].tolist()
    assert found.get("validation_loss") == (None if index else held_out)
    assert (found["seed"], found["steps"], found["effective_batch"]) == (5, 10, 16)


def test_agreement_is_with_the_first_seed():
    rows = [
        {"kind": "loss", "processes": count, "seed": seed, "validation_loss": loss}
        for count, seed, loss in ((1, 0, 0.10), (1, 1, 0.15), (1, 2, 0.20), (2, 0, 0.21))
    ]
    assert "0.11000 on 2: NOT within" in scaling.agreement(rows)
    assert scaling.agreement([*rows[:3], rows[3] | {"validation_loss": 0.05}]).endswith(
        "0.05000 on 2: within the spread of three seeds, 0.10000"
    )


def test_rows_are_told_with_their_units():
    row = {"kind": "weak", "processes": 2, "batch": 8, "image_size": 32, "dim": 64}
    row |= {"images_per_second": 12.25, "rounds": [11.0, 13.0, 12.25], "efficiency": 0.875}
    told = scaling.told(row)
    assert "2 x    8, 32 px, dim 64" in told and "12.2 images/s (11.0 to 13.0)" in told
    assert told.endswith("efficiency 87.5 %")
    loss = {"kind": "loss", "processes": 2, "seed": 1, "validation_loss": 0.25, "steps": 30}
    told = scaling.told(loss | {"effective_batch": 16, "seconds": 2.0})
    assert told == "loss   2 x    8, seed 1: 0.25000 after 30 steps, 2.0 s"


def test_picture_shows_efficiency_in_percent_by_effective_batch(monkeypatch):
    figures = []
    monkeypatch.setattr(scaling.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    usual = {"preset": "cifar10", "image_size": 32}
    rows = [
        usual | {"kind": kind, "processes": count, "batch": batch, "efficiency": efficiency}
        for kind, count, batch, efficiency in (
            ("weak", 1, 8, 1.0), ("weak", 4, 8, 0.5), ("strong", 1, 8, 1.0), ("strong", 4, 2, 0.25),
        )
    ]  # fmt: skip
    rows.append({"kind": "loss", "processes": 4, "seed": 2, "validation_loss": 0.125})
    scaling.picture({"device": "none", "torch": "0", "rows": rows})
    found = [
        {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for axes in figures[0].axes
    ]
    label = "cifar10 preset, 32 px, batch 8"
    assert found[0][label] == [(1, 100), (4, 50)] and found[1][label] == [(1, 100), (4, 25)]
    assert found[2] == {"seed 2": [(4, 0.125)]}
