"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """What is wrong and what to do, in one line; scripts print it without a traceback and exit with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code
