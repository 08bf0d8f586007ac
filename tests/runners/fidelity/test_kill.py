"""Several processes end with the command that started them, and what they were doing is done again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.runners.fidelity.conftest import TINY_LDS

PROJECT = Path(__file__).resolve().parents[3]
LONG = [*TINY_LDS, "fidelity.subsets=100000", "tracking=none", "fidelity.seeds=[0,1,2]", "jobs=2"]


def until(holds: Callable[[], bool]) -> None:
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.1)
    pytest.fail("waited five minutes")


def ended(process: psutil.Process) -> bool:
    """Whether the process is gone, reaped or not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_command(number: signal.Signals, tmp_path: Path) -> None:
    started = subprocess.Popen(
        [sys.executable, "-m", "runners.fidelity", *LONG, "hydra.run.dir=out"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    logs = [tmp_path / "out" / name / "run.log" for name in ("seed0", "seed1")]
    until(lambda: all(log.exists() and "were scored" in log.read_text() for log in logs))
    children = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(number)
    started.wait(60)
    until(lambda: all(ended(child) for child in children))
    for log in logs:
        assert json.loads((log.parent / "tracking.json").read_text())["status"] == "KILLED"
        assert not (log.parent / "finished.json").exists()
    assert not (tmp_path / "out" / "seed2").exists()
