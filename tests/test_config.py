"""config.py: which layer wins, which tier is chosen, and what a resumed run keeps."""

import numpy as np
import pytest
import torch

import train_optimized
import train_stl10_optimized
import train_true_high_res
from config import DDPMConfig, Tier, resolve, tier_for_memory
from ddpm_model import DDPMModel
from engine.errors import FallbackWarning, RenamedWarning, UserError
from tests.helpers import CPU_TIER, LARGE_TIER, configure

pytestmark = pytest.mark.usefixtures("on_a_cpu")
SWITCHES = ("USE_AMP", "COMPILE_MODEL", "CUDA_GRAPH", "AUTO_MICRO_BATCH")


class Mine(DDPMConfig):
    DIM = 48
    BATCH_SIZE = 20


class MyBatch(DDPMConfig):
    BATCH_SIZE = 20


class MyAccumulation(DDPMConfig):
    GRADIENT_ACCUMULATION = 2


class MyWidth(DDPMConfig):
    DIM = 48


# Tiers and presets..


@pytest.mark.parametrize(
    ("memory", "name", "dim"),
    [(2, "Tiny", 32), (3.9, "Small", 64), (6, "Small", 64), (7.8, "Medium", 128),
     (15.7, "Medium", 128), (23.6, "Large", 256), (79.2, "Large", 256)],
)  # fmt: skip
def test_tier_follows_the_memory(memory, name, dim):
    assert tier_for_memory(memory) == (name, dim, memory)


@pytest.mark.parametrize("dataset", ["cifar10", "celeba", "stl10", "shapes", "folder"])
@pytest.mark.parametrize("memory", [3, 6, 12, 24, 80])
def test_tier_caps_the_width_and_keeps_the_effective_batch(dataset, memory):
    tier = tier_for_memory(memory)
    unlimited = resolve(dataset, Tier("Large", 256, 1000.0))
    config = resolve(dataset, tier)
    expected = min(unlimited.DIM, tier.dim)
    assert config.DIM == expected
    assert config.BATCH_SIZE * config.GRADIENT_ACCUMULATION == unlimited.BATCH_SIZE


@pytest.mark.parametrize(
    ("dataset", "flags", "expected"),
    [
        ("celeba", {}, (64, 128, (1, 2, 2, 2), 128, (False, False, True, True))),
        ("stl10", {}, (96, 128, (1, 2, 2, 2), 64, (False, False, True, True))),
        ("folder", {"IMAGE_SIZE": 128},
         (128, 128, (1, 1, 2, 2, 2), 64, (False, False, False, True, True))),
        ("cifar10", {"IMAGE_SIZE": 64}, (64, 128, (1, 2, 2, 2), 128, (False, False, True, True))),
        ("folder", {"IMAGE_SIZE": np.int64(64)},
         (64, 128, (1, 2, 2, 2), 128, (False, False, True, True))),
        ("cifar10", {}, (32, 128, (1, 2, 2, 2), 256, (False, True, True, True))),
    ],
)  # fmt: skip
def test_preset_follows_the_image_size(dataset, flags, expected):
    config = resolve(dataset, LARGE_TIER, flags=flags)
    with torch.device("meta"):
        model = DDPMModel.from_config(config)
    effective = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
    full = tuple(model.architecture["full_attn"])
    assert (config.IMAGE_SIZE, config.DIM, config.DIM_MULTS, effective, full) == expected
    assert (config.SCHEDULE_BASE_SIZE > 0) == (config.IMAGE_SIZE > 32)
    assert (config.DROPOUT > 0) == (config.GUIDE_FRACTION == 0.5) == (config.IMAGE_SIZE > 32)


def test_defaults_are_what_a_run_gets():
    config = resolve("folder", LARGE_TIER)
    changed = {k: v for k, v in config.as_dict().items() if v != getattr(DDPMConfig, k)}
    assert changed == {"DATASET": "folder"}
    with torch.device("meta"):
        assert DDPMModel().architecture == DDPMModel.from_config(config).architecture


def test_classes_are_on_where_they_measured_better():
    names = ("cifar10", "shapes", "celeba", "stl10", "folder")
    is_on = {name: resolve(name, LARGE_TIER).CLASS_CONDITIONAL for name in names}
    assert is_on == dict.fromkeys(names, False) | {"cifar10": True}
    assert resolve("shapes", CPU_TIER).CLASS_CONDITIONAL
    assert not resolve("cifar10", LARGE_TIER, flags={"CLASS_CONDITIONAL": False}).CLASS_CONDITIONAL


@pytest.mark.parametrize(
    ("dataset", "flags", "mode", "weight"),
    [
        ("folder", {}, "autoguidance", 2.25),
        ("folder", {"CLASS_CONDITIONAL": True}, "autoguidance", 2.25),
        ("celeba", {}, "autoguidance", 3.0),
        ("stl10", {"CLASS_CONDITIONAL": True}, "both", 2.5),
        ("cifar10", {"IMAGE_SIZE": 64}, "both", 2.5),
        ("cifar10", {"IMAGE_SIZE": 64, "CLASS_CONDITIONAL": False}, "autoguidance", 3.0),
        ("cifar10", {"IMAGE_SIZE": 64, "GUIDANCE_MODE": "cfg"}, "cfg", 2.5),
    ],
)
def test_preset_guides_large_images_with_classes_by_both(dataset, flags, mode, weight):
    config = resolve(dataset, LARGE_TIER, flags=flags)
    assert (config.GUIDANCE_MODE, config.GUIDANCE) == (mode, weight)


def test_presets_have_the_optimization_and_guidance_they_were_measured_with():
    def measured(dataset: str, tier: Tier, **flags) -> tuple[tuple[float, ...], ...]:
        config = resolve(dataset, tier, flags=flags)
        interval = config.GUIDANCE_MIN_SIGMA, config.GUIDANCE_MAX_SIGMA
        training = config.LEARNING_RATE, config.WEIGHT_DECAY, config.P_MEAN
        return training, (config.GUIDANCE, *interval, config.SAMPLING_TIMESTEPS)

    small = (1e-3, 0.3, -0.8), (2.25, 0.1, 2.0, 16)
    assert measured("cifar10", LARGE_TIER) == measured("folder", LARGE_TIER) == small
    for size, learning_rate in ((64, 2e-3), (96, 1e-3), (128, 1e-3)):
        large = (learning_rate, 0.1, -1.2), (3.0, 0.2, 5.0, 14)
        assert measured("folder", LARGE_TIER, IMAGE_SIZE=size) == large
    without_gpu = (5e-3, 0.1, -1.2), (1.5, 0.2, 5.0, 14)
    for dataset, size in (("shapes", 16), ("folder", 32), ("celeba", 64)):
        assert measured(dataset, CPU_TIER, IMAGE_SIZE=size) == without_gpu


def test_preset_without_a_gpu_makes_small_steps_of_any_size():
    for size, heads in ((32, (1, 1, 4, 4)), (64, (1, 1, 4, 4)), (128, (4,))):  # 5 levels have one
        config = resolve("folder", CPU_TIER, flags={"IMAGE_SIZE": size})
        assert (config.BATCH_SIZE, config.WARMUP_STEPS, config.DROPOUT) == (32, 100, 0)
        assert config.ATTENTION_HEADS == heads and config.FULL_ATTENTION_MAX_SIZE == 0
    assert resolve("folder", CPU_TIER, flags={"BATCH_SIZE": 64}).BATCH_SIZE == 64


def test_high_res_script_takes_the_larger_of_its_size_and_the_data_sets():
    script = train_true_high_res.DEFAULTS
    names = ("cifar10", "shapes", "celeba", "stl10", "folder")
    sizes = [resolve(name, LARGE_TIER, script).IMAGE_SIZE for name in names]
    assert sizes == [64, 64, 64, 96, 64]
    explicit = resolve("cifar10", LARGE_TIER, script, flags={"IMAGE_SIZE": 32})
    assert explicit.DIM_MULTS == (1, 2, 2, 2)
    at_96 = resolve("celeba", LARGE_TIER, train_stl10_optimized.DEFAULTS)
    assert (at_96.IMAGE_SIZE, at_96.LEARNING_RATE) == (96, 1e-3)
    on_cpu = resolve("shapes", CPU_TIER, script)
    assert (on_cpu.IMAGE_SIZE, on_cpu.DIM_MULTS) == (64, (1, 2, 2))


@pytest.mark.parametrize("script", [train_optimized, train_stl10_optimized, train_true_high_res])
def test_cpu_turns_every_switch_off_unless_explicit(script):
    all_on = script.DEFAULTS | dict.fromkeys(SWITCHES, True)
    for defaults in (script.DEFAULTS, all_on):
        config = resolve("shapes", CPU_TIER, defaults)
        assert not any(getattr(config, name) for name in SWITCHES)
    assert all(config.set_by[name] == "tier CPU" for name in SWITCHES)
    for name in SWITCHES:
        explicit = resolve("shapes", CPU_TIER, all_on, flags={name: True})
        assert [other for other in SWITCHES if getattr(explicit, other)] == [name]
    config = resolve("shapes", LARGE_TIER, all_on)
    assert all(getattr(config, name) for name in SWITCHES)


# Layers..


def test_later_layers_win_and_are_named():
    config = resolve("cifar10", LARGE_TIER, {"USE_AMP": True, "DIM": 8}, Mine, {"BATCH_SIZE": 7})
    assert (config.USE_AMP, config.set_by["USE_AMP"]) == (True, "script")
    assert (config.IMAGE_SIZE, config.set_by["IMAGE_SIZE"]) == (32, "preset cifar10")
    assert (config.DIM, config.set_by["DIM"]) == (48, "Mine")
    assert (config.BATCH_SIZE, config.set_by["BATCH_SIZE"]) == (7, "flag")
    assert (config.TIMESTEPS, config.set_by["TIMESTEPS"]) == (1000, "default")
    assert (config.DATASET, config.set_by["DATASET"]) == ("cifar10", "data")


@pytest.mark.parametrize(
    ("subclass", "flags", "expected"),
    [
        (MyBatch, {}, (20, 1)),
        (MyBatch, {"GRADIENT_ACCUMULATION": 3}, (20, 3)),
        (MyAccumulation, {"BATCH_SIZE": 16}, (16, 2)),
        (None, {"BATCH_SIZE": 16}, (16, 1)),
    ],
)
def test_explicit_batch_and_accumulation_stay(subclass, flags, expected):
    small = Tier("Small", 64, 3.0)
    assert resolve("stl10", small).GRADIENT_ACCUMULATION > 1  # it splits the preset's batch
    config = resolve("stl10", small, {"GRADIENT_ACCUMULATION": 5}, subclass, flags)
    assert (config.BATCH_SIZE, config.GRADIENT_ACCUMULATION) == expected


@pytest.mark.parametrize("memory", [6, 12, 80])
def test_explicit_accumulation_means_the_same_effective_batch_on_every_card(memory, recwarn):
    config = resolve("celeba", tier_for_memory(memory), flags={"GRADIENT_ACCUMULATION": 4})
    assert config.BATCH_SIZE * config.GRADIENT_ACCUMULATION == 4 * 128
    warned = [str(w.message) for w in recwarn if w.category is FallbackWarning]
    if config.BATCH_SIZE == 128:
        assert not warned
    else:
        (line,) = warned
        assert f"{config.GRADIENT_ACCUMULATION} x {config.BATCH_SIZE} instead of 4 x 128" in line


@pytest.mark.parametrize(
    ("subclass", "flags", "is_searched"),
    [
        (None, {}, True),
        (None, {"DIM": 32}, True),
        (MyWidth, {}, True),
        (None, {"BATCH_SIZE": 16}, False),
        (None, {"GRADIENT_ACCUMULATION": 2}, False),
        (MyBatch, {}, False),
        (MyAccumulation, {}, False),
        (None, {"BATCH_SIZE": 16, "AUTO_MICRO_BATCH": True}, True),
        (MyAccumulation, {"AUTO_MICRO_BATCH": True}, True),
    ],
)
def test_explicit_batch_or_accumulation_stops_the_search(subclass, flags, is_searched):
    config = resolve("stl10", LARGE_TIER, {"AUTO_MICRO_BATCH": True}, subclass, flags)
    assert config.AUTO_MICRO_BATCH is is_searched
    assert (config.set_by["AUTO_MICRO_BATCH"] == "explicit batch") is not is_searched


def test_split_batch_keeps_the_effective_batch():
    config = resolve("stl10", tier_for_memory(24), train_stl10_optimized.DEFAULTS)
    config.split_batch(16)
    assert (config.BATCH_SIZE, config.GRADIENT_ACCUMULATION) == (16, 4)
    assert config.set_by["BATCH_SIZE"] == "memory search"


def test_other_levels_drop_the_presets_attention():
    config = resolve("shapes", CPU_TIER)
    assert (config.ATTENTION_HEADS, config.FULL_ATTENTION_MAX_SIZE) == ((1, 1, 4), 0)
    config = resolve("shapes", CPU_TIER, flags={"DIM_MULTS": (1, 2)})
    assert (config.ATTENTION_HEADS, config.ATTENTION_DIM) == ((4,), (32,))
    flags = {"DIM_MULTS": (1, 2), "ATTENTION_HEADS": (1, 2, 3)}
    with pytest.raises(UserError, match="ATTENTION_HEADS has 3 numbers, but must have 1 or 2"):
        resolve("shapes", CPU_TIER, flags=flags)


def test_last_run_length_counts():
    assert resolve("shapes", CPU_TIER).MINUTES > 0
    config = resolve("shapes", CPU_TIER, flags={"MAX_STEPS": 30})
    assert (config.MAX_STEPS, config.MINUTES, config.EPOCHS) == (30, 0, 0)
    with pytest.raises(UserError, match="set only one of MAX_STEPS, MINUTES"):
        resolve("shapes", CPU_TIER, flags={"MAX_STEPS": 30, "MINUTES": 1.0})


# Old names, and sizes that do not fit..


def test_old_names_warn_in_a_subclass_and_load_from_a_checkpoint():
    class Old(DDPMConfig):
        GUIDE_AT = 0.3

    with pytest.warns(RenamedWarning, match="GUIDE_AT is now GUIDE_FRACTION"):
        assert resolve("folder", LARGE_TIER, subclass=Old).GUIDE_FRACTION == 0.3
    stored = resolve("folder", LARGE_TIER).as_dict()
    stored["SAVE_MINUTES"] = stored.pop("SAVE_EVERY_MINUTES") + 1
    assert resolve("folder", LARGE_TIER, checkpoint=stored).SAVE_EVERY_MINUTES == 3.0


@pytest.mark.parametrize(
    ("size", "mults", "advice"),
    [(28, "1,2,2,2", "24 or 32, or --dim_mults 1,2,2"), (5, "1,2,2,2", "8, or --dim_mults 1"),
     (1022, "1,2,2", "1020 or 1024, or --dim_mults 1,2")],
)  # fmt: skip
def test_size_that_the_levels_cannot_halve_gets_advice_that_works(size, mults, advice):
    flags = ["--dataset", "folder", "--image_size", str(size), "--dim_mults"]
    with pytest.raises(UserError) as caught:
        configure(*flags, mults)
    assert str(caught.value).endswith(f". Use --image_size {advice}")
    configure(*flags, advice.split()[-1])
    configure(*flags, mults, "--image_size", advice.split(",")[0].split()[-1])


# Resuming..


def test_resume_of_an_earlier_version_has_the_defaults_of_its_time(saved_run):
    former = {
        "CHANNELS": 3, "WEIGHT_DECAY": 0, "GUIDANCE_MIN_SIGMA": 0.2, "GUIDANCE_MAX_SIGMA": 5,
        "P_MEAN": -1.2,
    }  # fmt: skip
    for name in former:
        del saved_run[name]
    resumed = resolve("folder", CPU_TIER, checkpoint=saved_run)
    assert {name: getattr(resumed, name) for name in former} == former
    assert resolve("folder", CPU_TIER, checkpoint=saved_run | {"CHANNELS": 1}).CHANNELS == 1


def test_resume_of_an_earlier_version_has_a_guidance_of_at_least_1(saved_run):
    assert resolve("shapes", CPU_TIER, checkpoint=saved_run | {"GUIDANCE": 0.0}).GUIDANCE == 1
    with pytest.raises(UserError, match="GUIDANCE is 0"):
        resolve("shapes", CPU_TIER, flags={"GUIDANCE": 0})
