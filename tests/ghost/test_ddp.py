"""A model inside DistributedDataParallel, in a process of its own: its threads end with it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_mode_in_a_group_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ghost.ddp_worker", str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
