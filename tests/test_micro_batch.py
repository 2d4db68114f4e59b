"""The search for a micro-batch: real steps, halves on OOM, remembered by card and configuration."""

import gc
import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

import train_stl10_optimized
from config import Config, detect_tier, resolve
from ddpm_model import DDPMModel
from engine import gpu_memory, micro_batch
from engine.errors import FallbackWarning, OutOfMemoryWarning, UserError
from engine.micro_batch import find_micro_batch, probe_micro_batch
from tests.helpers import CPU_TIER, needs_gpu

TINY = {
    "DIM": 8, "DIM_MULTS": (1, 1), "ATTENTION_HEADS": (1,), "ATTENTION_DIM": (8,), "IMAGE_SIZE": 8,
    "BATCH_SIZE": 4, "GRID_IMAGES": 2, "SAMPLING_TIMESTEPS": 2, "DROPOUT": 0.1,
}  # fmt: skip


def tiny_config(**changes) -> Config:
    return resolve("folder", CPU_TIER, flags=TINY | changes)


class Hungry(DDPMModel):
    """Fits into memory up to 5 images at a time."""

    def forward(self, images, t, noise):
        if len(images) > 5:
            raise torch.OutOfMemoryError
        return super().forward(images, t, noise)


@pytest.mark.parametrize(
    ("batch", "accumulation", "expected"),
    [(8, 2, 4), (16, 1, 4), (12, 1, 3), (5, 1, 5), (14, 1, 2)],
)
def test_probe_halves_the_effective_batch_until_it_fits(
    batch, accumulation, expected, recwarn, monkeypatch
):
    rehearse = Mock(wraps=micro_batch.rehearse)
    monkeypatch.setattr(micro_batch, "rehearse", rehearse)
    config = tiny_config(BATCH_SIZE=batch, GRADIENT_ACCUMULATION=accumulation)
    assert probe_micro_batch(Hungry.from_config(config), config, 1.0)[0] == expected
    assert (config.BATCH_SIZE, config.GRADIENT_ACCUMULATION) == (batch, accumulation)
    assert rehearse.call_args.args[1].BATCH_SIZE == expected  # whose peak is reported
    assert not [w for w in recwarn.list if w.category is OutOfMemoryWarning]


def test_probe_says_if_nothing_fits():
    class Starving(DDPMModel):
        def forward(self, images, t, noise):
            raise torch.OutOfMemoryError

    config = tiny_config()
    advice = "not even one image fits. Lower --dim or --image_size, or use --use_amp, or use --grad"
    with pytest.raises(UserError, match=advice):
        probe_micro_batch(Starving.from_config(config), config, 1.0)


class Cramped(DDPMModel):
    """Trains on up to 8 images at a time, which leave no memory for sampling from 4 up."""

    trained = 0

    def forward(self, images, t, noise):
        if len(images) > 8:
            raise torch.OutOfMemoryError
        type(self).trained = len(images)
        return super().forward(images, t, noise)

    def sample(self, *args, **kwargs):
        if type(self).trained >= 4:
            raise torch.OutOfMemoryError
        return super().sample(*args, **kwargs)


def test_probe_leaves_memory_for_sampling(recwarn):
    config = tiny_config(BATCH_SIZE=16, GRID_IMAGES=1)
    assert probe_micro_batch(Cramped.from_config(config), config, 1.0)[0] == 2


class Hoarder(DDPMModel):
    """Trains on up to 8 images at a time, or 4 once it has sampled, which leaves something."""

    limit = 8

    def forward(self, images, t, noise):
        if self.training and len(images) > self.limit:
            raise torch.OutOfMemoryError
        return super().forward(images, t, noise)

    def sample(self, *args, **kwargs):
        type(self).limit = 4
        return super().sample(*args, **kwargs)


def test_probe_leaves_memory_for_training_after_sampling():
    config = tiny_config(BATCH_SIZE=8)
    assert probe_micro_batch(Hoarder.from_config(config), config, 1.0)[0] == 4


def test_probe_samples_a_process_of_two_timesteps():
    config = tiny_config(TIMESTEPS=2)
    assert probe_micro_batch(DDPMModel.from_config(config), config, 1.0)[0] == 4


def test_probe_trains_a_model_that_needs_labels():
    class Labeled(DDPMModel):
        def forward(self, images, t, noise, labels):
            return super().forward(images, t, noise, labels)

    config = tiny_config()
    model = Labeled.from_config(config, {"a": 1, "b": 1})
    assert probe_micro_batch(model, config, 1.0)[0] == 4


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_rehearsal_samples_with_a_guide_if_the_run_will_have_one(fraction):
    has_guide = []

    class Recorded(DDPMModel):
        def sample(self, *args, **kwargs):
            has_guide.append(self.guide is not None)
            return super().sample(*args, **kwargs)

    config = tiny_config(GUIDE_FRACTION=fraction)
    assert micro_batch.rehearse(Recorded.from_config(config), config, 4) == (4, True)
    assert has_guide == [fraction > 0]


@pytest.fixture
def search(tmp_path, monkeypatch):
    """search(**changes) returns the micro-batch and the limits probed, on a fake GPU."""
    state = {"card": "Card A", "free": 10.4, "limits": []}
    monkeypatch.setattr(gpu_memory, "_memory_cap", None)
    monkeypatch.setattr(micro_batch, "fits_on_gpu", lambda images: True)
    monkeypatch.setattr(gpu_memory, "memory_limit", lambda: 24 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (state["free"] * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: state["card"])

    def probe(model, config, limit_gib):
        state["limits"].append(limit_gib)
        return 2, 1.0

    monkeypatch.setattr(micro_batch, "probe_micro_batch", probe)
    images = np.zeros(2**30, np.uint8)
    state["file"] = tmp_path / "cache" / "memory.json"

    linear = nn.Linear(2, 2)

    def call(model: nn.Module = linear, **changes) -> tuple[int, list[float]]:
        state["limits"] = []
        found = find_micro_batch(model, tiny_config(**changes), images, state["file"])
        return found, state["limits"]

    call.state = state
    return call


def test_search_says_if_other_processes_hold_all_memory(search):
    search.state["free"] = 0.9
    with pytest.raises(UserError, match=r"less than 0\.5 GiB of GPU memory is left"):
        search()
    assert not search.state["limits"]


def test_search_leaves_room_for_the_images_and_some_headroom(search):
    # 10.4 GiB are free, 1 of them for the images; to the half below, 5 % less.
    assert search() == (2, [pytest.approx(9.0 * 0.95)])


@pytest.mark.parametrize(
    "changes",
    [
        {"GUIDE_FRACTION": 0.0}, {"IMAGE_SIZE": 16}, {"DIM": 16}, {"DIM_MULTS": (1, 2)},
        {"ATTENTION_HEADS": (2,)}, {"ATTENTION_DIM": (16,)}, {"FULL_ATTENTION_MAX_SIZE": 8},
        {"DROPOUT": 0.0}, {"USE_AMP": True}, {"OPTIMIZER": "adam"}, {"COMPILE_MODEL": True},
        {"CUDA_GRAPH": True}, {"GRADIENT_CHECKPOINTING": True}, {"GRID_IMAGES": 3},
        {"BATCH_SIZE": 8}, {"BATCH_SIZE": 4, "GRADIENT_ACCUMULATION": 2},
        {"model": nn.Linear(2, 3)}, {"model": nn.Conv1d(2, 2, 1)},
    ],
    ids=lambda changes: "-".join(changes),
)  # fmt: skip
def test_search_runs_again_for_any_setting_that_takes_memory(changes, search):
    assert len(search()[1]) == 1 and len(search()[1]) == 0
    assert len(search(**changes)[1]) == 1 and len(search(**changes)[1]) == 0
    assert len(search()[1]) == 0


def test_search_is_remembered_for_settings_that_take_no_memory(search):
    assert len(search()[1]) == 1
    assert len(search(SEED=5, LEARNING_RATE=0.25, RUN_NAME="other", MAX_STEPS=9)[1]) == 0
    assert len(search(GUIDE_FRACTION=0.75)[1]) == 0  # a guide takes memory whenever it is saved
    assert len(search(BATCH_SIZE=2, GRADIENT_ACCUMULATION=2)[1]) == 0  # the same effective batch


def test_search_runs_again_on_another_card_or_with_less_memory(search):
    search()
    search.state["card"] = "Card B"
    assert len(search()[1]) == 1
    search.state["free"] = 5.4
    assert search()[1] == [pytest.approx(4.0 * 0.95)]
    assert len(json.loads(search.state["file"].read_text())) == 3


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", '{"a": 1}', '{"a": {"micro_batch": 0, "peak_gib": 1}}',
                '{"a": {"micro_batch": 2, "peak_gib": "x"}}', "\udcff"],
)  # fmt: skip
def test_damaged_results_are_searched_again(search, content):
    search()
    search.state["file"].write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.warns(FallbackWarning, match=r"reading .*memory\.json failed"):
        assert len(search()[1]) == 1
    assert not search()[1]


@pytest.mark.gpu
@needs_gpu
def test_found_micro_batch_trains_within_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_memory, "_memory_cap", None)
    gc.collect()  # captured graphs of earlier tests, which the cap would count
    torch.cuda.empty_cache()
    gpu_memory.cap_memory(6.0)
    try:
        flags = {"MAX_MEMORY_GIB": 6.0}
        config = resolve("stl10", detect_tier(), train_stl10_optimized.DEFAULTS, flags=flags)
        images = np.zeros((1000, 3, 96, 96), np.uint8)
        file = tmp_path / "memory.json"
        model = DDPMModel.from_config(config)
        micro = find_micro_batch(model, config, images, file)
        assert 1 <= micro <= 64 and 64 % micro == 0
        assert find_micro_batch(model, config, images, file) == micro
        config.split_batch(micro)
        again, peak = probe_micro_batch(model, config, 6.0)
        assert again >= micro and peak <= 6
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
