"""Errors and warnings shown to the user as one line, without a traceback."""


class UserError(Exception):
    """Says in one line what is wrong and what to do; scripts print it and exit with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(" ".join(message.split("\n")))  # values in it may have lines
        self.exit_code = exit_code


class FallbackWarning(UserWarning):
    """Something requested did not work, and the script continues without it or with less.

    Every fallback warns with this category, so that benchmarks and tests can turn it into an error.
    """


class RenamedWarning(UserWarning):
    """An old name of a flag, setting or function was used; it works for one more release."""
