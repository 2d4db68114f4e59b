"""The command line that every script shares: flags made from settings, one-line errors, exit codes."""

import argparse
import difflib
import errno
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from engine.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CANNOT_WRITE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a configuration attribute means and which values it may take; bounds are inclusive.

    alias: another name for its flag.
    """

    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    alias: str = ""

    def check(self, name: str, value: Any, kind: type) -> Any:
        """Returns the value as `kind` (bool, int, float, str or a tuple of int), or raises UserError naming it."""
        if kind is tuple:
            good = isinstance(value, tuple | list) and value and all(type(v) is int and v > 0 for v in value)
            value = tuple(value) if good else value
        elif kind is float:
            good = type(value) in (int, float)
            value = float(value) if good else value
        else:
            good = type(value) is kind
        if not good:
            expected = {tuple: "whole numbers such as 1,2,4,8", int: "a whole number", float: "a number"}
            raise UserError(f"{name} is {value!r}, but must be {expected.get(kind, kind.__name__)}")
        if self.choices and value not in self.choices:
            raise UserError(f"{name} is {value!r}{nearest(value, self.choices)}; it can be {', '.join(self.choices)}")
        for part in value if kind is tuple else (value,):
            if self.low is not None and not part >= self.low:
                raise UserError(f"{name} is {value}, but must be at least {self.low:g}")
            if self.high is not None and not part <= self.high:
                raise UserError(f"{name} is {value}, but must be at most {self.high:g}")
        return value


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name most like this one, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def whole_numbers(text: str) -> tuple[int, ...]:
    """`1,2,4,8` or `(1, 2, 4, 8)` as a tuple."""
    try:
        return tuple(int(part) for part in text.strip("() ").rstrip(",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no whole numbers such as 1,2,4,8") from None


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors and which names the flag nearest to one that does not exist."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def add_setting(self, name: str, kind: type, setting: Setting, default: Any) -> None:
        """Adds the flag of an UPPER_CASE attribute; absent from the parsed result unless it is given."""
        shown = ",".join(map(str, default)) if kind is tuple else default
        text = f"{setting.help} (default: {shown if shown != '' else 'none'})".replace("%", "%%")
        if setting.choices:
            text = f"{' | '.join(setting.choices)}: {text}"
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            self.add_argument(f"--{name.lower()}", action=argparse.BooleanOptionalAction, **options)
        else:
            convert = whole_numbers if kind is tuple else kind
            names = [f"--{each.lower()}" for each in (name, setting.alias) if each]
            self.add_argument(*names, type=convert, metavar=kind.__name__.upper(), **options)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            known = [option for action in self._actions[1:] for option in action.option_strings]  # the first is --help
            self.error(f"there is no {flag}{nearest(flag, known)} (--help lists all flags)")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(message.replace("argument ", "", 1) if message.startswith("argument ") else message)


def load_from_file(reference: str, flag: str, example: str) -> tuple[ModuleType, str]:
    """The module and the name in it that `file.py:Name` means; raises UserError, naming the flag, if there is none."""
    file, _, name = reference.rpartition(":")
    if not file or not name:
        raise UserError(f"{flag} is {reference!r}, but must look like {example}")
    if not Path(file).is_file():
        raise UserError(f"{flag} names {file}, which does not exist")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{flag} names {file}, which is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        raise UserError(f"{file} cannot be loaded: {type(problem).__name__}: {problem}") from problem
    return module, name


def fail(problem: str, exit_code: int) -> NoReturn:
    """Prints one line on stderr and exits.

    Of several processes the first speaks first: where all fail alike, their launcher ends the others meanwhile.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(3)
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(exit_code)


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a script's main and exits: 0, or one line on stderr and the code that the failure calls for."""
    try:
        main()
    except UserError as problem:
        fail(str(problem), problem.exit_code)
    except OSError as problem:
        if problem.errno not in (*FULL, *CANNOT_WRITE):
            raise
        where = f" ({problem.filename})" if problem.filename else ""
        what_to_do = "free some space" if problem.errno in FULL else "choose a folder that can be written to"
        fail(f"{problem.strerror}{where}: {what_to_do}", 2)
    except torch.OutOfMemoryError:
        fail("out of GPU memory: ask for fewer or smaller images at a time", 1)
    except KeyboardInterrupt:
        sys.exit(130)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # NCCL complains otherwise
    sys.exit(0)
