"""benchmark.py: which variant is measured how, and a run from the command line to the files."""

import itertools
import json
import pickle
import runpy
import sys
import warnings
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

import benchmark
from config import resolve, tier_for_memory
from ddpm_model import DDPMModel
from engine import benchmarking, dataloader
from engine.dataloader import Batch, ImageDataset
from engine.errors import FallbackWarning, RenamedWarning, UserError
from tests.helpers import CPU, CPU_TIER, LARGE_TIER, ROOT, random_images

NETWORK = {"IMAGE_SIZE": 16, "DIM": 8, "DIM_MULTS": (1, 2), "FULL_ATTENTION_MAX_SIZE": 0}
WIDE = {"IMAGE_SIZE": 32, "DIM": 64, "DIM_MULTS": (1, 2, 4, 8), "FULL_ATTENTION_MAX_SIZE": 0}


def tiny_config(**flags):
    return resolve("cifar10", LARGE_TIER, flags=NETWORK | {"BATCH_SIZE": 4} | flags)


@pytest.fixture
def large_tier(monkeypatch):
    monkeypatch.setattr(benchmark, "detect_tier", lambda: LARGE_TIER)


# --- the whole run


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
    # One round of one step after another to warm up, not three of half a second.
    for name in ("ROUNDS", "WARM_UP"):
        monkeypatch.setattr(benchmarking, name, 1)
    once = partial(benchmarking.time_steps, round_seconds=0.0)
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
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    ((key, sections),) = benchmarking.read_report(path).items()
    assert key == "shapes-8px-dim8-1,2-full16" and set(sections) == {"training", "sampling"}
    model = DDPMModel(8, 8, (1, 2), full_attn=(True, True), attn_dim_head=32)
    for (section, result), text in zip(sections.items(), printed, strict=True):
        assert result["torch"] == torch.__version__
        assert result["command"] == f"python benchmark.py {' '.join(flags)} --only {section}"
        assert result["parameters"] == sum(p.numel() for p in model.unet.parameters())
        assert (result["dim_mults"], result["full_attention_max_size"]) == ([1, 2], 16)
        library, *ours = result["rows"]
        assert library["what"].startswith("library") and len(ours) == len({*map(str, ours)}) >= 1
        for row in ours:
            ratio = row["images_per_second"] / library["images_per_second"]
            assert row["over_library"] == pytest.approx(ratio) and row["what"] in text
    assert any("fp32" in row["what"] for row in sections["training"]["rows"][1:])
    assert all(row["mfu"] > 0 for row in sections["training"]["rows"])


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """Calls main with flags on a machine with or without GPU; returns what it had measured.

    The plots are made but not rendered, which would take most of the time.
    """

    def call(*flags: str, is_gpu: bool = True) -> list[benchmarking.BenchmarkJob]:
        jobs = []

        def run(job):
            jobs.append(job)
            batch = float(job.row["batch"])
            if job.measure.func is benchmark.learning_curve:
                seed = job.measure.keywords["seed"]
                return job.row | {"losses": [batch], "validation_loss": 0.1 + seed / 10}
            return job.row | {"images_per_second": batch, "rounds": [batch]}

        monkeypatch.setattr(sys, "argv", ["/somewhere/benchmark.py", *flags])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
        monkeypatch.setattr(benchmark, "detect_tier", lambda: LARGE_TIER if is_gpu else CPU_TIER)
        monkeypatch.setattr(benchmarking, "run_job", run)
        monkeypatch.setattr(benchmarking, "save_figure", lambda figure, path: None)
        benchmark.main()
        return jobs

    monkeypatch.chdir(tmp_path)
    return call


def written(path="results/benchmark-A-card.json") -> dict:
    return json.loads(open(path).read())


def test_main_measures_each_section_of_the_preset(run_main):
    run_main()
    ((key, sections),) = written().items()
    assert key == "cifar10" and set(sections) == {"training", "sampling", "curves", "data"}
    batches = [row["batch"] for row in sections["training"]["rows"]]
    assert batches == sorted(batches) and set(batches) == {128, 256, 512}
    assert {row["batch"] for row in sections["data"]["rows"]} == {512}
    assert {row["batch"] for row in sections["curves"]["rows"]} == {128}
    assert "within the spread of three seeds, 0.2" in sections["curves"]["agreement"]
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
        "cifar10": {"training", "sampling"},
        "celeba": {"training"},
    }
    assert {row["batch"] for row in report["cifar10"]["training"]["rows"]} == {2, 4}
    assert {row["batch"] for row in report["celeba"]["training"]["rows"]} == {128}


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
    training = {j.row["batch"] for j in jobs if j.measure.func is benchmark.measure_training}
    assert training == batches
    curves = [j for j in jobs if j.measure.func is benchmark.learning_curve]
    assert {job.measure.keywords["steps"] for job in curves} == {steps}
    data = [j for j in jobs if j.measure.func is benchmark.measure_data_path]
    assert bool(data) == (is_gpu and "--quick" not in flags)


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


@pytest.mark.parametrize("flags", [("--memory",), ("--only", "data")])
def test_main_refuses_what_needs_a_gpu(run_main, flags):
    with pytest.raises(UserError, match="needs a GPU"):
        run_main(*flags, is_gpu=False)


def test_memory_measures_the_preset_on_a_card_of_each_tier(run_main):
    jobs = run_main("--memory", "--image_size", "64")
    assert [job.row["cap_gib"] for job in jobs] == list(benchmark.CAPS)
    for job in jobs:
        (config,) = job.measure.args
        assert job.measure.func is benchmark.measure_memory
        assert config.MAX_MEMORY_GIB == job.row["cap_gib"] and config.IMAGE_SIZE == 64
        assert (config.DIM, 64) == (job.row["dim"], job.row["image_size"])
        assert config.DIM <= tier_for_memory(job.row["cap_gib"]).dim
        assert config.BATCH_SIZE * config.GRADIENT_ACCUMULATION == job.row["batch"] == 128
        assert config.USE_AMP and config.CUDA_GRAPH
    assert jobs[0].row["dim"] < jobs[2].row["dim"]
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


# --- networks


def test_result_key_names_the_network_unless_it_is_the_presets(large_tier):
    """Fails when a preset changes: its earlier results then need the key of that network."""
    for path in (ROOT / "results").glob("benchmark-NVIDIA*.json"):
        for key, sections in benchmarking.read_report(path).items():
            for result in sections.values():
                flags = {name: result[name.lower()] for name in benchmark.NETWORK}
                config = resolve(key.split("-")[0], LARGE_TIER, flags=flags)
                assert benchmark.result_key(config) == key, path
    flags = {"IMAGE_SIZE": 16, "DIM": 64, "DIM_MULTS": (1, 2), "FULL_ATTENTION_MAX_SIZE": 8}
    configs = [resolve("cifar10", LARGE_TIER, flags={name: flags[name]}) for name in flags]
    keys = {benchmark.result_key(config) for config in configs}
    preset = benchmark.result_key(resolve("cifar10", LARGE_TIER))
    assert preset == "cifar10" and len(keys | {preset}) == 5


def test_diffusers_network_has_about_our_number_of_parameters():
    pytest.importorskip("diffusers")
    presets = [resolve(name, LARGE_TIER) for name in ("cifar10", "celeba", "stl10")]
    for config in (resolve("cifar10", LARGE_TIER, flags=WIDE), *presets):
        with torch.device("meta"):
            theirs = benchmark.DiffusersDiffusion(config).model
            ours = DDPMModel.from_config(config).unet
        theirs, ours = (sum(p.numel() for p in network.parameters()) for network in (theirs, ours))
        assert theirs == pytest.approx(ours, rel=benchmark.MAX_PARAM_DIFFERENCE)
        assert benchmark.count_parameters(config) == ours
    with pytest.raises(UserError, match="parameters"), torch.device("meta"):
        benchmark.DiffusersDiffusion(tiny_config())


def test_diffusers_loss_is_of_the_noise():
    pytest.importorskip("diffusers")
    model = benchmark.DiffusersDiffusion(resolve("cifar10", LARGE_TIER, flags=WIDE | {"DIM": 32}))
    inputs = []

    def predict_zero(x, t):
        inputs.append((x, t))
        return SimpleNamespace(sample=torch.zeros_like(x))

    model.model.forward = predict_zero
    loss = model(torch.full((64, 3, 16, 16), 0.5))
    ((x, t),) = inputs
    noise_level = (1 - model.schedule.alphas_cumprod[t]).sqrt()
    torch.testing.assert_close(x.std(dim=(1, 2, 3)), noise_level, rtol=0.2, atol=0)
    assert loss.item() == pytest.approx(1, abs=0.05) and len(t.unique()) > 32


# --- jobs


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_training_jobs_do_what_their_rows_say(quick, is_gpu):
    jobs = benchmark.make_jobs("training", tiny_config(), (4, 6, 8), quick, is_gpu)
    for job in jobs:
        what, (config,) = job.row["what"], job.measure.args
        assert job.measure.func is benchmark.measure_training
        assert (config.BATCH_SIZE, config.GRADIENT_ACCUMULATION) == (job.row["batch"], 1)
        assert {name: getattr(config, name) for name in NETWORK} == NETWORK
        words = {"USE_AMP": "bf16", "CUDA_GRAPH": "CUDA graph", "COMPILE_MODEL": "compiled"}
        assert all(getattr(config, name) == (word in what) for name, word in words.items())
        peers = {"library": benchmark.UpstreamDiffusion, "diffuse": benchmark.DiffusersDiffusion}
        assert job.measure.keywords["peer"] is peers.get(what[:7])
        assert is_gpu or "CUDA graph" not in what


def test_training_jobs_begin_with_upstream_and_the_fast_path():
    config = resolve("cifar10", LARGE_TIER, flags=WIDE)
    jobs = benchmark.make_jobs("training", config, (128, 256, 512), False, True)
    rows = [(job.row["what"], job.row["batch"]) for job in jobs]
    library, fast = "library's Trainer, fp32", "ours, bf16, CUDA graph"
    assert rows[:2] == [(library, 128), (library, 512)]
    assert rows[2:5] == [(fast, 128), (fast, 256), (fast, 512)]
    assert [what for what, batch in rows if batch == 256] == [fast]
    assert sum("compiled" in what for what, _ in rows) == 1 and len(rows) == len(set(rows)) == 10
    quick = benchmark.make_jobs("training", config, (128,), True, True)
    assert [job.row["what"] for job in quick] == [library, fast, "ours, bf16"]


@pytest.mark.parametrize("is_gpu", [False, True])
def test_sampling_jobs_do_what_their_rows_say(is_gpu):
    config = tiny_config()
    upstream, *ours = benchmark.make_jobs("sampling", config, (4,), False, is_gpu)
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
    assert len(benchmark.make_jobs("sampling", config, (4,), True, is_gpu)) == 2


def test_curves_are_of_three_seeds_in_fp32_and_one_of_the_fast_path():
    for is_gpu in (False, True):
        jobs = benchmark.make_jobs("curves", tiny_config(), (4, 8), False, is_gpu)
        fast = "ours, bf16, CUDA graph" if is_gpu else "ours, bf16"
        found = [(job.row["what"], job.measure.keywords["seed"]) for job in jobs]
        assert found == [("ours, fp32", 0), (fast, 0), ("ours, fp32", 1), ("ours, fp32", 2)]
        assert [job.measure.args[0].USE_AMP for job in jobs] == [False, True, False, False]
        assert [job.measure.args[0].CUDA_GRAPH for job in jobs] == [False, is_gpu, False, False]
        assert all(job.row["seed"] == job.measure.keywords["seed"] for job in jobs)
        assert {job.row["batch"] for job in jobs} == {4}


def test_data_jobs_compare_gpu_and_workers():
    jobs = benchmark.make_jobs("data", tiny_config(), (4, 8), False, True)
    found = {job.row["what"].split(",")[0]: job.measure.keywords["on_gpu"] for job in jobs}
    assert found == {"images on the GPU": True, "images from 8 workers": False}
    assert [job.measure.args[0].BATCH_SIZE for job in jobs] == [8, 8]


# --- measurements


@pytest.fixture
def timed(monkeypatch) -> list[tuple]:
    """Replaces time_steps: runs three steps, and records batch and length of a round."""
    calls = []

    def time_steps(make_step, batch, device, round_seconds=0.5):
        step = make_step()
        results = [step() for _ in range(3)]
        calls.append((batch, round_seconds, results))
        return {"images_per_second": 10.0, "ms": 1.0, "rounds": [10.0], "peak_gib": None}

    monkeypatch.setattr(benchmark, "time_steps", time_steps)
    return calls


class RecordedStep:
    """Stands in for TrainStep: records how it is made and called."""

    made: ClassVar[list["RecordedStep"]] = []

    def __init__(self, model, config, rank, world_size):
        RecordedStep.made.append(self)
        self.config = config
        self.ranks = (rank, world_size)
        self.calls: list[tuple[Batch, int, float]] = []

    def __call__(self, batch, number, lr):
        self.calls.append((batch, number, lr))
        return torch.tensor(number / 7), None

    def validate(self, batch):
        return batch.images.flatten().tolist()


@pytest.fixture
def recorded(monkeypatch) -> list[RecordedStep]:
    monkeypatch.setattr(benchmark, "TrainStep", RecordedStep)
    monkeypatch.setattr(RecordedStep, "made", [])
    return RecordedStep.made


def test_our_step_trains_on_random_images_of_the_effective_batch(recorded):
    config = tiny_config(BATCH_SIZE=3, GRADIENT_ACCUMULATION=2)
    step = benchmark.our_step(config, CPU, rank=1, world_size=4)
    for _ in range(3):
        step()
    (made,) = recorded
    assert made.ranks == (1, 4) and made.config is config
    assert [number for _, number, _ in made.calls] == [0, 1, 2]
    for batch, _, _ in made.calls:
        assert batch.images.shape == (6, 3, 16, 16) and batch.images.dtype == torch.uint8


def test_upstream_step_is_that_of_its_trainer(monkeypatch):
    calls = []

    def record(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    for name in ("autocast", "backward", "clip_grad_norm_"):
        record(benchmark.Accelerator, name)
    record(torch.Tensor, "item")
    record(torch.optim.Adam, "step")
    record(benchmark.EMA, "update")
    step = benchmark.upstream_step(tiny_config(), CPU)
    calls.clear()
    step()
    order = [name for i, name in enumerate(calls) if name not in calls[:i]]
    assert order == ["autocast", "item", "backward", "clip_grad_norm_", "step", "update"]


def test_diffusers_step_updates_the_ema_every_step(monkeypatch):
    pytest.importorskip("diffusers")
    updates = []
    lerp = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: updates.append(args) or lerp(*args))
    config = resolve("cifar10", LARGE_TIER, flags=WIDE | {"DIM": 32, "BATCH_SIZE": 2})
    step = benchmark.diffusers_step(config, CPU)
    for _ in range(2):
        step()
    for ema, parameters, weight in updates:
        assert weight == 1e-3 and not any(p.requires_grad for p in ema)
        assert not all(map(torch.equal, ema, parameters))
    assert len(updates) == 2


@pytest.mark.parametrize("peer", [None, benchmark.UpstreamDiffusion])
def test_training_is_timed_with_its_mfu(monkeypatch, timed, peer):
    monkeypatch.setattr(benchmarking, "training_flops", lambda network, size: 30)
    monkeypatch.setattr(benchmarking, "matmul_flops", lambda device: 600.0)
    row = benchmark.measure_training(tiny_config(), CPU, peer)
    assert row["mfu"] == 0.5 and [batch for batch, *_ in timed] == [4]


def test_mfu_is_of_the_network_that_ran(monkeypatch, timed):
    counted = []
    monkeypatch.setattr(
        benchmarking, "training_flops", lambda network, size: counted.append((network, size)) or 1
    )
    monkeypatch.setattr(benchmarking, "matmul_flops", lambda device: 1.0)
    for name in ("our_step", "upstream_step", "diffusers_step"):
        monkeypatch.setattr(benchmark, name, lambda config, device: lambda: None)
    config = resolve("cifar10", LARGE_TIER, flags=WIDE)
    for peer in (None, benchmark.UpstreamDiffusion, benchmark.DiffusersDiffusion):
        benchmark.measure_training(config, CPU, peer)
    names = [type(network).__name__ for network, _ in counted]
    assert names == ["Unet", "Unet", "UNet2DModel"] and {size for _, size in counted} == {32}
    assert all(next(network.parameters()).is_meta for network, _ in counted)


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

    monkeypatch.setattr(benchmark, "UpstreamDiffusion", lambda config: Process())
    row = benchmark.measure_upstream_sampling(tiny_config(), CPU)
    assert len(set(timesteps)) == 25 and len(timesteps) == 75
    assert timed[0][0] == pytest.approx(4 * 25 / 1000) and row["ms"] == 40
    assert (row["sampler"], row["steps"], row["nfe"]) == ("ddpm", 1000, 1000)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_data_path_feeds_batches_from_where_it_says(monkeypatch, recorded, timed, on_gpu):
    monkeypatch.setattr(dataloader, "MAX_GPU_FRACTION", 0.25)
    benchmark.measure_data_path(tiny_config(), CPU, on_gpu)
    ((batch, round_seconds, _),) = timed
    assert (batch, round_seconds) == (4, 2.0)
    assert (1.0 if on_gpu else 0.0) == dataloader.MAX_GPU_FRACTION
    assert [batch.images.shape for batch, *_ in recorded[0].calls] == [(4, 3, 16, 16)] * 3


def test_learning_curve_is_of_its_seed_on_all_ranks(monkeypatch, recorded):
    images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)
    loads = []

    def load_dataset(*arguments, **_):
        loads.append(arguments[:2])
        return ImageDataset(images)

    monkeypatch.setattr(benchmark, "load_dataset", load_dataset)
    config = tiny_config(BATCH_SIZE=4, GRADIENT_ACCUMULATION=2)
    row = benchmark.learning_curve(config, CPU, 10, 5, rank=1, world_size=2)
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


def test_memory_finds_the_micro_batch_under_the_cap(monkeypatch, recorded, timed):
    caps = []

    def probe(model, config, limit):
        warnings.warn("CUDA out of memory; continuing", FallbackWarning, stacklevel=2)
        caps.append(limit)
        return 2, 99.0

    monkeypatch.setattr(benchmark, "probe_micro_batch", probe)
    monkeypatch.setattr(benchmark, "cap_memory", caps.append)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**30)
    config = tiny_config(BATCH_SIZE=4, GRADIENT_ACCUMULATION=2, MAX_MEMORY_GIB=6.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        row = benchmark.measure_memory(config, CPU)
    assert caps == [6.0, pytest.approx(5.7)]
    assert (row["micro_batch"], row["peak_gib"]) == (2, 3)
    assert (config.BATCH_SIZE, config.GRADIENT_ACCUMULATION) == (2, 4)
    assert timed[0][0] == 8 and len(recorded[0].calls[0][0].images) == 8


# --- speedup


def speed(what: str, batch: int, rate: float, **more) -> dict:
    return {"what": what, "batch": batch, "images_per_second": rate} | more


def test_training_is_compared_with_upstream_at_the_same_batch():
    rows = [
        speed("library's Trainer, fp32", 128, 100.0),
        speed("library's Trainer, fp32", 512, 200.0),
        {"what": "library's Trainer, fp32", "batch": 64, "failed": "no memory"},
    ]
    for batch, expected in ((128, 4.0), (512, 2.0), (64, None), (256, None)):
        row = speed("ours, fp32", batch, 400.0)
        benchmark.add_speedup(row, [*rows, row])
        assert row.get("over_library") == expected
    benchmark.add_speedup(rows[2], rows)
    assert "over_library" not in rows[2]


def test_sampling_is_compared_with_upstreams_only_row():
    upstream = speed("library, fp32", 64, 2.0, sampler="ddpm")
    row = speed("ours, fp32", 256, 50.0, sampler="heun")
    benchmark.add_speedup(row, [upstream, row])
    assert row["over_library"] == 25
