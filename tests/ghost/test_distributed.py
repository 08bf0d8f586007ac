"""Several ranks score as one process on the whole batch; each group of processes ends by itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ghost.distributed_worker import SUITES

ROOT = Path(__file__).parents[2]


def run_group(suite: str, world_size: int, folder: Path) -> None:
    """The suite in a group of so many processes."""
    command = [sys.executable, "-m", "tests.ghost.distributed_worker", suite, str(folder / "group")]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world_size)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in ranks]
    for said, code in ended:
        assert code == 0, said


@pytest.mark.parametrize("suite", [suite for suite in SUITES if suite != "compiled"])
def test_two_ranks(suite: str, tmp_path: Path) -> None:
    run_group(suite, 2, tmp_path)


@pytest.mark.slow
def test_two_compiled_ranks(tmp_path: Path) -> None:
    run_group("compiled", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["ddp", "fsdp"])
def test_four_ranks(suite: str, tmp_path: Path) -> None:
    run_group(suite, 4, tmp_path)


def test_a_group_of_one(tmp_path: Path) -> None:
    run_group("ddp", 1, tmp_path)
