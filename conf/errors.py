"""Errors that a user can cause and mend: one sentence each, naming the key, the value and what would be
right.
"""


class UserError(Exception):
    """Base of every error that a user can cause and mend.

    Attributes:
        exit_code: What a command ends with.
    """

    exit_code = 2


class ConfigError(UserError):
    """A configuration key has a value that cannot work."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
