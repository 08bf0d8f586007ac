"""What the tests of all integrations use."""

from tests.analysis.command_line import in_process

__all__ = ["in_process"]
