"""benchmark.py: which variant is measured how, and a run from the command line to the files."""

import inspect
import itertools
import json
import pickle
import runpy
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer
from ema_pytorch import EMA
from torch.nn.utils import clip_grad_norm_

import benchmark
from config import Config, resolve, tier_for_memory
from ddpm_model import DDPMModel
from engine import benchmarking, dataloader
from engine.dataloader import ImageDataset
from engine.errors import FallbackWarning, RenamedWarning, UserError
from tests.helpers import (
    CPU,
    CPU_TIER,
    LARGE_TIER,
    ROOT,
    RecordedStep,
    max_weight_difference,
    random_images,
)

CIFAR10 = "cifar10-32px-dim128-1,2,2,2-full16"
NETWORK = {"IMAGE_SIZE": 16, "DIM": 8, "DIM_MULTS": (1, 2), "FULL_ATTENTION_MAX_SIZE": 0}
WIDE = {"IMAGE_SIZE": 32, "DIM": 64, "DIM_MULTS": (1, 2, 4, 8), "FULL_ATTENTION_MAX_SIZE": 0}


def tiny_config(**flags):
    return resolve("cifar10", LARGE_TIER, flags=NETWORK | {"BATCH_SIZE": 4} | flags)


@pytest.fixture(autouse=True)
def max_gpu_fraction(monkeypatch):
    """Restored after a test: in this process, too, a measurement sets it for its own."""
    monkeypatch.setattr(dataloader, "MAX_GPU_FRACTION", dataloader.MAX_GPU_FRACTION)


# The whole run.


def run_here(job: benchmarking.BenchmarkJob) -> dict:
    """Runs a job as a worker process does, but in this one, which has imported torch already."""
    job = pickle.loads(pickle.dumps(job))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        return job.row | job.measure(device=CPU)


def test_quick_run_measures_sections_into_one_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmarking, "run_job", run_here)
    # One round of one step, not three of half a second.
    monkeypatch.setattr(benchmarking, "ROUNDS", 1)
    time_steps = benchmarking.time_steps
    once = lambda step, batch, device, *_: time_steps(step, batch, device, 0.0)  # noqa: E731
    monkeypatch.setattr(benchmarking, "time_steps", once)
    flags = ["--quick", "--preset=shapes", "--image_size=8", "--dim=8", "--dim_mults=1,2"]
    flags += ["--full_attention_max_size=16", "--batch=4", "--threads=1"]
    printed = []
    for section in ("training", "sampling"):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags, "--only", section])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "benchmark.py"), run_name="__main__")
        assert exit_.value.code == 0
        printed.append(capsys.readouterr().out)
    (path,) = (tmp_path / "results").glob("benchmark-*.json")
    ((key, sections),) = benchmarking.read_report(path).items()
    assert key == "shapes-8px-dim8-1,2-full16" and set(sections) == {"training", "sampling"}
    model = DDPMModel(8, 8, (1, 2), full_attn=(True, True), attn_dim_head=32)
    for (section, result), text in zip(sections.items(), printed, strict=True):
        assert result["torch"] == torch.__version__
        assert result["command"] == f"python benchmark.py {' '.join(flags)} --only {section}"
        assert result["parameters"] == sum(p.numel() for p in model.unet.parameters())
        assert (result["dim_mults"], result["full_attention_max_size"]) == ([1, 2], 16)
        upstream, *ours = result["rows"]
        assert (
            upstream["what"].startswith("lucidrains") and len(ours) == len({*map(str, ours)}) >= 1
        )
        for row in ours:
            ratio = row["images_per_second"] / upstream["images_per_second"]
            assert row["speedup"] == pytest.approx(ratio) and row["what"] in text
    assert any("fp32" in row["what"] for row in sections["training"]["rows"][1:])
    assert all(row["mfu"] > 0 for row in sections["training"]["rows"])


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """Calls main with flags on a machine with or without GPU; returns what it had measured."""

    def call(*flags: str, is_gpu: bool = True) -> list[benchmarking.BenchmarkJob]:
        jobs = []

        def run(job):
            jobs.append(job)
            batch = float(job.row.get("batch", 1))
            if job.measure.func is benchmark.learning_curve:
                seed = job.measure.keywords["seed"]
                return job.row | {"losses": [batch], "validation_loss": 0.1 + seed / 10}
            return job.row | {"images_per_second": batch, "rounds": [batch]}

        monkeypatch.setattr(sys, "argv", ["/somewhere/benchmark.py", *flags])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
        monkeypatch.setattr(benchmark, "detect_tier", lambda: LARGE_TIER if is_gpu else CPU_TIER)
        monkeypatch.setattr(benchmarking, "run_job", run)
        benchmark.main()
        return jobs

    monkeypatch.chdir(tmp_path)
    return call


def data_source(job: benchmarking.BenchmarkJob) -> str:
    """Where the images of a row of the section data are, else nothing."""
    what = job.row["what"]
    return what.split(",")[0] if what.startswith("images") else ""


def written(path="results/benchmark-A-card.json") -> dict:
    return json.loads(open(path).read())


def test_main_measures_each_section_of_the_preset(run_main):
    run_main()
    ((key, sections),) = written().items()
    assert key == CIFAR10 and set(sections) == {"training", "sampling", "curves", "data"}
    batches = [row["batch"] for row in sections["training"]["rows"]]
    assert batches == sorted(batches) and set(batches) == {128, 256, 512}
    assert {row["batch"] for row in sections["data"]["rows"]} == {512}
    assert {row["batch"] for row in sections["curves"]["rows"]} == {128}
    # Of the fast path, and of two more seeds, to the first.
    differences = [row["loss_difference"] for row in sections["curves"]["rows"]]
    assert differences == pytest.approx([0, 0, 0.1, 0.2])
    config = resolve("cifar10", LARGE_TIER)
    for result in sections.values():
        assert (result["device"], result["command"]) == ("A card", "python benchmark.py")
        network = {name: result[name.lower()] for name in benchmark.NETWORK}
        expected = {name: getattr(config, name) for name in benchmark.NETWORK}
        assert network == expected | {"DIM_MULTS": list(config.DIM_MULTS)}


def test_main_replaces_one_section_of_one_network(run_main):
    run_main("--only", "training", "--batch", "8")
    run_main("--only", "sampling")
    run_main("--only", "training", "--preset", "celeba")
    run_main("--only", "training", "--batch", "2,4")
    report = written()
    assert {key: set(sections) for key, sections in report.items()} == {
        CIFAR10: {"training", "sampling"},
        "celeba-64px-dim128-1,2,2,2-full24": {"training"},
    }
    rows = [row["batch"] for sections in report.values() for row in sections["training"]["rows"]]
    assert rows == [2] * 5 + [4] * 2 + [128] * 5


@pytest.mark.parametrize(
    ("is_gpu", "flags", "preset", "batches", "steps"),
    [
        (True, (), "cifar10", {128, 256, 512}, 500),
        (True, ("--quick",), "cifar10", {128}, 100),
        (True, ("--preset", "stl10"), "stl10", {64}, 500),
        (False, (), "shapes", {32}, 100),
        (False, ("--quick", "--batch", "3,5"), "shapes", {3, 5}, 20),
    ],
)
def test_main_completes_what_flags_leave_open(run_main, is_gpu, flags, preset, batches, steps):
    jobs = run_main(*flags, is_gpu=is_gpu)
    expected = resolve(preset, LARGE_TIER if is_gpu else CPU_TIER)
    for job in jobs:
        (config,) = job.measure.args
        assert config.DATASET == preset
        for name in benchmark.NETWORK:
            assert getattr(config, name) == getattr(expected, name)
    training = (benchmark.measure_training, benchmark.measure_upstream_training)
    found = [job for job in jobs if job.measure.func in training and not data_source(job)]
    assert {job.row["batch"] for job in found} == batches
    curves = [j for j in jobs if j.measure.func is benchmark.learning_curve]
    assert {job.measure.keywords["steps"] for job in curves} == {steps}
    assert any(map(data_source, jobs)) == (is_gpu and "--quick" not in flags)


def test_main_measures_the_network_of_the_flags(run_main):
    flags = ("--dim", "64", "--dim_mults", "1,2,4,8", "--full_attention_max_size", "0")
    jobs = run_main("--only", "sampling", *flags)
    for job in jobs:
        assert {name: getattr(job.measure.args[0], name) for name in WIDE} == WIDE
    assert set(written()) == {"cifar10-32px-dim64-1,2,4,8-full0"}


def test_main_passes_threads_to_workers(run_main, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_main("--only", "sampling", "--quick", "--threads", "3")
    assert benchmark.os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    "flags", [("--memory",), ("--only", "data"), ("--only", "training", "--memory")]
)
def test_main_refuses_what_needs_a_gpu(run_main, flags):
    with pytest.raises(UserError, match="data and memory need a GPU"):
        run_main(*flags, is_gpu=False)


def test_memory_is_measured_on_a_card_of_each_tier(run_main):
    jobs = run_main("--memory", "--image_size", "64")
    assert [job.row for job in jobs] == [{"cap_gib": cap} for cap in benchmark.CAPS]
    for job in jobs:
        assert job.measure.func is benchmark.measure_memory
        assert job.measure.keywords == {"cap": job.row["cap_gib"]}
        (config,) = job.measure.args
        assert config.IMAGE_SIZE == 64 and config.set_by["IMAGE_SIZE"] == "flag"
    ((_, sections),) = written().items()
    assert set(sections) == {"memory"}


def test_docs_are_written_and_the_old_flag_warns(run_main, tmp_path):
    run_main("--only", "sampling")
    with pytest.warns(RenamedWarning, match="--readme is now --docs"):
        assert run_main("--readme") == []
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert page == benchmarking.docs_page(tmp_path / "results") and "A card" in page
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_main("--docs")


# Networks.


def test_results_are_named_after_their_network(run_main):
    for path in (ROOT / "results").glob("benchmark-NVIDIA*.json"):
        for key, sections in benchmarking.read_report(path).items():
            for result in sections.values():
                size, dim, mults, full = (result[name.lower()] for name in benchmark.NETWORK)
                name = f"{size}px-dim{dim}-{','.join(map(str, mults))}-full{full}"
                assert key == f"{key.split('-')[0]}-{name}", path
    flags = {"--image_size": 16, "--dim": 64, "--dim_mults": "1,2", "--full_attention_max_size": 8}
    for flag, value in flags.items():
        run_main("--only", "curves", flag, str(value))
    assert len(written()) == 4 and CIFAR10 not in written()


def test_upstream_network_has_our_parameters():
    presets = [resolve(name, LARGE_TIER) for name in ("cifar10", "celeba", "stl10")]
    for config in (resolve("cifar10", LARGE_TIER, flags=WIDE), *presets):
        with torch.device("meta"):
            networks = (
                benchmark.upstream_diffusion(config).model,
                DDPMModel.from_config(config).unet,
            )
        upstream, ours = ([p.shape for p in network.parameters()] for network in networks)
        assert sorted(upstream) == sorted(ours)


# Jobs.


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_training_jobs_do_what_their_rows_say(quick, is_gpu):
    jobs = benchmark.jobs_of_section("training", tiny_config(), (4, 6, 8), quick, is_gpu)
    for job in jobs:
        what, (config,) = job.row["what"], job.measure.args
        measures = {"luci": benchmark.measure_upstream_training, "ours": benchmark.measure_training}
        assert job.measure.func is measures[what[:4]] and not job.measure.keywords
        assert (config.BATCH_SIZE, config.GRADIENT_ACCUMULATION) == (job.row["batch"], 1)
        assert {name: getattr(config, name) for name in NETWORK} == NETWORK
        words = {"USE_AMP": "bf16", "CUDA_GRAPH": "CUDA graph", "COMPILE_MODEL": "compiled"}
        assert all(getattr(config, name) == (word in what) for name, word in words.items())
        assert is_gpu or "CUDA graph" not in what


def test_training_jobs_begin_with_upstream_and_the_fast_path():
    config = resolve("cifar10", LARGE_TIER, flags=WIDE)
    jobs = benchmark.jobs_of_section("training", config, (128, 256, 512), False, True)
    rows = [(job.row["what"], job.row["batch"]) for job in jobs]
    upstream, fast = "lucidrains' Trainer, fp32", "ours, bf16, CUDA graph"
    assert rows[:2] == [(upstream, 128), (upstream, 512)]
    assert rows[2:5] == [(fast, 128), (fast, 256), (fast, 512)]
    assert [what for what, batch in rows if batch == 256] == [fast]
    assert sum("compiled" in what for what, _ in rows) == 1 and len(rows) == len(set(rows)) == 8
    quick = benchmark.jobs_of_section("training", config, (128,), True, True)
    assert [job.row["what"] for job in quick] == [upstream, fast, "ours, bf16"]


@pytest.mark.parametrize("is_gpu", [False, True])
def test_sampling_jobs_do_what_their_rows_say(is_gpu):
    config = tiny_config()
    upstream, *ours = benchmark.jobs_of_section("sampling", config, (4,), False, is_gpu)
    assert upstream.measure.func is benchmark.measure_upstream_sampling
    for job in ours:
        variant = job.measure.args[0]
        assert job.measure.func is benchmark.measure_sampling
        assert job.measure.keywords == {name: job.row[name] for name in ("sampler", "steps")}
        assert variant.BATCH_SIZE == job.row["batch"]
        assert variant.USE_AMP == ("bf16" in job.row["what"])
        assert variant.CUDA_GRAPH == ("CUDA graph" in job.row["what"])
    first = ours[0].row
    assert (first["sampler"], first["steps"]) == ("unipc", config.SAMPLING_TIMESTEPS)
    samplers = {(job.row["sampler"], job.row["steps"]) for job in ours}
    assert samplers == {*benchmark.SAMPLERS, ("unipc", config.SAMPLING_TIMESTEPS)}
    assert len(benchmark.jobs_of_section("sampling", config, (4,), True, is_gpu)) == 2


def test_curves_are_of_three_seeds_in_fp32_and_one_of_the_fast_path():
    for is_gpu in (False, True):
        jobs = benchmark.jobs_of_section("curves", tiny_config(), (4, 8), False, is_gpu)
        fast = "ours, bf16, CUDA graph" if is_gpu else "ours, bf16"
        found = [(job.row["what"], job.measure.keywords["seed"]) for job in jobs]
        assert found == [("ours, fp32", 0), (fast, 0), ("ours, fp32", 1), ("ours, fp32", 2)]
        assert [job.measure.args[0].USE_AMP for job in jobs] == [False, True, False, False]
        assert [job.measure.args[0].CUDA_GRAPH for job in jobs] == [False, is_gpu, False, False]
        assert all(job.row["seed"] == job.measure.keywords["seed"] for job in jobs)
        assert {job.row["batch"] for job in jobs} == {4}


def test_data_jobs_compare_gpu_and_workers():
    jobs = benchmark.jobs_of_section("data", tiny_config(), (4, 8), False, True)
    found = {data_source(job): job.measure.keywords.get("on_gpu", True) for job in jobs}
    assert found == {"images on the GPU": True, "images from 8 workers": False}
    # A round is much longer than what the threads read ahead.
    assert {job.measure.keywords["seconds"] for job in jobs} == {2.0}
    assert [job.measure.args[0].BATCH_SIZE for job in jobs] == [8, 8]


# Measurements.


@pytest.fixture
def timed(monkeypatch) -> list[tuple]:
    """Replaces time_steps: runs three steps, and records batch and length of a round."""
    calls = []

    def time_steps(step, batch, device, round_seconds=0.5):
        results = [step() for _ in range(3)]
        calls.append((batch, round_seconds, results))
        return {"images_per_second": 10.0, "ms": 1.0, "rounds": [10.0], "peak_gib": None}

    monkeypatch.setattr(benchmark, "time_steps", time_steps)
    return calls


@pytest.fixture
def mfu(monkeypatch) -> list[tuple]:
    """Replaces compute_mfu by a constant, and records the speeds."""
    speeds = []
    monkeypatch.setattr(benchmark, "compute_mfu", lambda config, speed, _: speeds.append(speed))
    return speeds


@pytest.fixture
def recorded(monkeypatch) -> list[RecordedStep]:
    monkeypatch.setattr(benchmark, "TrainStep", RecordedStep)
    monkeypatch.setattr(RecordedStep, "made", [])
    return RecordedStep.made


@pytest.fixture
def launched(monkeypatch):
    """Sets the environment of a rank."""

    def set_rank(rank: int, world_size: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))

    return set_rank


@pytest.mark.parametrize("on_gpu", [False, True])
def test_our_step_trains_on_random_images_of_the_effective_batch(
    monkeypatch, recorded, timed, mfu, launched, on_gpu
):
    launched(1, 4)
    monkeypatch.setattr(dataloader, "MAX_GPU_FRACTION", 0.25)
    config = tiny_config(BATCH_SIZE=3, GRADIENT_ACCUMULATION=2)
    benchmark.measure_training(config, CPU, on_gpu, seconds=2.0)
    assert (1.0 if on_gpu else 0.0) == dataloader.MAX_GPU_FRACTION
    # Six images on each rank; the speed is that of all ranks, MFU that of one.
    ((batch, round_seconds, _),) = timed
    assert (batch, round_seconds, mfu) == (24, 2.0, [10 / 4])
    (made,) = recorded
    assert made.ranks == (1, 4) and made.config is config
    assert [number for _, number, _ in made.calls] == [0, 1, 2]
    for batch, _, _ in made.calls:
        assert batch.images.shape == (6, 3, 16, 16) and batch.images.dtype == torch.uint8
        assert batch.images.float().std() > 50


def trainer_default(name: str) -> Any:
    """The default of an argument of upstream's Trainer."""
    return inspect.signature(Trainer.__init__).parameters[name].default


def train_as_upstream(config: Config) -> GaussianDiffusion:
    """Returns upstream's model after three steps of its Trainer on one batch."""
    torch.manual_seed(0)
    model = benchmark.upstream_diffusion(config)
    lr, betas = map(trainer_default, ("train_lr", "adam_betas"))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=betas)
    images = torch.rand(config.BATCH_SIZE, 3, config.IMAGE_SIZE, config.IMAGE_SIZE)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).backward()
        clip_grad_norm_(model.parameters(), trainer_default("max_grad_norm"))
        optimizer.step()
    return model


def test_upstream_step_is_that_of_its_trainer(monkeypatch, timed, mfu):
    calls, emas = [], []

    def record(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    def make_ema(model, **options):
        emas.append((model, options))
        return EMA(model, **options)

    expected = train_as_upstream(tiny_config())
    for name in ("autocast", "backward", "clip_grad_norm_"):
        record(benchmark.Accelerator, name)
    record(torch.Tensor, "item")
    record(torch.optim.Adam, "step")
    record(EMA, "update")
    monkeypatch.setattr(benchmark, "EMA", make_ema)
    torch.manual_seed(0)
    benchmark.measure_upstream_training(tiny_config(), CPU)
    calls = calls[calls.index("autocast") :]
    order = [name for i, name in enumerate(calls) if name not in calls[:i]]
    assert order == ["autocast", "item", "backward", "clip_grad_norm_", "step", "update"]
    assert calls.count("update") == 3 and timed[0][0] == 4 and mfu == [10.0]
    ((model, options),) = emas
    assert max_weight_difference(model, expected) < 1e-8
    beta, update_every = map(trainer_default, ("ema_decay", "ema_update_every"))
    assert options == {"beta": beta, "update_every": update_every}


class Convolution(torch.nn.Conv2d):
    """A network of known arithmetic that takes timesteps, too."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert x.is_meta and self.weight.is_meta
        return super().forward(x)


@pytest.mark.parametrize(("is_gpu", "size"), [(True, 8192), (False, 2048)])
def test_mfu_is_of_a_large_matmul(monkeypatch, is_gpu, size):
    shapes = []
    device = torch.device("cuda" if is_gpu else "cpu")

    def make_diffusion(config):
        return SimpleNamespace(model=Convolution(3, 5, 3, padding=1))

    randn = lambda *shape, **options: shapes.append((shape, options)) or (None, None)  # noqa: E731
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(benchmark, "upstream_diffusion", make_diffusion)
    monkeypatch.setattr(benchmark.devices, "amp_dtype", lambda device: torch.float16)
    monkeypatch.setattr(benchmark, "time_steps", lambda *_: {"images_per_second": 10.0})
    # Forward and backward of 16 x 16 pixels; 1000 images/s against 10 products a second.
    expected = 1000 * 3 * 2 * 9 * 3 * 5 * 16 * 16 / (2 * size**3 * 10)
    assert benchmark.compute_mfu(tiny_config(), 1000.0, device) == pytest.approx(expected)
    dtype = torch.float16 if is_gpu else torch.float32
    assert shapes == [((2, size, size), {"device": device, "dtype": dtype})]


def test_fallbacks_are_not_measured(monkeypatch):
    def compile_model(model, **_):
        def forward(*_):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

        return forward

    monkeypatch.setattr(torch, "compile", compile_model)
    with warnings.catch_warnings(), pytest.raises(FallbackWarning, match="no C"):
        warnings.simplefilter("error", FallbackWarning)
        benchmark.measure_training(tiny_config(COMPILE_MODEL=True), CPU)


@pytest.mark.parametrize("amp", [False, True])
def test_sampling_is_as_the_row_says(monkeypatch, timed, amp):
    model = DDPMModel.from_config(tiny_config())
    sampled = []

    def sample(batch, sampler, steps, seed):
        sampled.append((batch, sampler, steps, seed, torch.is_autocast_enabled("cpu")))

    monkeypatch.setattr(model, "sample", sample)
    monkeypatch.setattr(DDPMModel, "from_config", lambda config: model)
    config = tiny_config(USE_AMP=amp, CUDA_GRAPH=True)
    row = benchmark.measure_sampling(config, CPU, "heun", 7)
    assert sampled == [(4, "heun", 7, 0, amp)] * 3 and model.cuda_graph is True
    assert model.guide is not None and not model.training
    assert row["nfe"] == model.count_nfe(*model.sampling_plan("heun", 7)) > 7


def test_sampling_nfe_includes_the_guides(monkeypatch, timed):
    model = DDPMModel.from_config(tiny_config())
    model.snapshot_guide()
    calls = []
    for network in (model.unet, model.guide):
        network.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(model, "snapshot_guide", lambda: None)
    monkeypatch.setattr(DDPMModel, "from_config", lambda config: model)
    row = benchmark.measure_sampling(tiny_config(), CPU, "unipc", 14)
    assert len(calls) == 3 * row["nfe"] and 14 < row["nfe"] <= 20


def test_upstream_sampling_counts_all_steps_for_those_done(monkeypatch, timed):
    timesteps = []

    class Process(torch.nn.Module):
        def p_sample(self, x, t):
            assert x.shape == (4, 3, 16, 16)
            timesteps.append(t)
            return x, None

    monkeypatch.setattr(benchmark, "upstream_diffusion", lambda config: Process())
    row = benchmark.measure_upstream_sampling(tiny_config(), CPU)
    assert len(set(timesteps)) == 25 and len(timesteps) == 75
    assert timed[0][0] == pytest.approx(4 * 25 / 1000) and row["ms"] == 40
    assert (row["sampler"], row["steps"], row["nfe"]) == ("ddpm", 1000, 1000)


def test_learning_curve_is_of_its_seed_on_all_ranks(monkeypatch, recorded, launched):
    launched(1, 2)
    images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)
    loads = []

    def load_dataset(*arguments, **_):
        loads.append(arguments[:2])
        return ImageDataset(images)

    monkeypatch.setattr(benchmark, "load_dataset", load_dataset)
    config = tiny_config(BATCH_SIZE=4, GRADIENT_ACCUMULATION=2)
    row = benchmark.learning_curve(config, CPU, 10, 5)
    (step,) = recorded
    assert loads == [("shapes", 16)] and step.ranks == (1, 2)
    assert (step.config.SEED, step.config.HORIZONTAL_FLIP) == (5, False)

    loader = dataloader.BatchLoader(ImageDataset(images), 16, 5, CPU, 1, 1, 2)
    batches = itertools.islice(itertools.chain.from_iterable(map(loader.epoch, range(9))), 10)
    expected = [batch.images.flatten().tolist() for batch in batches]
    assert [batch.images.flatten().tolist() for batch, *_ in step.calls] == expected
    assert [number for _, number, _ in step.calls] == list(range(10))
    rates = [lr / config.LEARNING_RATE for *_, lr in step.calls]
    assert rates[0] == pytest.approx(0.5) and max(rates[2:]) == rates[2] > 0.8 > rates[9] > 0
    assert row["losses"] == pytest.approx([i / 7 for i in range(10)], abs=1e-5)
    assert row["validation_loss"] == dataloader.train_val_split(60)[1].tolist()


def test_learning_curves_of_bf16_and_fp32_agree(monkeypatch):
    data = ImageDataset(random_images(64, 16))
    monkeypatch.setattr(benchmark, "load_dataset", lambda *_, **__: data)

    def curve(seed: int, amp: bool) -> list[float]:
        return benchmark.learning_curve(tiny_config(USE_AMP=amp), CPU, 4, seed)["losses"]

    fp32, fast, other = curve(0, False), curve(0, True), curve(1, False)
    assert fast == pytest.approx(fp32, rel=0.02) and fast != fp32
    assert other != pytest.approx(fp32, rel=0.02)


def test_memory_finds_the_network_and_micro_batch_under_each_cap(monkeypatch):
    found = []

    def find_micro_batch(model, config, images):
        warnings.warn("CUDA out of memory; continuing", FallbackWarning, stacklevel=2)
        assert len(images) == 0
        return 32

    def measure_training(config, device, on_gpu):
        found.append((config, on_gpu))
        return {"peak_gib": 3.0}

    caps = []
    monkeypatch.setattr(benchmark, "find_micro_batch", find_micro_batch)
    monkeypatch.setattr(benchmark, "measure_training", measure_training)
    monkeypatch.setattr(benchmark, "cap_memory", caps.append)
    config = resolve("cifar10", LARGE_TIER, flags={"IMAGE_SIZE": 64})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        rows = [benchmark.measure_memory(config, CPU, cap) for cap in benchmark.CAPS]
    assert caps == list(benchmark.CAPS)
    for cap, row, (config, on_gpu) in zip(caps, rows, found, strict=True):
        assert (config.DIM, config.IMAGE_SIZE) == (row["dim"], row["image_size"])
        assert config.DIM <= tier_for_memory(cap).dim and config.IMAGE_SIZE == 64
        assert (row["batch"], row["micro_batch"], row["peak_gib"]) == (128, 32, 3.0)
        assert (config.BATCH_SIZE, config.GRADIENT_ACCUMULATION, on_gpu) == (32, 4, False)
        assert config.USE_AMP and config.CUDA_GRAPH
    assert rows[0]["dim"] < rows[2]["dim"]


# Speedup.


def speed(what: str, batch: int, rate: float | None, **more) -> benchmarking.BenchmarkJob:
    """A job of one of benchmark.py's sections that measures a speed, or fails."""
    section = "sampling" if "sampler" in more else "training"
    jobs = benchmark.jobs_of_section(section, tiny_config(), (batch,), True, True)
    job = next(job for job in jobs if job.row["what"].startswith(what))
    measured = {"images_per_second": rate} if rate else {"failed": "no memory"}
    return job._replace(row=job.row | {"batch": batch} | more | measured)


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Returns the rows of jobs, as run_section completes them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmarking, "run_job", lambda job: dict(job.row))
    return lambda *jobs: benchmarking.run_section("benchmark", "", "a", {}, jobs, "speedup")


def test_training_is_compared_with_upstream_at_the_same_batch(compared):
    upstream = [speed("lucidrains", *each) for each in ((128, 100.0), (512, 200.0), (64, None))]
    ours = [speed("ours", batch, 400.0) for batch in (64, 128, 256, 512)]
    rows = compared(*upstream, *ours)
    found = [(row["what"][:4], row["batch"], row.get("speedup")) for row in rows]
    assert found == [
        ("luci", 64, None), ("ours", 64, None), ("luci", 128, 1), ("ours", 128, 4),
        ("ours", 256, None), ("luci", 512, 1), ("ours", 512, 2),
    ]  # fmt: skip


def test_sampling_is_compared_with_upstreams_only_row(compared):
    upstream = speed("lucidrains", 64, 2.0, sampler="ddpm")
    rows = compared(upstream, speed("ours", 256, 50.0, sampler="heun"))
    assert [row["speedup"] for row in rows] == [1, 25]
