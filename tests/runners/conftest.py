import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from runners import cli

Line = Callable[..., int]


def data_config(seed: int = 0, **keys: object) -> DictConfig:
    """A `data` node with what all sources share."""
    return OmegaConf.create({"seed": seed, "keep": None, "drop": None, "test_samples": 0, **keys})


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


@pytest.fixture
def tracked_cwd(tmp_path: Path, ready_store: Path) -> Path:
    """A directory to start runs from, with a ready store in it."""
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    return tmp_path
