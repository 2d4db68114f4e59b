"""Large images: what saves memory changes no result, the schedule is shifted as it should, no pixel is invented."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet, denoising_diffusion_pytorch
from PIL import Image
from torchvision.datasets.utils import calculate_md5

import inference
import inference_high_res
import train
import train_stl10_optimized
import train_true_high_res
from config import Tier, detect_tier, from_command_line, resolve, tier_of
from ddpm_model import DDPMModel
from engine import batches, fitting, memory, report, sources, unet
from engine.errors import UserError
from engine.fitting import fit, largest_micro_batch, memory_table, search
from engine.measuring import Processes, prepare
from engine.step import Step
from engine.unet import FastUnet
from tests.test_sources import random_images, write_tar
from tests.test_unet import error, results

ROOT = Path(__file__).resolve().parent.parent
LARGE = Tier("Large", 256, 80.0)
TINY = {"DIM": 8, "DIM_MULTS": (1, 1, 1, 1), "ATTENTION_HEADS": (1,), "ATTENTION_DIM": (8,), "BATCH_SIZE": 4}
TINY |= {"NUM_SAMPLES": 2, "SAMPLING_TIMESTEPS": 2, "MAX_STEPS": 2}


# --- gradient checkpointing


def checkpointed_pair(**architecture) -> tuple[FastUnet, FastUnet]:
    """The same network twice, the second with checkpointing on."""
    networks = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        networks.append(FastUnet(**{"dim": 16, "dim_mults": (1, 2, 2), **architecture}).train())
        networks[-1].checkpointing = checkpointing
    return tuple(networks)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_no_gradient(dropout, autocast):
    found = []
    for network in checkpointed_pair(dropout=dropout):
        torch.manual_seed(5)  # of the dropout
        found.append(results(network, autocast))
    for plain, checkpointed in zip(*found, strict=True):
        assert error(checkpointed, plain) < (1e-2 if autocast and dropout else 1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's test below runs the kernels themselves")
def test_checkpointing_goes_with_the_kernels(monkeypatch):
    monkeypatch.setattr(unet, "fused", lambda x: True)  # Triton interprets them
    found = []
    for network in checkpointed_pair(dropout=0.3, dim_mults=(1,), attn_heads=1, attn_dim_head=16):
        torch.manual_seed(5)
        found.append(results(network, size=4))
    for plain, checkpointed in zip(*found, strict=True):
        assert error(checkpointed, plain) < 1e-6


def test_checkpointing_keeps_less():
    kept = []
    for network in checkpointed_pair():
        sizes: dict[int, int] = {}  # bytes by storage, each counted once

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.2 * kept[0]


# --- the shifted schedule


@pytest.mark.parametrize("beta_schedule", ["cosine", "linear", "sigmoid"])
def test_the_log_of_the_snr_is_shifted_everywhere(beta_schedule):
    logs = []
    for schedule_size in (0, 32, 96):
        model = DDPMModel(96, 8, (1,), beta_schedule=beta_schedule, schedule_size=schedule_size)
        alpha_bar = (1 - model.diffusion.betas.double()).cumprod(0)  # as whoever reads the betas gets it
        logs.append((alpha_bar / (1 - alpha_bar)).log())
        assert torch.allclose(alpha_bar, model.diffusion.alphas_cumprod.double(), rtol=1e-3, atol=1e-7)
    usual = slice(5, -1)  # at the ends single precision is coarse
    torch.testing.assert_close((logs[1] - logs[0])[usual], torch.full_like(logs[0], 2 * math.log(32 / 96))[usual],
                               atol=5e-3, rtol=0)  # fmt: skip
    torch.testing.assert_close(logs[2], logs[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("schedule_size", [0, 32])
def test_what_edm_trains_on_is_shifted_by_as_much(schedule_size):
    model = DDPMModel(96, 8, (1,), timesteps=4000, loss_weighting="edm", schedule_size=schedule_size)
    t = model.timesteps_at((torch.arange(10_000) + 0.5) / 10_000)
    alpha_bar = model.diffusion.alphas_cumprod.double()[t]
    log_sigma = ((1 - alpha_bar) / alpha_bar).log() / 2
    assert log_sigma.mean().item() == pytest.approx(-1.2 + (math.log(96 / 32) if schedule_size else 0), abs=0.03)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize("objective", ["pred_v", "pred_noise", "pred_x0"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_everything_derived_is_what_the_library_derives_from_such_betas(objective, gamma, monkeypatch):
    model = DDPMModel(64, 8, (1,), objective=objective, min_snr_gamma=gamma, schedule_size=32)
    original = denoising_diffusion_pytorch.cosine_beta_schedule(1000)
    alpha_bar = (1 - original).cumprod(0)
    shifted = alpha_bar / (alpha_bar + 4 * (1 - alpha_bar))  # the SNR divided by (64 / 32)^2
    betas = 1 - shifted / torch.cat([torch.ones(1, dtype=torch.double), shifted[:-1]])
    monkeypatch.setattr(denoising_diffusion_pytorch, "cosine_beta_schedule", lambda timesteps: betas)
    library = GaussianDiffusion(
        Unet(8, dim_mults=(1,)), image_size=64, objective=objective, beta_schedule="cosine",
        min_snr_loss_weight=gamma > 0, min_snr_gamma=gamma,
    )  # fmt: skip
    for name, values in library.named_buffers():
        if "." not in name:
            # the library stores its betas in single precision, and we start from those
            torch.testing.assert_close(getattr(model.diffusion, name), values, rtol=2e-3, atol=2e-6, msg=name)


def test_a_shifted_model_is_loaded_by_us_and_by_the_library(tmp_path):
    torch.manual_seed(0)
    model = DDPMModel(64, 8, (1, 2), schedule_size=32)
    for name in ("model.pt", "model.safetensors"):
        model.save_model(tmp_path / name)
        loaded = DDPMModel().load_model(tmp_path / name)
        assert loaded.architecture == model.architecture
        assert torch.equal(loaded.sample(1, steps=2, seed=3), model.sample(1, steps=2, seed=3))
    library = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=64, beta_schedule="cosine")
    library.load_state_dict(model.diffusion.state_dict())
    x, noise = torch.rand(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    for t in (10, 500, 990):
        times = torch.full((2,), t)
        theirs = library.p_losses(x * 2 - 1, times, noise)
        weight = model.diffusion.loss_weight[t] / library.loss_weight[t]  # equal: it is in the state too
        torch.testing.assert_close(model(x, times, noise), theirs * weight, rtol=1e-4, atol=1e-6)


def test_a_model_of_before_the_shift_still_loads(tmp_path):
    model = DDPMModel(16, 8, (1,))
    del model.architecture["schedule_size"]
    model.save_model(tmp_path / "old.pt")
    loaded = DDPMModel().load_model(tmp_path / "old.pt")
    assert torch.equal(loaded.diffusion.betas, model.diffusion.betas)


# --- presets by size


@pytest.mark.parametrize(
    ("dataset", "flags", "expected"),
    [
        ("celeba", {}, (64, 128, (1, 2, 2, 2), 128, (False, False, True, True))),
        ("stl10", {}, (96, 128, (1, 2, 2, 2), 64, (False, False, True, True))),
        ("folder", {"IMAGE_SIZE": 128}, (128, 128, (1, 1, 2, 2, 2), 64, (False, False, False, True, True))),
        ("cifar10", {"IMAGE_SIZE": 64}, (64, 128, (1, 2, 2, 2), 128, (False, False, True, True))),
        ("cifar10", {}, (32, 128, (1, 2, 2, 2), 256, (False, True, True, True))),
    ],
)
def test_large_images_get_their_preset_whatever_they_show(dataset, flags, expected):
    made = resolve(dataset, LARGE, flags=flags)
    with torch.device("meta"):
        model = DDPMModel.from_config(made)
    found = made.IMAGE_SIZE, made.DIM, made.DIM_MULTS, made.BATCH_SIZE * made.GRADIENT_ACCUMULATION
    assert (*found, tuple(model.architecture["full_attn"])) == expected
    assert (made.SCHEDULE_SIZE > 0) == (made.IMAGE_SIZE > 32)


def test_a_script_for_large_images_asks_for_more_than_a_small_data_sets_preset():
    script = train_true_high_res.DEFAULTS
    assert [resolve(name, LARGE, script).IMAGE_SIZE for name in ("cifar10", "shapes", "celeba", "stl10", "folder")] == [
        64, 64, 64, 96, 64,
    ]  # fmt: skip
    assert resolve("cifar10", LARGE, script, flags={"IMAGE_SIZE": 32}).DIM_MULTS == (1, 2, 2, 2)
    at_96 = resolve("celeba", LARGE, train_stl10_optimized.DEFAULTS)
    assert (at_96.IMAGE_SIZE, at_96.LEARNING_RATE) == (96, 1e-3)
    on_a_cpu = resolve("shapes", Tier("CPU", 32, 0.0), script)
    assert (on_a_cpu.IMAGE_SIZE, on_a_cpu.DIM_MULTS) == (64, (1, 2, 2))


def test_target_size_is_the_image_size_and_a_named_batch_is_not_tried():
    script = train_true_high_res.DEFAULTS
    made, _ = from_command_line("", script, ["--dataset", "folder", "--target_size", "128", "--memory_gib", "6"])
    assert (made.IMAGE_SIZE, made.MEMORY_GIB) == (128, 6.0)
    tier = tier_of(6)
    assert resolve("stl10", tier, script).FIT_MEMORY
    assert not resolve("stl10", tier, script, flags={"BATCH_SIZE": 8}).FIT_MEMORY
    assert resolve("stl10", tier, script, flags={"BATCH_SIZE": 8, "FIT_MEMORY": True}).FIT_MEMORY


# --- memory


def test_a_batch_is_split_and_stays_the_same_batch():
    made = resolve("stl10", tier_of(24), train_stl10_optimized.DEFAULTS)
    made.split_batch(16)
    assert (made.BATCH_SIZE, made.GRADIENT_ACCUMULATION, made.origin["BATCH_SIZE"]) == (16, 4, "fits (tried)")


@pytest.mark.parametrize(
    ("batch", "most"), [(64, 64), (64, 63), (64, 16), (64, 5), (64, 1), (96, 47), (13, 12), (13, 13), (1, 1), (7, 6)]
)
@pytest.mark.parametrize("truth", ["line", "above the line", "below the line", "no memory told"])
@pytest.mark.parametrize("whole_first", [False, True])
def test_the_largest_divisor_that_fits_is_found_in_few_trials(batch, most, truth, whole_first):
    tried = []

    def peak(micro: int) -> float | None:
        tried.append(micro)
        bend = {"above the line": 0.002, "below the line": -0.002}.get(truth, 0.0)
        taken = 0.0 if truth == "no memory told" else 1 + 0.1 * micro + bend * micro**2
        return taken if micro <= most else None

    limit = {"line": 1.001 + 0.1 * most, "no memory told": 1.0}.get(truth, 1e9)
    largest = max(size for size in range(1, most + 1) if batch % size == 0)
    assert largest_micro_batch(peak, batch, limit, whole_first)[0] == largest
    assert len(tried) == len(set(tried)) <= (1 if whole_first and most == batch else 7)
    failed = [size for size in tried if size > most]
    assert failed == sorted(failed, reverse=True)  # nothing larger than what did not fit


def test_a_line_that_foretells_a_little_too_much_is_not_believed():
    taken = {4: 0.70, 8: 1.05, 16: 1.69, 32: 2.73}  # 64 px, dim 32, on an H100: foretold for 32 were 2.97
    assert largest_micro_batch(taken.get, 128, 2.85) == (32, 2.73)


def test_when_nothing_fits_it_is_said():
    with pytest.raises(UserError, match="not even one image at a time fits"):
        largest_micro_batch(lambda micro: None, 64, 1.0)


class Hungry(DDPMModel):
    """Fits into memory up to 5 images at a time."""

    def forward(self, images, t, noise):
        if len(images) > 5:
            raise torch.OutOfMemoryError
        return super().forward(images, t, noise)


def tiny_config(**changes):
    return resolve("folder", Tier("CPU", 32, 0.0), flags=TINY | {"IMAGE_SIZE": 16, "DROPOUT": 0.1} | changes)


def test_trials_are_real_steps(capsys):
    found = search(Hungry.from_config, tiny_config(BATCH_SIZE=8, GRADIENT_ACCUMULATION=2), room=1.0)
    assert found["micro_batch"] == 4
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["  4 at once", "  8 at once"]
    assert search(Hungry.from_config, tiny_config(BATCH_SIZE=16), room=1.0)["micro_batch"] == 4
    assert "16 at once: too many" in capsys.readouterr().err.splitlines()[0]


class Broken(DDPMModel):
    """Fails whatever its batch."""

    def forward(self, images, t, noise):
        raise RuntimeError("broken")


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_what_fails_at_any_size_is_no_lack_of_memory(batch):
    with pytest.raises(RuntimeError, match="broken"):
        search(Broken.from_config, tiny_config(BATCH_SIZE=batch), room=1.0)


class Here(Processes):
    """Does in this process what others do in a new one."""

    def measured(self, jobs):
        for job in jobs:
            try:
                yield job, job.row | job.measure(**job.options)
            except Exception as problem:
                yield job, job.row | {"failed": f"{type(problem).__name__}: {problem}"}


def test_what_was_found_is_remembered_by_card_and_configuration(tmp_path, monkeypatch, capsys):
    """The GPU is made up; what is done with its answers is not."""
    card, free, trials = "Card A", 10.4 * 2**30, []

    def trial(make, config, steps):
        trials.append(config.BATCH_SIZE)
        taken = 1 + 0.5 * config.BATCH_SIZE
        return {"peak_gib": taken} if taken < room else None

    monkeypatch.setattr(fitting, "Processes", Here)
    monkeypatch.setattr(fitting, "trial", trial)
    monkeypatch.setattr(fitting, "fit_on_gpu", lambda images: True)
    monkeypatch.setattr(fitting, "memory_limit", lambda: 24 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    images, file, room = np.zeros(2**30, np.uint8), tmp_path / "cache" / "memory.json", 9.0

    def fitted(**changes) -> tuple[int, int]:
        trials.clear()
        return fit(None, tiny_config(BATCH_SIZE=64, **changes), images, file), len(trials)

    micro, _ = fitted()
    assert micro == 8 and trials == [64, 4, 8, 16]  # 16 would take all of the 9 GiB, of which some stay free
    assert fitted() == (micro, 0)
    assert "as" in capsys.readouterr().out
    assert fitted(DIM=16)[1] > 0
    card = "Card B"
    assert fitted()[1] > 0
    free, room = 5.4 * 2**30, 4.0
    assert fitted() == (4, len(trials)) and trials
    assert len(json.loads(file.read_text())) == 4

    card = "Card C"
    monkeypatch.setattr(fitting, "trial", lambda *arguments, **options: 1 / 0)
    assert fitted()[0] == 64
    assert "could not be tried (ZeroDivisionError" in capsys.readouterr().out


def test_the_memory_table_runs_through(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results" / "memory-CPU.json"
    rows = memory_table(DDPMModel.from_config, {"16 px": tiny_config(MEMORY_GIB=3.0)}, path, steps=3, seconds=100)
    assert rows[0]["micro_batch"] * rows[0]["accumulation"] == 4 and rows[0]["images_per_second"] > 0
    assert 0 < rows[0]["loss"] < 2
    monkeypatch.setattr(fitting, "Processes", Here)
    monkeypatch.setattr(fitting, "trial", lambda make, config, steps: None)
    rows += memory_table(DDPMModel.from_config, {"too large": tiny_config(MEMORY_GIB=3.0)}, path)
    assert "not even one image" in rows[1]["failed"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory ")]
    assert len(lines) == 2 and "4 x 1" in lines[0] and "FAILED: UserError: not even one" in lines[1]
    assert json.loads(path.read_text())["rows"] == rows
    measured = rows[0] | {"peak_gib": 2.5, "fp32_gib": 4.0, "amp_gib": 3.0}
    table = report.memory_tables([{"device": "card", "torch": "2", "steps": 3, "rows": [rows[1], measured]}])
    assert "| 3 | 8 | 4 x 1 | 2.5 |" in table and "| 4 | 3 | 25 % |" in table and "failed: UserError: not even" in table


# --- the same on a GPU


def on_the_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@pytest.fixture
def capped():
    """Caps this process's GPU memory at 6 GiB for a test."""
    prepare()
    memory.cap_memory(6.0)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    memory.cap = None


def step_at_64(**flags) -> Step:
    config = resolve("celeba", tier_of(6), train_true_high_res.DEFAULTS, flags={"BATCH_SIZE": 64, **flags})
    return Step(DDPMModel.from_config(config).cuda().train(), config)


@on_the_gpu
def test_a_checkpointed_step_is_captured_and_takes_less_memory():
    images = torch.randint(256, (64, 3, 64, 64), dtype=torch.uint8, device="cuda")
    losses, peaks = [], []
    for checkpointing in (False, True):
        prepare()  # frees the other one's memory
        step = step_at_64(GRADIENT_CHECKPOINTING=checkpointing)
        losses.append([step(images, number, 1e-4)[0].item() for number in range(4)])
        peaks.append(torch.cuda.max_memory_reserved())
        assert step.graphs
        del step
    # the two draw their dropout differently
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and peaks[1] < 0.8 * peaks[0]


@on_the_gpu
def test_a_cap_makes_a_smaller_card(capped):
    tier = detect_tier()
    assert (tier.name, tier.memory) == ("Small", 6.0)
    left = 6 * 2**30 - torch.cuda.memory_reserved()  # earlier tests may hold some
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(left + 2**30, dtype=torch.uint8, device="cuda")
    torch.empty(left - 2**30, dtype=torch.uint8, device="cuda")


@on_the_gpu
def test_what_is_found_trains(capped, tmp_path):
    config = resolve("stl10", detect_tier(), train_stl10_optimized.DEFAULTS, flags={"MEMORY_GIB": 6.0})
    images, file = np.zeros((1000, 3, 96, 96), np.uint8), tmp_path / "memory.json"
    micro = fit(DDPMModel.from_config, config, images, file)
    assert 1 <= micro <= 64 and 64 % micro == 0
    assert fit(DDPMModel.from_config, config, images, file) == micro
    held = torch.cuda.memory_allocated() / 2**30  # by earlier tests
    found = fitting.trial(DDPMModel.from_config, fitting.split(config, micro, 64), steps=3)
    assert found is not None and found["peak_gib"] <= 6
    (remembered,) = json.loads(file.read_text()).values()
    assert remembered["peak_gib"] == pytest.approx(found["peak_gib"] - held, rel=0.25)  # not cuDNN's tries


# --- from the archive to the picture: the scripts' own main, in this process


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls a training script's main in an empty folder: call(script, "--flag", ...) returns the configuration."""
    monkeypatch.chdir(tmp_path)

    def call(script, *arguments: str, **flags) -> dict:
        given = [text for name, value in (TINY | flags).items() for text in (f"--{name.lower()}", as_text(value))]
        name = f"run-{len(list(Path('.').glob('checkpoints/*')))}"
        monkeypatch.setattr(sys, "argv", [script.__file__, *arguments, *given, "--run_name", name])
        train.main(script.__doc__, script.DEFAULTS)
        return torch.load("checkpoints/ddpm_final.pt", weights_only=True)

    return call


def as_text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def draw(tmp_path, monkeypatch, size: int) -> None:
    """Draws with inference_high_res.py from the newest checkpoint and looks at what comes out."""
    arguments = ["--num_samples", "3", "--batch_size", "2", "--output_dir", f"drawn-{size}"]
    monkeypatch.setattr(sys, "argv", ["inference_high_res.py", *arguments])
    inference.main(inference_high_res.__doc__, inference_high_res.DEFAULTS)
    singles = sorted((tmp_path / f"drawn-{size}").rglob("0*.png"))
    assert [Image.open(path).size for path in singles] == [(size, size)] * 3
    (grid,) = (tmp_path / f"drawn-{size}").rglob("grid.png")
    assert Image.open(grid).width >= 2 * max(size, 128)


def test_stl10_from_its_archive(call, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "STL10_BINS", {"stl10_binary/train_X.bin": 4, "stl10_binary/unlabeled_X.bin": 12})
    parts = [part.tobytes() for part in np.split(random_images(16, 96), [4])]
    archive = tmp_path / "data" / "stl10_binary.tar.gz"
    archive.parent.mkdir()
    write_tar(archive, dict(zip(sources.STL10_BINS, parts, strict=True)))
    monkeypatch.setattr(sources, "STL10_ARCHIVE", replace(sources.STL10_ARCHIVE, md5=calculate_md5(archive)))
    made = call(train_stl10_optimized, "--gradient_checkpointing")
    assert made["data"] == {"dataset": "stl10", "images": 16, "shape": [3, 96, 96]}
    assert made["architecture"]["schedule_size"] == 32 and made["architecture"]["dropout"] == 0.1
    draw(tmp_path, monkeypatch, 96)


def test_celeba_from_its_zip_and_a_folder_at_128(call, tmp_path, monkeypatch):
    archive = tmp_path / "data" / "celeba" / "img_align_celeba.zip"
    archive.parent.mkdir(parents=True)
    faces = np.random.default_rng(0).integers(0, 256, (16, 218, 178, 3), np.uint8)
    with zipfile.ZipFile(archive, "w") as file:
        for i, pixels in enumerate(faces):
            jpeg = io.BytesIO()
            Image.fromarray(pixels).save(jpeg, "JPEG")
            file.writestr(f"img_align_celeba/{i + 1:06d}.jpg", jpeg.getvalue())
    monkeypatch.setattr(sources, "CELEBA_ARCHIVE", replace(sources.CELEBA_ARCHIVE, md5=calculate_md5(archive)))
    made = call(train_true_high_res, "--dataset", "celeba")
    assert made["data"] == {"dataset": "celeba", "images": 16, "shape": [3, 64, 64]}
    draw(tmp_path, monkeypatch, 64)

    folder = ["--dataset", "folder", "--data_dir", "data/celeba/img_align_celeba", "--target_size"]
    made = call(train_true_high_res, *folder, "128")
    assert made["data"]["shape"] == [3, 128, 128]
    draw(tmp_path, monkeypatch, 128)
    with pytest.raises(UserError, match=r"192 px are asked for, but .* have 178 .*or have them enlarged"):
        call(train_true_high_res, *folder, "192")
    assert call(train_true_high_res, *folder, "192", "--use_upsampling")["data"]["shape"] == [3, 192, 192]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what a process has mapped")
def test_a_mapped_file_is_copied_without_being_held_in_memory(tmp_path, monkeypatch):
    def mapped() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssFile:")[1].split()[0]) * 1024

    images = random_images(20_000, 32)
    np.save(tmp_path / "images.npy", images)
    monkeypatch.setattr(batches, "PIECE", 1000)
    file = np.load(tmp_path / "images.npy", mmap_mode="r")
    before = mapped()
    copied = batches.on_device(file, torch.device("cpu"))
    assert mapped() - before < images.nbytes / 4
    assert torch.equal(copied, torch.from_numpy(images))
    assert np.array_equal(file, images) and mapped() - before > images.nbytes / 2  # which counts once it is read


def test_decoding_that_was_killed_goes_on_and_ends_the_same(tmp_path):
    """A process decodes a folder and is killed; another one goes on. Each notes the images that it opens."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(700):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{i:04d}.png")
    decode = (
        "import sys; from pathlib import Path; from PIL import Image; from engine import sources\n"
        "whole, opened = sources.center_square, open(sys.argv[2], 'a')\n"
        "def noted(*a):\n    print(1, file=opened, flush=True)\n    return whole(*a)\n"
        "sources.center_square = noted\n"
        "sources.load_images('folder', 32, Path('images'), Path(sys.argv[1]), workers=2, progress=False)"
    )

    def start(cache: str, opened: str) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-c", decode, cache, opened], cwd=tmp_path, env=environment)

    killed = start("cache", "first")
    while not (journals := list((tmp_path / "cache").glob("*.journal"))) or journals[0].read_text().count("\n") < 5:
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    finished = journals[0].read_text().count("\n") - 1
    assert not list((tmp_path / "cache").glob("*.npy"))
    assert start("cache", "second").wait() == 0
    (array,) = (tmp_path / "cache").iterdir()
    sources.load_images("folder", 32, folder, tmp_path / "whole", progress=False)
    assert array.read_bytes() == (tmp_path / "whole" / array.name).read_bytes()
    assert (tmp_path / "second").read_text().count("1") == 700 - finished * sources.BLOCK
