"""The runner's own errors: one sentence each, naming what is wrong and what would be right."""

from conf.errors import UserError


class DataError(UserError):
    """A data source is missing, empty or malformed."""
