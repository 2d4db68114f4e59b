"""Settings: declaration, inheritance, checks, flags."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from config import DDPMConfig
from engine.errors import RenamedWarning, UserError
from engine.settings import Setting, Settings, suggest
from tests.helpers import configure

pytestmark = pytest.mark.usefixtures("on_a_cpu")
SETTINGS = DDPMConfig.settings()


class Base(Settings):
    WIDTH = Setting(8, "width", min=2, max=64)
    NAME = Setting("a", "name", choices=("a", "b"), old_name="TITLE")
    WEIGHT = Setting(None, "weight", min=0, type_=float, auto="the model's own")


class Derived(Base):
    WIDTH = 16


def test_numbers_of_numpy_and_paths_are_accepted():
    config = DDPMConfig(LEARNING_RATE=np.float64(1e-3), DIM=np.int64(8), DIM_MULTS=np.array([1, 2]))
    assert (config.LEARNING_RATE, config.DIM, config.DIM_MULTS) == (1e-3, 8, (1, 2))
    assert DDPMConfig(DATA_DIR=Path("x")).DATA_DIR == "x"


def test_setting_reads_as_its_default_on_class_and_instance():
    assert (Base.WIDTH, Base.NAME, Base.WEIGHT) == (8, "a", None)
    assert Base(NAME="b").as_dict() == {"WIDTH": 8, "NAME": "b", "WEIGHT": None}


def test_instance_refuses_invalid_values_and_unknown_names():
    with pytest.raises(UserError, match="WIDTH is 1, but must be at least 2"):
        Base(WIDTH=1)
    with pytest.raises(UserError, match="Base sets WIDHT, which does not exist; did you mean W"):
        Base(WIDHT=9)

    class Wrong(Base):
        WIDTH = "wide"

    with pytest.raises(UserError, match="WIDTH is 'wide', but must be an integer"):
        Wrong()
    with pytest.raises(UserError, match="Lower sets width, which does not exist; did you mean W"):

        class Lower(Base):
            width = 9


def test_settings_are_inherited_and_overridden_by_plain_values():
    assert list(Derived.settings()) == ["WIDTH", "NAME", "WEIGHT"]
    assert Derived.values() == {"WIDTH": 16, "NAME": "a", "WEIGHT": None}
    assert Derived().WIDTH == 16


def test_check_converts_and_names_what_is_wrong():
    assert Base.check({"WEIGHT": 2}, "flag") == {"WEIGHT": 2.0}
    assert Base.check({"WEIGHT": None}, "flag") == {"WEIGHT": None}
    with pytest.raises(
        UserError, match="flag sets WIDHT, which does not exist; did you mean WIDTH"
    ):
        Base.check({"WIDHT": 3}, "flag")
    for name, value, message in (
        ("WIDTH", 1, "WIDTH is 1, but must be at least 2"),
        ("WIDTH", True, "WIDTH is True, but must be an integer"),
        ("WIDTH", None, "WIDTH is None, but must be an integer"),
        ("WEIGHT", float("nan"), "WEIGHT is nan, but must be at least 0"),
        ("WEIGHT", float("inf"), "WEIGHT is inf, but must be finite"),
        ("NAME", "c", "NAME is 'c'; choose from a, b"),
        ("NAME", "aa", r"NAME is 'aa'; choose from a, b; did you mean a\?$"),
        ("WEIGHT", 10**400, "WEIGHT is too large a number"),
    ):
        with pytest.raises(UserError, match=message):
            Base.check({name: value}, "flag")


def test_current_names_translate_old_ones():
    assert Base.current_names({"TITLE": "b", "WIDTH": 3}) == {"NAME": "b", "WIDTH": 3}
    with pytest.warns(RenamedWarning, match="TITLE is now NAME"):
        Base.current_names({"TITLE": "b"}, warn=True)


def test_suggest_names_the_closest_only_if_it_is_close():
    assert suggest("stpes", ["steps", "seeds"]) == "; did you mean steps?"
    assert suggest("dim", ["DIM", "SEED"]) == "; did you mean DIM?"
    assert suggest("xyz", ["steps", "seeds"]) == ""


# Flags.


def another_value(setting: Setting) -> Any:
    """A value of a setting that is allowed and not its default."""
    if setting.choices:
        return setting.choices[-2]
    if setting.value_type is int:
        return 2 * (setting.default or 1)
    if setting.value_type is float:
        return (setting.default or 1.0) / 2
    return {bool: not setting.default, str: "13", tuple: (1, 2, 3, 5)}[setting.value_type]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_a_flag(name):
    setting = SETTINGS[name]
    value = another_value(setting)
    text = ",".join(map(str, value)) if setting.value_type is tuple else str(value)
    arguments = [f"--{name.lower()}", text]
    if setting.value_type is bool:
        arguments = [f"--{'' if value else 'no-'}{name.lower()}"]
    dataset = [] if name == "DATASET" else ["--dataset", "folder"]
    dataset += ["--class_conditional"] if name == "GUIDANCE_MODE" else []
    config = configure(*dataset, *arguments)
    assert getattr(config, name) == value
    assert config.set_by[name] == "flag"


@pytest.mark.parametrize(
    ("old_flag", "value", "name", "expected"),
    [("--guide_at", "0.25", "GUIDE_FRACTION", 0.25), ("--memory_gib", "6", "MAX_MEMORY_GIB", 6.0),
     ("--no-fit_memory", "", "AUTO_MICRO_BATCH", False), ("--num_samples", "9", "GRID_IMAGES", 9)],
)  # fmt: skip
def test_old_flags_warn_and_work(old_flag, value, name, expected):
    with pytest.warns(RenamedWarning, match=f"{old_flag} is now --.*{name.lower()}"):
        config = configure("--dataset", "folder", old_flag, *filter(None, [value]))
    assert (getattr(config, name), config.set_by[name]) == (expected, "flag")


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_command_line("", {"LEARNING_RATE": 0.125}, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in SETTINGS:
        assert f"--{name.lower()}" in shown
    assert "(default: 0.125)" in shown and "(default: 1,2,2,2)" in shown
