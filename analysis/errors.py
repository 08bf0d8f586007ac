"""What can be wrong with a finished run's files."""

from conf.errors import UserError


class AnalysisError(UserError):
    """A run's file is missing, damaged or not what it should hold; the message names the file."""
