import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runners import cli

Line = Callable[..., int]


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """Runs a command line in this process, in an empty folder, and returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # set by `main`; put back at the end
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run_line(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        try:
            return cli.main()
        except SystemExit as end:
            return int(str(end.code))

    yield run_line
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="session")
def ready_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty tracking store, made once: creating one takes seconds, copying it none."""
    from runners.mlflow_store import open_store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{path}", "unused")
    return path


@pytest.fixture
def tracked_cwd(tmp_path: Path, ready_store: Path) -> Path:
    """A directory to start runs from, with a ready store in it."""
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    return tmp_path
