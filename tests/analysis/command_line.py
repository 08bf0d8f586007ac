"""Commands of `analysis` in this process."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Command = Callable[..., int]


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Runs a command's main function with arguments, in an empty folder, and returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # set by `main`; put back at the end
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(main: Callable[[], int], *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        try:
            return main()
        except SystemExit as end:
            return int(str(end.code))

    yield run
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level
