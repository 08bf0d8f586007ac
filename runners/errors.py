"""The runner's own errors: one sentence each, naming the key, the value and what would be right."""


class RunnerError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(RunnerError):
    """A configuration key has a value that cannot work."""


class DataError(RunnerError):
    """A data source is missing, empty or malformed."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
