"""Processes that are killed while they write, and what is left of their stores."""

import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghost.store import ProjectionStore
from tests.ghost.store.building import BATCHES, build, contents, dying, rows_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start() -> Callable[..., BaseProcess]:
    """Starts a function in a fresh process, without importing torch in each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ghost.store.building"])

    def started(work: Callable[..., None], *args: Any, **kwargs: Any) -> BaseProcess:
        process = context.Process(target=work, args=args, kwargs=kwargs)
        process.start()
        return process

    return started


def finished(process: BaseProcess) -> bool:
    """Whether a process came to its end; the alternative is that it was killed."""
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def compacted(directory: Path, deleted: list[int]) -> None:
    """Delete samples and compact, whatever of it has been done before."""
    store = ProjectionStore.open(directory)
    store.delete(np.intersect1d(deleted, store.sample_ids))
    store.compact()


def check_prefix(directory: Path) -> None:
    """What is there so far reads as the first rows of the whole."""
    if not (directory / "manifest.json").exists():
        return
    store = ProjectionStore.open(directory)
    ids, rows = rows_of()
    np.testing.assert_array_equal(store.sample_ids, ids[: len(store)])
    np.testing.assert_array_equal(np.asarray(store.matrix()), rows[: len(store)])
    store.verify()


def test_killed_at_every_change_of_a_file(tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    build(tmp_path / "whole")
    whole, call, ended = contents(tmp_path / "whole"), 0, False
    while not ended:
        call += 1
        directory = tmp_path / str(call)
        ended = finished(start(dying, call, build, directory))
        check_prefix(directory)
        assert finished(start(build, directory))
        assert contents(directory) == whole
    assert call > 4 * 8  # four shards of at least eight changes each


def test_killed_again_and_again_in_one_folder(tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    build(tmp_path / "whole")
    directory, call = tmp_path / "torn", 0
    # A shard takes some twelve changes, so that some attempts get no further and others do.
    while not finished(start(dying, 8 + call % 17, build, directory)):
        check_prefix(directory)
        call += 1
        assert call < 200, "it gets no further"
    assert call > 2
    assert contents(directory) == contents(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{}, {"shard_format": "pt", "dtype": "bfloat16"}, {"dtype": "int8"}])
def test_killed_at_random(tmp_path: Path, start: Callable[..., BaseProcess], changes: dict[str, str]) -> None:
    whole = tmp_path / "whole"
    began = time.perf_counter()
    build(whole, pause=0.002, **changes)
    seconds = time.perf_counter() - began
    chance = random.Random(0)
    kills, folder = 0, 0
    while kills < 15:
        directory = tmp_path / f"torn{folder}"
        process = start(build, directory, pause=0.002, **changes)
        process.join(chance.uniform(0, 0.8 * seconds))
        process.kill()
        if not finished(process):
            kills += 1
        elif contents(directory) == contents(whole):
            folder += 1
        else:
            pytest.fail(f"{directory} differs from an uninterrupted build")
    assert finished(start(build, directory, **changes))
    assert contents(directory) == contents(whole)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_one_store_and_are_killed(
    tmp_path: Path, start: Callable[..., BaseProcess], ranks: int
) -> None:
    def all_of(directory: Path, pause: float = 0) -> list[BaseProcess]:
        return [start(build, directory, pause=pause, rank=rank, world_size=ranks) for rank in range(ranks)]

    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert all(finished(process) for process in all_of(whole))
    chance = random.Random(ranks)
    for _ in range(5):
        for process in all_of(torn, pause=0.01):
            process.join(chance.uniform(0, 0.1))
            process.kill()
            finished(process)
    assert all(finished(process) for process in all_of(torn))
    assert contents(torn) == contents(whole)
    store = ProjectionStore.open(torn)
    ids, rows = rows_of(ranks)
    assert store.complete
    np.testing.assert_array_equal(store.sample_ids, ids)
    np.testing.assert_array_equal(np.asarray(store.matrix()), rows)


def test_compaction_killed_at_every_change_of_a_file(
    tmp_path: Path, start: Callable[..., BaseProcess]
) -> None:
    ids, rows = rows_of()
    deleted = ids[[0, 1, 12]].tolist()
    kept = ~np.isin(ids, deleted)
    build(tmp_path / "whole")
    compacted(tmp_path / "whole", deleted)
    whole, call, ended = contents(tmp_path / "whole"), 0, False
    while not ended:
        call += 1
        directory = tmp_path / str(call)
        build(directory, batches=BATCHES)
        ended = finished(start(dying, call, compacted, directory, deleted))
        store = ProjectionStore.open(directory)
        store.verify()
        assert len(store) in (len(ids), kept.sum())
        compacted(directory, deleted)
        assert contents(directory) == whole
        store = ProjectionStore.open(directory)
        np.testing.assert_array_equal(store.sample_ids, ids[kept])
        np.testing.assert_array_equal(np.asarray(store.matrix()), rows[kept])
    assert call > 12
