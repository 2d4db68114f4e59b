"""Configuration: which source wins, which tier is picked, and that every flag arrives."""

import pytest

import config
from config import DDPMConfig, Tier, from_command_line, resolve, tier_of
from engine.errors import UserError

LARGE = Tier("Large", 256, 80.0)
CPU = Tier("CPU", 32, 0.0)
SETTINGS = DDPMConfig.settings()


class Mine(DDPMConfig):
    DIM = 48
    BATCH_SIZE = 20


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(config, "detect_tier", lambda: CPU)


@pytest.mark.parametrize(
    ("memory", "name", "dim"),
    [(2, "Tiny", 32), (3.9, "Small", 64), (6, "Small", 64), (7.8, "Medium", 128), (15.7, "Medium", 128),
     (23.6, "Large", 256), (79.2, "Large", 256)],
)  # fmt: skip
def test_tier_follows_the_memory(memory, name, dim):
    assert (tier_of(memory).name, tier_of(memory).dim) == (name, dim)


def test_later_sources_win_and_are_named():
    made = resolve("cifar10", LARGE, {"USE_AMP": True, "DIM": 8}, Mine, {"BATCH_SIZE": 7})
    assert (made.USE_AMP, made.origin["USE_AMP"]) == (True, "script")
    assert (made.IMAGE_SIZE, made.origin["IMAGE_SIZE"]) == (32, "preset cifar10")
    assert (made.DIM, made.origin["DIM"]) == (48, "Mine")
    assert (made.BATCH_SIZE, made.origin["BATCH_SIZE"]) == (7, "flag")
    assert (made.TIMESTEPS, made.origin["TIMESTEPS"]) == (1000, "default")


@pytest.mark.parametrize("dataset", ["cifar10", "celeba", "stl10", "shapes"])
@pytest.mark.parametrize("memory", [3, 6, 12, 24, 80])
def test_a_tier_caps_the_width_and_keeps_the_effective_batch(dataset, memory):
    tier, roomy = tier_of(memory), resolve(dataset, Tier("Large", 256, 1000.0))
    made = resolve(dataset, tier)
    assert min(roomy.DIM, tier.dim) == made.DIM
    assert made.BATCH_SIZE * made.GRADIENT_ACCUMULATION == roomy.BATCH_SIZE


@pytest.mark.parametrize(
    ("dataset", "size", "dim", "levels"),
    [("cifar10", 32, 128, (1, 2, 2, 2)), ("celeba", 64, 128, (1, 2, 2, 2)), ("stl10", 96, 128, (1, 2, 2, 2))],
)
def test_each_data_set_has_its_preset(dataset, size, dim, levels):
    made = resolve(dataset, LARGE)
    assert (size, dim, levels) == (made.IMAGE_SIZE, made.DIM, made.DIM_MULTS)


def test_a_folder_gets_the_preset_for_its_size_as_far_as_the_tier_allows():
    assert (resolve("folder", tier_of(6)).DIM, resolve("folder", LARGE).DIM) == (64, 128)
    assert resolve("folder", LARGE, flags={"IMAGE_SIZE": 4, "DIM_MULTS": (1, 2)}).DIM == 256  # too small for any


def test_naming_the_batch_means_that_batch():
    small = tier_of(3)
    assert resolve("cifar10", small).GRADIENT_ACCUMULATION > 1
    assert resolve("cifar10", small, flags={"BATCH_SIZE": 16}).GRADIENT_ACCUMULATION == 1


def test_other_levels_than_the_presets_drop_the_presets_attention():
    assert (resolve("shapes", CPU).ATTENTION_HEADS, resolve("shapes", CPU).FULL_ATTENTION_SIZE) == ((1, 1, 4), 0)
    made = resolve("shapes", CPU, flags={"DIM_MULTS": (1, 2)})
    assert (made.ATTENTION_HEADS, made.ATTENTION_DIM) == ((4,), (32,))
    with pytest.raises(UserError, match="ATTENTION_HEADS has 3 numbers, but must have 1 or 2"):
        resolve("shapes", CPU, flags={"DIM_MULTS": (1, 2), "ATTENTION_HEADS": (1, 2, 3)})


def test_the_last_length_given_counts():
    assert resolve("shapes", CPU).MINUTES > 0
    made = resolve("shapes", CPU, flags={"MAX_STEPS": 30})
    assert (made.MAX_STEPS, made.MINUTES, made.EPOCHS) == (30, 0, 0)
    with pytest.raises(UserError, match="MAX_STEPS and MINUTES are set together"):
        resolve("shapes", CPU, flags={"MAX_STEPS": 30, "MINUTES": 1.0})


@pytest.mark.parametrize("name", SETTINGS)
def test_every_attribute_is_a_flag(name):
    kind, setting = SETTINGS[name]
    default = getattr(DDPMConfig, name)
    if setting.choices:
        value = setting.choices[-2]
    elif kind is bool:
        value = not default
    else:
        value = {int: lambda: (default or 1) * 2, float: lambda: (default or 0.5) / 2}.get(kind, lambda: kind("13"))()
        value = (1, 2, 3, 5) if kind is tuple else value
    text = [f"--{name.lower()}", ",".join(map(str, value)) if kind is tuple else str(value)]
    if kind is bool:
        text = [f"--{'' if value else 'no-'}{name.lower()}"]
    dataset = [] if name == "DATASET" else ["--dataset", "folder"]
    made, _ = from_command_line("", {}, [*dataset, *text])
    assert getattr(made, name) == value
    assert made.origin[name] == "flag"


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        from_command_line("", {"LEARNING_RATE": 0.125}, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in SETTINGS:
        assert f"--{name.lower()}" in shown
    assert "(default: 0.125)" in shown and "(default: 1,2,4,8)" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batchsize", "3"], "no --batchsize; did you mean --batch_size"),
        (["--dim", "wide"], "--dim: invalid int value: 'wide'"),
        (["--dim", "4"], "DIM is 4, but must be at least 8"),
        (["--dropout", "1.5"], "DROPOUT is 1.5, but must be at most 0.9"),
        (["--learning_rate", "nan"], "LEARNING_RATE is nan, but must be at least"),
        (["--dim_mults", "1,-2"], "DIM_MULTS is"),
        (["--objective", "pred_vv"], "OBJECTIVE is 'pred_vv'; did you mean pred_v"),
        (["--dataset", "cifar"], "did you mean cifar10"),
        (["--image_size", "30"], "need a multiple of"),
        (["--timesteps", "10"], "SAMPLING_TIMESTEPS is 14, but must be at most TIMESTEPS, 10"),
        (["--timesteps", "19", "--sampling_timesteps", "5", "--beta_schedule", "linear"], "needs at least 20"),
        (["--dim", "9"], "DIM is 9, but must be even"),
        (["--dim_mults", "1,x"], "--dim_mults: '1,x' are no whole numbers such as 1,2,4,8"),
        (["--image_size", "16", "--schedule_size", "257"], "SCHEDULE_SIZE is 257, but must be at most 16 times"),
        (["--minutes", "0"], "set one of them"),
        (["--config", "nowhere.py:Mine"], "nowhere.py, which does not exist"),
        (["--config", "Mine"], "must look like my_config.py:MyConfig"),
        (["--config", "mine.py:Yours"], "has no subclass of DDPMConfig named Yours; did you mean Ours"),
        (["--config", "typo.py:Typo"], "LEARNING_RAT, which does not exist; did you mean LEARNING_RATE"),
        (["--config", "typo.py:Kind"], "DIM is '64', but must be a whole number"),
        (["--config", "syntax.py:Mine"], "cannot be loaded: SyntaxError"),
        (["--resume", "no-such-run"], "neither such a file nor a run"),
        (["--resume", ""], "--resume is given an empty name"),
        (["--resume", "a", "--run_name", "b"], "--run_name is for a new run"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from config import DDPMConfig\nclass Ours(DDPMConfig):\n    DIM = 16\n")
    (tmp_path / "typo.py").write_text(
        "from config import DDPMConfig\nclass Typo(DDPMConfig):\n    LEARNING_RAT = 1\n"
        "class Kind(DDPMConfig):\n    DIM = '64'\n"
    )
    (tmp_path / "syntax.py").write_text("class Mine(\n")
    extra = [] if "--dataset" in arguments else ["--dataset", "shapes"]
    with pytest.raises(UserError) as caught:
        from_command_line("", {}, [*extra, *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_subclass_from_a_file_and_a_flag_over_it(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from config import DDPMConfig\nclass Base(DDPMConfig):\n    DIM = 16\nclass Ours(Base):\n    EPOCHS = 3\n"
    )
    made, options = from_command_line("", {}, ["--dataset", "shapes", "--config", f"{file}:Ours", "--epochs", "4"])
    assert (made.DIM, made.origin["DIM"]) == (16, "Ours")
    assert (made.EPOCHS, made.MINUTES) == (4, 0)
    assert not options.dry_run and options.resume is None
