import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runners.resume.harness import ROOT, Started


class Starter:
    """The process that all runs of the tests are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runners.resume.starter"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    started = Starter()
    yield started
    started.close()


@pytest.fixture
def start(starter: Starter, tmp_path: Path) -> Any:
    """Starts `run.py` with these arguments in `tmp_path`."""

    def started(*argv: str, kill_at: int | None = None, full_at: int | None = None) -> Started:
        log = tmp_path / "output.log"
        request = {"argv": list(argv), "cwd": str(tmp_path), "log": str(log)}
        pid = starter.ask(**request, kill_at=kill_at, full_at=full_at)["pid"]
        return Started(pid, log, lambda: starter.ask(wait=pid)["status"])

    return started


@pytest.fixture
def tracked(tmp_path: Path, ready_store: Path) -> Path:
    """A tracking store in `tmp_path`, where commands look for it."""
    return Path(shutil.copy(ready_store, tmp_path / "mlflow.db"))
