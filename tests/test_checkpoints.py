"""Checkpoint files: atomic, found by age and name, plain tensors only."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ddpm_model import DDPMModel
from engine import checkpoints, run_names
from engine.errors import UserError
from tests.helpers import max_weight_difference
from train import parse_command_line


def test_write_atomically_syncs_the_complete_file_before_renaming(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle):
        events.append(("fsync", os.fstat(handle).st_size))
        fsync(handle)

    def note_replace(source, target):
        events.append(("replace", Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    checkpoints.write_atomically(path, lambda file: file.write(b"abc"))
    assert events == [("fsync", 3), ("replace", 3)]
    assert path.read_bytes() == b"abc" and list(tmp_path.iterdir()) == [path]


def test_write_atomically_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="full") as caught:

        def write(file):
            file.write(b"half")
            raise OSError(28, "full")

        checkpoints.write_atomically(path, write)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def two_runs(tmp_path, monkeypatch) -> Path:
    """checkpoints/ with run `b`, then run `a`, saved one after the other."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("b", "a")):
        for file in ("last.pt", "best.pt"):
            path = Path("checkpoints") / name / file
            checkpoints.save(path, {"x": torch.zeros(1)})
            seconds = 1000 + 10 * age + (file == "best.pt")
            os.utime(path, (seconds, seconds))
    return tmp_path


def test_resolve_checkpoint_takes_the_run_saved_last(two_runs):
    assert checkpoints.resolve_checkpoint("newest") == Path("checkpoints/a/last.pt")
    assert checkpoints.resolve_checkpoint("b") == Path("checkpoints/b/last.pt")
    assert checkpoints.resolve_checkpoint("checkpoints/b") == Path("checkpoints/b/last.pt")
    with pytest.raises(UserError, match=r"--resume bb: no such checkpoint.*; did you mean b\?"):
        checkpoints.resolve_checkpoint("bb", "--resume")


def test_newest_is_the_file_written_last_under_its_shortest_path(two_runs):
    assert checkpoints.newest_checkpoint() == Path("checkpoints/a/best.pt")
    final = Path("checkpoints/a/final.pt")
    checkpoints.save(final, {"x": torch.zeros(1)})
    checkpoints.link_or_copy(final, Path("checkpoints/ddpm_final.pt"))
    assert checkpoints.newest_checkpoint() == Path("checkpoints/ddpm_final.pt")


def test_newest_falls_back_to_the_pretrained_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert checkpoints.newest_checkpoint() == checkpoints.PRETRAINED_DIR / "cifar10.safetensors"
    assert "using the pretrained" in capsys.readouterr().out


def test_link_or_copy_replaces_the_target(tmp_path, monkeypatch):
    replace = os.replace

    def fail(*_):
        raise OSError

    def replace_in_a_folder(source, target):  # as between two file systems
        replace(source, target) if Path(source).parent == Path(target).parent else fail()

    (tmp_path / "run").mkdir()
    source, target = tmp_path / "run/a", tmp_path / "b"
    for name, function in (("stat", os.stat), ("link", fail), ("replace", replace_in_a_folder)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, function)
            source.write_bytes(name.encode())
            target.write_bytes(b"old")
            checkpoints.link_or_copy(source, target)
            checkpoints.link_or_copy(source, target)  # which is a link already
        assert target.read_bytes() == name.encode()
        assert [*tmp_path.rglob(".*")] == []
        target.unlink()


def small() -> DDPMModel:
    return DDPMModel(8, dim=8, dim_mults=(1, 2), timesteps=40, sampling_timesteps=4)


@pytest.fixture
def small_model(tmp_path, monkeypatch) -> DDPMModel:
    monkeypatch.chdir(tmp_path)
    return small()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_no_flipped_bit_changes_a_loaded_model(small_model, suffix, capsys):
    path = Path(f"model{suffix}")
    small_model.save_model(path)
    assert "checksum" not in capsys.readouterr().out
    intact = path.read_bytes()
    rng = random.Random(0)
    # Mostly where names, shapes and offsets are.
    header = [rng.randrange(16_000) for _ in range(30)]
    for bit in (*header, *(rng.randrange(8 * len(intact)) for _ in range(10))):
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            loaded = small().load_model(path)
        except UserError as error:
            assert path.name in str(error)
        else:  # padding between the parts of a .pt, or the name of the checksum
            assert suffix == ".pt" or "checksum" in capsys.readouterr().out
            assert loaded.architecture == small_model.architecture
            assert max_weight_difference(loaded, small_model) == 0


def test_safetensors_of_before_loads_with_a_note(small_model, capsys):
    state = {name: value.contiguous() for name, value in small_model.state_dict().items()}
    metadata = {"architecture": json.dumps(small_model.architecture)}
    safetensors.torch.save_file(state, "before.safetensors", metadata)
    loaded = small().load_model("before.safetensors")
    assert max_weight_difference(loaded, small_model) == 0
    note = "note: before.safetensors was written before files had checksums"
    assert note in capsys.readouterr().out


def test_pretrained_weights_are_checked(tmp_path, capsys):
    name = "cifar10.safetensors"
    shutil.copy(checkpoints.PRETRAINED_DIR / name, tmp_path)
    checkpoints.load_safetensors(tmp_path / name)
    assert not capsys.readouterr().out
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"cifar10\.safetensors is damaged \(checksum mismatch"):
        checkpoints.load_safetensors(tmp_path / name)


@pytest.mark.parametrize("ema", [torch.ones(2), {}, 3])
def test_load_model_refuses_other_ema_weights(small_model, ema):
    architecture, weights = small_model.architecture, small_model.state_dict()
    torch.save({"architecture": architecture, "model": weights, "ema": ema}, "model.pt")
    with pytest.raises(UserError, match=r"model\.pt does not fit DDPMModel"):
        small().load_model("model.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_load_model_refuses_absurd_weights(small_model, value):
    with torch.no_grad():
        small_model.unet.final_conv.weight[0, 0] = value
    small_model.save_model("model.pt")
    with pytest.raises(UserError, match=r"not finite or above 1e\+06 .*final_conv.weight"):
        small().load_model("model.pt")


EMPTY_STATE = {key: type_() for key, type_ in checkpoints.TRAINING_KEYS.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": [1]}, "has no valid optimizer to resume with. Start a new run from"),
        ({"config": {3: 4}}, "has a configuration without names"),
        ({"progress": {"step": torch.ones(2)}}, "has a progress of"),
        ({"progress": {"step": float("nan")}}, "has a progress of"),
        ({"progress": {"best": torch.ones(2)}}, "has a progress of"),
    ],
)
def test_load_training_refuses_parts_of_other_types(tmp_path, changes, message):
    checkpoints.save(tmp_path / "last.pt", EMPTY_STATE | changes)
    with pytest.raises(UserError, match=message):
        checkpoints.load_training(tmp_path / "last.pt")


@pytest.mark.parametrize("change", [{"optimizer": {}}, {"rng": {"torch": 3}}, {"model": {"a": 1}}])
def test_train_refuses_damaged_parts(resumable, change):
    last = Path("checkpoints/whole/last.pt")
    checkpoints.save(last, checkpoints.load(last) | change)
    with pytest.raises(UserError, match=r"last\.pt does not fit this model, or is .*. Use another"):
        resumable(MAX_STEPS=5)


@pytest.mark.parametrize(
    ("stored", "best"), [(None, None), (-2.5, -2.5), (float("nan"), None), (float("inf"), None)]
)
def test_load_training_takes_a_finite_best_loss_only(tmp_path, stored, best):
    checkpoints.save(tmp_path / "last.pt", EMPTY_STATE | {"progress": {"best": stored}})
    progress = checkpoints.load_training(tmp_path / "last.pt").state["progress"]
    assert progress == {"best": best}


def test_remove_leftovers_spares_those_of_live_processes(tmp_path):
    live, dead = f".a.png.{os.getppid()}.tmp", ".a.png.999999999.tmp"
    own = f".b.png.{os.getpid()}.tmp"  # an earlier process had our number
    for name in (live, dead, own, "a.tmp", ".lock"):
        (tmp_path / name).touch()
    checkpoints.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {live, "a.tmp", ".lock"}


def test_resolve_checkpoint_takes_the_file_of_a_run_with_most_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = {"last.pt": 5, "best.pt": 5, "final.pt": 4, "step_0000007.pt": 7}
    for name, step in steps.items():
        checkpoints.save(Path("checkpoints/a", name), {"progress": {"step": step}})
    for name, file in (("a", "step_0000007.pt"), ("checkpoints/a/best.pt", "best.pt")):
        assert checkpoints.resolve_checkpoint(name) == Path("checkpoints/a", file)
    assert checkpoints.resolve_checkpoint(None) == checkpoints.newest_checkpoint()
    Path("checkpoints/a/step_0000007.pt").unlink()
    assert checkpoints.resolve_checkpoint("a").name == "last.pt"


@pytest.mark.parametrize("reference", ["newest", "whole", "checkpoints/whole"])
def test_resolve_checkpoint_finds_what_a_run_saved_before_its_first_last(resumable, reference):
    folder = Path("checkpoints/whole")
    for file in ("last.pt", "final.pt"):
        (folder / file).unlink()
    assert run_names.resume_hint("whole") == "Resume with --resume whole"
    assert checkpoints.resolve_checkpoint(reference) == folder / "best.pt"
    (folder / "last.pt").write_text("damaged")
    assert checkpoints.resolve_checkpoint(reference) == folder / "best.pt"


def test_run_name_of_a_file_must_be_a_folder_below_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("../mine", "/mine", ""):
        checkpoint = checkpoints.TrainingCheckpoint(
            Path("checkpoints/ddpm_final.pt"), {"run": name}
        )
        with pytest.raises(UserError, match="which is no name of a run"):
            checkpoints.run_name_of(checkpoint)


def test_all_ranks_take_the_checkpoint_that_rank_0_finds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = torch.distributed.HashStore()
    monkeypatch.setattr("engine.distributed._launcher_store", lambda: store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        checkpoints.save(Path("checkpoints", rank, "last.pt"), {})
        resumed = parse_command_line("", {}, ["--resume"]).resume
        tuned = parse_command_line("", {}, [], {}).init_from
        assert resumed == tuned == Path("checkpoints/0/last.pt")


@pytest.mark.parametrize(
    ("path", "name"),
    [("run/last.pt", "run-last"), ("a/run/last.pt", "a-run-last"), ("ddpm_final.pt", "ddpm_final")],
)
def test_display_name_has_all_folders_of_a_run(tmp_path, monkeypatch, path, name):
    monkeypatch.chdir(tmp_path)
    assert checkpoints.display_name(Path("checkpoints", path)) == name
    assert checkpoints.display_name(Path("elsewhere/run/last.pt")) == "run-last"
