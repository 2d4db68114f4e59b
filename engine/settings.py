"""Settings: options declared as class attributes, each with its default, help and bounds.

    class TrainSettings(Settings):
        DIM = Setting(128, "base channel width", min=8, max=1024)

`TrainSettings.DIM` is 128. A subclass overrides with plain values, `add_flags` makes a command-line
flag of each setting, and `check` validates values from any source.
"""

import argparse
import difflib
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import RenamedWarning, UserError

EXPECTED = {
    tuple: "integers like 1,2,4,8", int: "an integer", float: "a number", bool: "true or false",
    str: "text",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One option: default, help text, inclusive bounds and allowed values.

    type_: bool, int, float, str or tuple (of positive integers); that of the default unless given.
    With a default of None it must be given, and `auto` says in the help what an unset value means.
    alias: a second name of the flag. old_name: a former name, which works but warns.
    """

    default: Any
    help: str
    min: float | None = None
    max: float | None = None
    choices: tuple[str | int, ...] = ()
    alias: str = ""
    old_name: str = ""
    type_: type | None = None
    auto: str = ""

    def __get__(self, instance: object, owner: type) -> Any:
        """Reads as its default, both on the class and on instances that do not set it."""
        return self.default

    @property
    def value_type(self) -> type:
        """The Python type of its values."""
        return self.type_ or type(self.default)

    def check_type(self, name: str, value: Any) -> None:
        """Raises UserError if a value has another type."""
        if value is None and self.default is None:
            return
        value_type = self.value_type
        accepted = {tuple: (tuple, list), float: (int, float)}.get(value_type, (value_type,))
        is_valid = type(value) in accepted
        if is_valid and value_type is tuple:
            is_valid = len(value) > 0 and all(type(v) is int and v > 0 for v in value)
        if not is_valid:
            raise UserError(f"{name} is {value!r}, but must be {EXPECTED[value_type]}")

    def check(self, name: str, value: Any) -> Any:
        """Returns the value in its type; raises UserError if it is not allowed."""
        if hasattr(value, "tolist"):  # a number or array of NumPy or PyTorch
            value = value.tolist()
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        self.check_type(name, value)
        if value is None:
            return None
        try:
            value = self.value_type(value)
        except OverflowError as error:  # of an integer that is no float
            raise UserError(f"{name} is too large a number") from error

        # A choice with a colon, such as hf:NAME, stands for any name.
        choices = [str(choice) for choice in self.choices]
        prefixes = tuple(f"{c.partition(':')[0]}:" for c in choices if ":" in c)
        if choices and str(value) not in choices and not str(value).startswith(prefixes):
            closest = suggest(str(value), choices)
            raise UserError(f"{name} is {value!r}; choose from {', '.join(choices)}{closest}")
        for part in value if self.value_type is tuple else (value,):
            # Written as `not >=` so that NaN is rejected too.
            if self.min is not None and not part >= self.min:
                raise UserError(f"{name} is {value}, but must be at least {self.min}")
            if self.max is not None and not part <= self.max:
                raise UserError(f"{name} is {value}, but must be at most {self.max}")
        if self.value_type is float and not math.isfinite(value):
            raise UserError(f"{name} is {value}, but must be finite")
        return value


class Settings:
    """Base class of groups of settings. An instance holds a valid value of each.

    Raises UserError for a subclass that writes the name of a setting in lower case.
    """

    def __init_subclass__(cls) -> None:
        settings = cls.settings()
        for name, value in vars(cls).items():
            if name not in settings and name.upper() in settings:
                cls.check({name: value}, cls.__name__)  # refuses the name

    def __init__(self, **values: Any):
        defaults = {name: setting.default for name, setting in self.settings().items()}
        values = self.values() | values
        # Not defaults, which may mean something else.
        given = {k: v for k, v in values.items() if k not in defaults or v is not defaults[k]}
        checked = self.check(given, type(self).__name__)
        for name, value in (defaults | checked).items():
            setattr(self, name, value)

    def as_dict(self) -> dict[str, Any]:
        """Returns the value of each setting by name."""
        return {name: getattr(self, name) for name in self.settings()}

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """Returns the declared settings by name, in order of declaration."""
        found: dict[str, Setting] = {}
        for base in reversed(cls.__mro__):
            found |= {name: s for name, s in vars(base).items() if isinstance(s, Setting)}
        return found

    @classmethod
    def values(cls) -> dict[str, Any]:
        """Returns each setting's value: its default, or what a subclass overrides."""
        return {name: getattr(cls, name) for name in cls.settings()}

    @classmethod
    def current_names(cls, values: Mapping[str, Any], warn: bool = False) -> dict[str, Any]:
        """Returns values with the former names of settings replaced by today's."""
        renamed = {s.old_name: name for name, s in cls.settings().items() if s.old_name}
        for name in renamed.keys() & values.keys() if warn else ():
            warnings.warn(f"{name} is now {renamed[name]}", RenamedWarning, stacklevel=3)
        return {renamed.get(name, name): value for name, value in values.items()}

    @classmethod
    def check(cls, values: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Returns valid values; UserError, which names `source`, for an unknown name."""
        settings = cls.settings()
        checked = {}
        for name, value in values.items():
            if name not in settings:
                closest = suggest(name, settings)
                raise UserError(f"{source} sets {name}, which does not exist{closest}")
            checked[name] = settings[name].check(name, value)
        return checked

    @classmethod
    def check_types(cls, values: Mapping[str, Any], source: str) -> None:
        """Raises UserError if values, by names in any case, are not of the settings' types."""
        found = {name.lower(): value for name, value in values.items()}
        for name, setting in cls.settings().items():
            if name.lower() in found:
                setting.check_type(f"{source}: {name}", found[name.lower()])

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser, defaults: Mapping[str, Any] = {}) -> None:
        """Adds a flag for each setting, lower case; absent from the result unless given.

        defaults: shown in the help instead of the declared ones.
        """
        for name, setting in cls.settings().items():
            _add_flag(parser, name, setting, defaults.get(name, getattr(cls, name)))

    @classmethod
    def given(cls, options: argparse.Namespace) -> dict[str, Any]:
        """Returns the valid values of the flags that were given on a parsed command line."""
        given = vars(options)
        return {n: s.check(n, given[n]) for n, s in cls.settings().items() if n in given}


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean X?` for the most similar known name, or nothing."""
    in_lower_case = {each.lower(): each for each in known}
    match = difflib.get_close_matches(name.lower(), in_lower_case, n=1, cutoff=0.5)
    return f"; did you mean {in_lower_case[match[0]]}?" if match else ""


def int_tuple(text: str) -> tuple[int, ...]:
    """Parses `1,2,4,8` or `(1, 2, 4, 8)`."""
    try:
        return tuple(int(part) for part in text.strip("() ").rstrip(",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {EXPECTED[tuple]}, got {text!r}") from None


def _add_flag(parser: argparse.ArgumentParser, name: str, setting: Setting, default: Any) -> None:
    """Adds the flag of one setting, and its former name as a flag that warns."""
    # Its help, with choices and default.
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    shown = setting.auto or "none" if shown in ("", None) else shown
    text = f"{setting.help} (default: {shown})"
    text = f"{' | '.join(map(str, setting.choices))}: {text}" if setting.choices else text
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    value_type = setting.value_type
    if value_type is not bool:
        options["type"] = int_tuple if value_type is tuple else value_type
        options["metavar"] = value_type.__name__.upper()

    # The flag, its alias and its former name.
    base = argparse.BooleanOptionalAction if value_type is bool else argparse._StoreAction
    flags = [f"--{each.lower()}" for each in (name, setting.alias) if each]
    parser.add_argument(*flags, action=base, help=text.replace("%", "%%"), **options)
    if old_name := setting.old_name.lower():

        class WarningAction(base):
            def __call__(
                self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                flag: str | None = None,
            ) -> None:  # fmt: skip
                new = flag.replace(old_name, name.lower())
                warnings.warn(f"{flag} is now {new}", RenamedWarning, stacklevel=2)
                super().__call__(parser, namespace, values, flag)

        options["help"] = argparse.SUPPRESS
        parser.add_argument(f"--{old_name}", action=WarningAction, **options)
