"""Several ranks score as one process on the whole batch."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ghost.distributed_worker import SUITES

ROOT = Path(__file__).parents[2]


class Group:
    """So many processes, which run suites one after another."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self._said = [folder / f"{rank}.txt" for rank in range(world_size)]
        self._ranks = [self._start(rank, world_size, folder / "group") for rank in range(world_size)]

    def _start(self, rank: int, world_size: int, file: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.ghost.distributed_worker", file, str(rank), str(world_size)]
        pipe = subprocess.PIPE
        with self._said[rank].open("w") as said:
            return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=said, text=True)

    def run(self, suite: str) -> None:
        for rank in self._ranks:
            assert rank.stdin
            rank.stdin.write(f"{suite}\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in self._ranks if rank.stdout]
        assert set(answers) == {f"{suite}\n"}, self._all_said()

    def end(self) -> None:
        """Once the suites have passed, its processes end by themselves."""
        for rank in self._ranks:
            assert rank.stdin
            assert rank.stdout
            rank.stdin.close()
            rank.stdout.close()
        assert {rank.wait(timeout=60) for rank in self._ranks} == {0}, self._all_said()

    def _all_said(self) -> str:
        return "\n".join(said.read_text() for said in self._said)

    def kill(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.communicate()


RunSuite = Callable[[str, int], None]


@pytest.fixture(scope="module")
def run_suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunSuite]:
    """Run a suite in a group of so many processes, which stays until a suite fails there."""
    groups: dict[int, Group] = {}

    def run(suite: str, world_size: int) -> None:
        group = groups.pop(world_size, None) or Group(world_size, tmp_path_factory.mktemp("ranks"))
        try:
            group.run(suite)
        except (AssertionError, BrokenPipeError):
            group.kill()
            raise
        groups[world_size] = group

    yield run
    for group in groups.values():
        group.end()


@pytest.mark.parametrize("suite", [suite for suite in SUITES if suite != "compiled"])
def test_two_ranks(suite: str, run_suite: RunSuite) -> None:
    run_suite(suite, 2)


@pytest.mark.slow
def test_two_compiled_ranks(run_suite: RunSuite) -> None:
    run_suite("compiled", 2)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["ddp", "fsdp"])
def test_four_ranks(suite: str, run_suite: RunSuite) -> None:
    run_suite(suite, 4)


def test_a_group_of_one(run_suite: RunSuite) -> None:
    run_suite("ddp", 1)
