"""The command line that every script shares: parser, one-line errors, exit codes."""

import argparse
import errno
import importlib.util
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TextIO

from engine import distributed, exit_if_importing
from engine.errors import UserError
from engine.gpu_memory import is_out_of_memory
from engine.settings import suggest

PATH_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT,
    errno.ENAMETOOLONG,
)  # fmt: skip
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PATH_ADVICE = "Choose a folder that can be written to, or a file that can be read"
ERRNO_ADVICE = dict.fromkeys(PATH_ERRNOS, PATH_ADVICE)
ERRNO_ADVICE |= dict.fromkeys(DISK_FULL_ERRNOS, "Free some space")
LOST_READER_EXIT_CODE = 141  # of a process that SIGPIPE ends


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors that suggest the nearest flag."""

    def __init__(self, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)
        self._negative_number_matcher = re.compile(r"-[\d.]")  # a value may be -1000,400

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("-"):
                self.error(f"unexpected argument {flag} (--help lists all flags)")
            # The first action is --help.
            known = [option for action in self._actions[1:] for option in action.option_strings]
            self.error(f"unknown flag {flag}{suggest(flag, known)} (--help lists all flags)")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def import_from_file(reference: str, flag: str, example: str) -> tuple[ModuleType, str]:
    """Returns the module and the name in it that `file.py:Name` means; else UserError by `flag`."""
    file, _, name = reference.rpartition(":")
    if not file.endswith(".py") or not name:
        raise UserError(f"{flag} is {reference!r}, but must look like {example}")
    if not Path(file).is_file():
        raise UserError(f"{flag} names {file}, which does not exist")
    try:
        # Registered, as dataclasses need it, under a name that no other module has.
        spec = importlib.util.spec_from_file_location(f"user_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from error
    return module, name


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """Prints our own warnings as one line on stderr, all others as Python does."""
    if category.__module__ == UserError.__module__:
        print(f"warning: {message}", file=sys.stderr, flush=True)
    else:
        _show_warning(message, category, filename, lineno, file, line)


_show_warning = warnings.showwarning


def fail(message: str, exit_code: int) -> int:
    """Prints one line on stderr, once per machine; returns the exit code."""
    if distributed.is_first_failure():
        print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code


def run_script(main: Callable[[], None]) -> NoReturn:
    """Runs a script's main and exits: 0, or one line on stderr and an exit code.

    Characters that stdout cannot encode are escaped. If its reader is gone, as of `| head`, the
    script ends without a word.
    """
    warnings.showwarning = show_warning
    if signal.getsignal(signal.SIGINT) is exit_if_importing:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        exit_code = _run(main)
        print(end="", flush=True)
    except BrokenPipeError:
        if not _drop_unread_output():
            raise
        exit_code = LOST_READER_EXIT_CODE
    sys.exit(exit_code)


def _run(main: Callable[[], None]) -> str | int | None:
    """Runs a script's main, reports its failure and returns the exit code."""
    # Errors in the order of how much is known about them.
    try:
        distributed.check_launcher()
        main()
    except SystemExit as error:
        return error.code
    except UserError as error:
        return fail(str(error), error.exit_code)
    except Exception as error:
        if is_out_of_memory(error):
            return fail("out of memory. Ask for fewer or smaller images at a time", 1)
        advice = ERRNO_ADVICE.get(getattr(error, "errno", None))
        if not advice:
            raise
        where = f" ({error.filename})" if error.filename else ""
        exit_code = 1 if error.errno in DISK_FULL_ERRNOS else 2
        return fail(f"{error.strerror}{where}. {advice}", exit_code)
    except KeyboardInterrupt:
        return 130
    distributed.shut_down()
    return 0


def _drop_unread_output() -> bool:
    """Drops what stdout has buffered if its reader is gone; returns whether it is."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
