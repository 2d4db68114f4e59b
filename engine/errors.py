"""Errors and warnings shown to the user as one line, without a traceback."""

import textwrap
import warnings


class UserError(Exception):
    """Says in one line what is wrong and what to do; scripts print it and exit with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(" ".join(message.split("\n")))  # values in it may have lines
        self.exit_code = exit_code


class FallbackWarning(UserWarning):
    """Something requested did not work; the script continues without it or with less.

    Every fallback warns with this category, so that benchmarks and tests can turn it into an error.
    """


class OutOfMemoryWarning(FallbackWarning):
    """Memory ran out, and the script continues with smaller batches."""


class RenamedWarning(UserWarning):
    """An old name of a flag, setting or function was used; it works for one more release."""


def short_reason(error: Exception, width: int = 200) -> str:
    """Returns an error's message in one line of at most `width` characters; a UserError's whole."""
    if isinstance(error, UserError):
        return str(error)
    return textwrap.shorten(str(error) or repr(error), width)


def type_and_message(error: Exception) -> str:
    """Returns an error's type and the first line of its message."""
    return " ".join(f"{type(error).__name__}: {error}".split("\n")[0].split())


def warn_fallback(what: str, error: Exception, without: str = "it") -> None:
    """Warns that a script continues without something, and why."""
    message = f"{what} failed ({short_reason(error)}); continuing without {without}"
    warnings.warn(message, FallbackWarning, stacklevel=3)
