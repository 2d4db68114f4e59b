"""Settings: declaration, inheritance, checks."""

import pytest

from engine.errors import RenamedWarning, UserError
from engine.settings import Setting, Settings, suggest


class Base(Settings):
    WIDTH = Setting(8, "width", min=2, max=64)
    NAME = Setting("a", "name", choices=("a", "b"), old_name="TITLE")
    WEIGHT = Setting(None, "weight", min=0, type_=float, auto="the model's own")


class Derived(Base):
    WIDTH = 16


def test_setting_reads_as_its_default_on_class_and_instance():
    assert (Base.WIDTH, Base.NAME, Base.WEIGHT) == (8, "a", None)
    assert Base(NAME="b").as_dict() == {"WIDTH": 8, "NAME": "b", "WEIGHT": None}


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
    assert suggest("xyz", ["steps", "seeds"]) == ""
