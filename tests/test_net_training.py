"""The wiring of training: which images, which seed, which file, which weights go where."""

import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed import ReduceOp

import evaluate
from ddpm_model import DDPMModel
from engine import batches, checkpoints, optimizer, unet
from engine.batches import Batches, split
from engine.runs import LOG_EVERY, Interrupt
from engine.step import draw
from tests import test_processes
from tests.test_step import images, largest_difference, make
from tests.test_training import ROOT, TINY
from tests.test_unet import channels_last, compare, on_the_cpu

CPU = torch.device("cpu")


# --- which images


def numbered(count: int) -> np.ndarray:
    """Images each of which is filled with its own index."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 3, 4, 4))


def numbers(batch: torch.Tensor) -> list[int]:
    """The indices of numbered images."""
    return batch[:, 0, 0, 0].tolist()


def test_split_holds_out_one_in_twenty_but_not_many_more_than_512():
    assert split(200)[1].tolist() == list(range(0, 200, 20))
    assert split(51200)[1].tolist() == list(range(0, 51200, 100))
    assert len(split(2)[1]) == 1


def test_batches_validate_on_exactly_the_held_out_images():
    made = Batches(numbered(200), 16, 0, CPU, 1)
    assert numbers(made.validation()) == list(range(0, 200, 20))


@pytest.mark.parametrize("resident", [False, True])
def test_batches_of_an_epoch_are_the_images_of_its_order(resident):
    made = Batches(numbered(200), 16, 0, CPU, 1, rank=1, world=2)
    if resident:
        made.resident = batches.on_device(made.images, CPU)
    seen = [numbers(batch) for batch in made.epoch(5, start=2)]
    assert seen == made.order(5)[2:].tolist()
    assert not set(range(0, 200, 20)) & {number for batch in seen for number in batch}


def test_evaluate_measures_the_loss_on_exactly_the_held_out_images(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "load_images", lambda *what: asked.append(what) or numbered(200))
    config = {"DATASET": "folder", "IMAGE_SIZE": 4, "DATA_DIR": "there"}
    assert numbers(evaluate.held_out(config)) == list(range(0, 200, 20))
    assert asked == [("folder", 4, Path("there"))]


# --- which seed

PAIRS = [(seed, step) for seed in range(4) for step in range(4)]


@pytest.mark.parametrize("part", ["place", "noise", "mirror"])
def test_draw_is_another_one_for_every_seed_and_step(part):
    at = ["place", "noise", "mirror"].index(part)
    shape = torch.Size([64, 1, 2, 2])
    drawn = {tuple(draw(*pair, shape, CPU)[at].flatten().tolist()) for pair in PAIRS}
    assert len(drawn) == len(PAIRS)


def test_draw_gives_the_same_again():
    once, again = (draw(3, 7, torch.Size([8, 3, 2, 2]), CPU) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_batches_have_another_order_for_every_seed_and_epoch():
    made = [Batches(numbered(200), 16, seed, CPU, 1) for seed in range(4)]
    orders = {tuple(made[seed].order(epoch).flatten()) for seed, epoch in PAIRS}
    assert len(orders) == len(PAIRS)


def test_step_draws_by_the_configured_seed_and_its_own_number():
    losses = [make(SEED=seed)(images(), number, 1e-3)[0].item() for seed, number in PAIRS[:5]]
    assert len(set(losses)) == 5


# --- the update


class Infinite:
    """A hook that makes the gradient of a parameter infinite while `on`."""

    on = True

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf if self.on else gradient


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_step_leaves_out_an_infinite_gradient_of_a_finite_loss(kind):
    step, reference, hook = make(OPTIMIZER=kind), make(OPTIMIZER=kind), Infinite()
    step.parameters[0].register_hook(hook)
    loss, norm = step(images(), 0, 1e-3)
    assert loss.isfinite() and not norm.isfinite()
    assert (step.skipped.item(), step.skipped_in_a_row.item()) == (1, 1)
    assert largest_difference(step.model, reference.model) == 0
    assert largest_difference(step.ema, reference.ema) == 0
    hook.on = False
    for made in (step, reference):
        made(images(), 1, 1e-3)
    assert largest_difference(step.model, reference.model) == 0


@pytest.mark.parametrize(
    ("loss", "gradient", "moves"),
    [(0.5, 0.1, True), (np.nan, 0.1, False), (np.inf, 0.1, False), (0.5, np.nan, False)],
)
def test_update_looks_at_both_loss_and_gradient(loss, gradient, moves):
    step, reference = make(), make()
    step.rate.fill_(1e-3)
    step.gradient.fill_(gradient)
    step.update(torch.tensor(loss))
    assert (largest_difference(step.model, reference.model) > 0) == moves
    assert step.skipped.item() == (not moves)


def test_update_of_a_scaled_loss_is_the_same_and_a_bad_one_halves_the_scale(monkeypatch):
    monkeypatch.setattr("engine.step.STEPS_PER_SCALE", 2)
    step, reference = make(GRAD_CLIP=0.1), make(GRAD_CLIP=0.1)
    step.scales = True
    step.scale.fill_(1024.0)
    loss, norm = step(images(), 0, 1e-3)
    expected = reference(images(), 0, 1e-3)
    torch.testing.assert_close((loss, norm), expected)
    assert largest_difference(step.model, reference.model) < 1e-6
    assert step.scale.item() == 1024.0
    step(images(), 1, 1e-3)
    assert step.scale.item() == 2048.0  # after two good ones
    step.model.broken = True
    step(images(), 2, 1e-3)
    assert step.scale.item() == 1024.0


# --- which file


def save_at(path: Path, seconds: int) -> Path:
    """A file that was last written so many seconds after 2020."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (1577836800 + seconds, 1577836800 + seconds))
    return path


@pytest.mark.parametrize("newer", ["a", "b", "deep/er"])
def test_find_newest_takes_the_run_that_saved_last(newer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    for name in ("a", "b", "deep/er"):
        save_at(tmp_path / name / "last.pt", 100 if name == newer else 0)
        save_at(tmp_path / name / "final.pt", 200)  # no run goes on from it unless it is named
    assert checkpoints.find("newest") == tmp_path / newer / "last.pt"


def test_newest_is_the_checkpoint_written_last_under_its_shorter_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    save_at(tmp_path / "old" / "final.pt", 0)
    save_at(tmp_path / "z" / "final.pt", 50)
    save_at(tmp_path / "z" / ".last.pt.1.tmp", 90)
    save_at(tmp_path / "z" / ".last.pt", 90)
    save_at(tmp_path / "z" / "notes.txt", 90)
    published = save_at(tmp_path / "ddpm_final.pt", 50)
    assert checkpoints.newest() == published
    newer = save_at(tmp_path / "exported" / "model.safetensors", 60)
    assert checkpoints.newest() == newer


def test_write_atomically_syncs_the_whole_file_before_it_has_its_name(tmp_path, monkeypatch):
    path, events, replace = tmp_path / "model.pt", [], os.replace
    path.write_bytes(b"old")

    def fsync(handle: int) -> None:
        (written,) = (file for file in tmp_path.iterdir() if file != path)
        assert os.path.samestat(os.fstat(handle), written.stat())
        events.append(("synced", written.read_bytes(), path.read_bytes()))

    def rename(source: Path, target: Path) -> None:
        events.append(("renamed", source.read_bytes(), path.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    checkpoints.write_atomically(path, lambda file: file.write(b"new"))
    assert events == [("synced", b"new", b"old"), ("renamed", b"new", b"old")]
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


# --- which signal


@pytest.mark.parametrize(
    ("mine", "theirs", "agreed"), [(0, 0, 0), (15, 0, 15), (0, 2, 2), (15, 15, 15), (2, 15, 15)]
)
def test_interrupt_is_one_signal_whichever_process_got_it(mine, theirs, agreed, monkeypatch):
    how = {ReduceOp.MAX: max, ReduceOp.MIN: min, ReduceOp.SUM: lambda *both: sum(both)}

    def all_reduce(number: torch.Tensor, op: ReduceOp) -> None:
        number.fill_(how[op](number.item(), theirs))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    interrupt = Interrupt(SimpleNamespace(num_processes=2, device=CPU))
    interrupt.number = mine
    assert not interrupt.wanted(LOG_EVERY + 1)  # between, nobody asks
    assert interrupt.wanted(LOG_EVERY) == (agreed > 0)
    assert interrupt.number == agreed


@test_processes.pytestmark
def test_two_processes_that_get_sigterm_save_and_exit_with_its_code(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    arguments = [sys.executable, str(ROOT / "train.py"), *TINY]
    arguments += ["--run_name", "stopped", "--max_steps", "100000"]
    ranks = [
        test_processes.start(tmp_path, arguments, RANK=r, LOCAL_RANK=r, **common)
        for r in ("0", "1")
    ]
    try:
        metrics = tmp_path / "samples" / "stopped" / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert all(process.poll() is None for process in ranks)
            time.sleep(0.05)
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [128 + signal.SIGTERM] * 2
    step = checkpoints.load(tmp_path / "checkpoints" / "stopped" / "last.pt")["progress"]["step"]
    assert step % LOG_EVERY == 0
    assert f"interrupted and saved at step {step}: go on with --resume stopped" in outputs[0]
    assert "interrupted" not in outputs[1]


# --- kernels


@on_the_cpu
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("count", [3, 8, 10])
def test_norm_kernel_sums_over_images_in_rounds_the_last_of_which_may_be_short(count, parts):
    torch.manual_seed(0)
    channels = 20  # in two programs
    sums, modulation = torch.randn(3, count, parts, channels), torch.randn(count, 2 * channels)
    gain, dgain, dbias, dresidual = (torch.empty(channels).normal_() for _ in range(4))
    dmodulation, whole = torch.empty_like(modulation), sums.sum(2)
    scale = modulation[:, :channels]

    def finish(modulated: bool) -> None:
        unet.kernels._norm_finish[(2,)](
            sums, gain, modulation, dgain, dbias, dmodulation, dresidual, 2 * channels, count,
            channels, IMAGES=4, PARTS=parts, COLUMNS=16, BIAS=True, MODULATED=modulated,
            RESIDUAL=not modulated,
        )  # fmt: skip

    finish(modulated=True)
    torch.testing.assert_close(dgain, (whole[0] * (scale + 1)).sum(0))
    torch.testing.assert_close(dbias, whole[2].sum(0))
    torch.testing.assert_close(dmodulation, torch.cat([whole[0] * gain, whole[1]], dim=1))
    finish(modulated=False)
    torch.testing.assert_close(dgain, whole[0].sum(0))
    torch.testing.assert_close(dresidual, whole[1].sum(0))


def compare_norms(count: int, channels: int, side: int, kind: str) -> None:
    """The norm's kernel against its formula, all gradients included."""
    x = channels_last(count, channels, side, side, dtype=torch.float32)
    modulated = kind == "modulated"
    modulation = torch.randn(count, 2 * channels) if modulated else None
    residual, residual_bias = (None, None) if modulated else (x.flip(0), torch.randn(channels))
    bias, gain = torch.randn(channels), torch.randn(1, channels, 1, 1)
    inputs = [x, bias, gain, modulation, residual, residual_bias]
    dy = channels_last(count, channels, side, side, dtype=torch.float32)
    compare(
        lambda *values: unet.kernels.Norm.apply(*values, True),
        lambda *values: unet.norm(*values, True),
        inputs,
        dy,
        1e-5,
    )


@on_the_cpu
@pytest.mark.parametrize("kind", ["modulated", "residual"])
def test_norm_kernel_goes_over_its_rows_in_rounds_the_last_of_which_is_short(kind, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(unet.kernels, "PROGRAMS", 4)
    monkeypatch.setattr(unet.kernels, "TILE", 128)  # 4 rows of 13 for each of two programs an image
    compare_norms(3, 24, 5, kind)


@on_the_cpu
def test_bias_kernel_goes_over_its_rows_in_rounds_the_last_of_which_is_short(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(unet.kernels, "PROGRAMS", 3)
    monkeypatch.setattr(unet.kernels, "TILE", 128)
    x, dy = (channels_last(3, 24, 7, 5, dtype=torch.float32) for _ in range(2))
    kernel = unet.kernels.AddBias.apply
    compare(lambda x, bias: kernel(x * 1, bias), unet.biased, [x, torch.randn(24)], dy, 1e-5)


# --- which optimizer


def test_is_matrix_leaves_out_the_first_and_the_last_convolution():
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2))
    found = {name: optimizer.is_matrix(name, p) for name, p in model.named_parameters()}
    left_out = {name for name, p in model.named_parameters() if p.ndim > 1 and not found[name]}
    others = {name for name in left_out if not name.endswith((".g", ".mem_kv"))}
    assert others == {f"diffusion.model.{name}_conv.weight" for name in ("init", "final")}
    for name in ("final_res_block.block1.proj", "time_mlp.1", "mid_block1.mlp.1"):
        assert found[f"diffusion.model.{name}.weight"]
    assert not any(found[name] for name, p in model.named_parameters() if p.ndim < 2)


@pytest.mark.parametrize("kind", ["muon", "adam"])
def test_step_moves_each_weight_by_its_own_optimizer(kind):
    """Adam's first update is the learning rate, up or down, in every single weight."""
    names = ("init_conv", "final_conv", "final_res_block.block1.proj")
    step = make(OPTIMIZER=kind)
    weights = [step.model.get_parameter(f"diffusion.model.{name}.weight") for name in names]
    before = [weight.detach().clone() for weight in weights]
    step(images(), 0, 0.01)
    moved = [(weight.detach() - old).abs() for weight, old in zip(weights, before, strict=True)]
    by_adam = [torch.allclose(by, torch.tensor(0.01), rtol=0.02) for by in moved]
    assert by_adam == [True, True, kind == "adam"]


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_orthogonal_does_five_newton_schulz_steps_on_the_singular_values(scale):
    x = torch.randn((3, 6, 20), generator=torch.Generator().manual_seed(0))
    u, expected, v = torch.linalg.svd(x, full_matrices=False)
    expected = expected / x.flatten(1).norm(dim=1, keepdim=True)
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    found = u.mT @ optimizer.orthogonal(x, torch.tensor(scale)) @ v.mT
    torch.testing.assert_close(found, torch.diag_embed(scale * expected), rtol=0, atol=1e-4)
