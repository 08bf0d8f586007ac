"""What a writer puts on disk, what it refuses, and that it loses no error."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghost.errors import StoreError
from ghost.layout import Layout
from ghost.store import ProjectionStore
from ghost.store import writer as writer_module
from tests.ghost.store.building import (
    BATCHES,
    LAYOUT,
    batch,
    build,
    built,
    contents,
    rows_of,
    writer,
)

# The largest error of a stored entry, relative to the largest entry of its row.
ERRORS = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127}


@pytest.mark.parametrize("shard_format", ["npy", "pt"])
@pytest.mark.parametrize("dtype", ERRORS)
def test_reads_back_what_was_written(tmp_path: Path, dtype: str, shard_format: str) -> None:
    store = built(tmp_path, dtype=dtype, shard_format=shard_format)
    ids, rows = rows_of()
    assert store.complete
    assert store.dtype == dtype
    assert store.sample_ids.dtype == np.int64
    np.testing.assert_array_equal(store.sample_ids, ids)
    read = torch.from_numpy(np.asarray(store.matrix()))
    error = (read - rows).abs().amax(1) / rows.abs().amax(1)
    assert error.max() <= ERRORS[dtype] * (1 + 1e-6)
    store.verify()


def test_files_are_plain_arrays(tmp_path: Path) -> None:
    build(tmp_path, batches=3)
    ids, rows = rows_of(batches=3)
    np.testing.assert_array_equal(np.load(tmp_path / "shard-r0-000000.npy"), rows)
    np.testing.assert_array_equal(np.load(tmp_path / "ids-r0-000000.npy"), ids)
    norms = np.load(tmp_path / "norms-r0-000000.npy")
    for i, part in enumerate(LAYOUT.slices):
        np.testing.assert_allclose(norms[:, i], rows[:, part.columns].double().norm(dim=1), rtol=1e-7)
    assert set(contents(tmp_path)) == {
        ".lock", "ids-r0-000000.npy", "manifest.json", "norms-r0-000000.npy", "shard-r0-000000.npy",
    }  # fmt: skip


def test_bfloat16_files_hold_its_bits_or_itself(tmp_path: Path) -> None:
    _, rows = rows_of(batches=3)
    build(tmp_path / "npy", batches=3, dtype="bfloat16")
    bits = np.load(tmp_path / "npy" / "shard-r0-000000.npy")
    assert bits.dtype == np.uint16
    build(tmp_path / "pt", batches=3, dtype="bfloat16", shard_format="pt")
    tensor = torch.load(tmp_path / "pt" / "shard-r0-000000.pt", weights_only=True)
    assert torch.equal(tensor, rows.bfloat16())
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), tensor)


def test_two_builds_have_the_same_bytes(tmp_path: Path) -> None:
    for shard_format in ("npy", "pt"):
        build(tmp_path / f"a-{shard_format}", shard_format=shard_format)
        build(tmp_path / f"b-{shard_format}", shard_format=shard_format)
        assert contents(tmp_path / f"a-{shard_format}") == contents(tmp_path / f"b-{shard_format}")


def test_goes_on_at_a_shard_after_an_exception(tmp_path: Path) -> None:
    build(tmp_path / "whole")

    def fail() -> None:
        with writer(tmp_path / "torn") as going_on:
            for number in range(8):
                going_on.append(*batch(number))
            raise KeyError("the loop's own")

    with pytest.raises(KeyError):
        fail()
    store = ProjectionStore.open(tmp_path / "torn")
    assert not store.complete
    with writer(tmp_path / "torn") as going_on:
        assert going_on.next_batch in (0, 3, 6)
        assert going_on.rows_written == len(store)
        for number in range(going_on.next_batch, BATCHES):
            going_on.append(*batch(number))
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_an_open_store_shows_what_is_safe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with writer(tmp_path) as going_on:
        for number in range(7):
            going_on.append(*batch(number))
        while going_on.next_batch < 6:
            time.sleep(0.01)
        store = ProjectionStore.open(tmp_path)
        assert not store.complete
        assert "not complete" in caplog.text
        ids, rows = rows_of(batches=6)
        np.testing.assert_array_equal(store.sample_ids, ids)
        assert store.search(rows[:2], 1)[0][:, 0].tolist() == ids[:2].tolist()
        assert going_on.bytes_written == store.nbytes
        with pytest.raises(StoreError, match="not complete"):
            store.delete(ids[:1])
        with pytest.raises(StoreError, match="not complete"):
            store.compact()


def test_a_complete_store_is_not_written_again(tmp_path: Path) -> None:
    build(tmp_path)
    before = contents(tmp_path)
    going_on = writer(tmp_path)
    assert going_on.next_batch == BATCHES
    with pytest.raises(StoreError, match=f"has all {BATCHES} batches of rank 0"):
        going_on.append(*batch(0))
    going_on.close()
    going_on.close()
    with pytest.raises(StoreError, match="closed"):
        going_on.append(*batch(0))
    assert contents(tmp_path) == before


def test_rows_that_are_changed_afterwards_are_not(tmp_path: Path) -> None:
    ids, rows = batch(0)
    reused_ids, reused_rows = ids.clone(), rows.clone()
    with writer(tmp_path) as going_on:
        going_on.append(reused_ids, reused_rows)
        reused_ids.zero_()
        reused_rows.zero_()
    store = ProjectionStore.open(tmp_path)
    np.testing.assert_array_equal(store.sample_ids, ids)
    np.testing.assert_array_equal(store.matrix(), rows)


def test_float64_rows_ids_in_a_list_and_nothing_at_all(tmp_path: Path) -> None:
    with writer(tmp_path / "some") as going_on:
        going_on.append([7, 7], torch.ones(2, LAYOUT.width, dtype=torch.float64, requires_grad=True))
        going_on.append([], torch.ones(0, LAYOUT.width))
    assert ProjectionStore.open(tmp_path / "some").sample_ids.tolist() == [7, 7]
    writer(tmp_path / "none").close()
    empty = ProjectionStore.open(tmp_path / "none")
    assert (len(empty), empty.matrix().shape, empty.complete) == (0, (0, LAYOUT.width), True)
    with pytest.raises(StoreError, match="there are no rows to search"):
        empty.search(torch.ones(1, LAYOUT.width), 1)


@pytest.mark.parametrize(
    ("dtype", "row", "message"),
    [
        ("float32", [float("nan")], "sample 5 has a projected gradient that is not finite"),
        ("int8", [float("inf")], "sample 5 has a projected gradient that is not finite"),
        ("float16", [70_000.0], "sample 5 has a projected gradient too large for float16"),
        ("float32", [1e39], "sample 5 has a projected gradient too large for float32"),
        ("float16", [1e-9], "sample 5 keeps 0% of its projected gradient's length in float16"),
        ("float32", [1e-60], "sample 5 keeps 0% of its projected gradient's length in float32"),
    ],
)
def test_rows_that_cannot_be_kept_name_their_sample(
    tmp_path: Path, dtype: str, row: list[float], message: str
) -> None:
    rows = torch.zeros(3, LAYOUT.width, dtype=torch.float64)
    rows[1, :1] = torch.tensor(row, dtype=torch.float64)
    going_on = writer(tmp_path, dtype=dtype)
    going_on.append([4, 5, 6], rows)
    with pytest.raises(StoreError, match=message):
        going_on.close()
    assert not ProjectionStore.open(tmp_path).complete


def test_rows_of_zeros_are_kept_in_every_format(tmp_path: Path) -> None:
    for dtype in ERRORS:
        with writer(tmp_path / dtype, dtype=dtype) as going_on:
            going_on.append([1], torch.zeros(1, LAYOUT.width))
        assert not np.asarray(ProjectionStore.open(tmp_path / dtype).matrix()).any()


def test_what_the_thread_meets_is_raised_by_every_later_call(tmp_path: Path) -> None:
    going_on = writer(tmp_path, batches_per_shard=1)
    going_on.append(*batch(0))
    going_on.append([3], torch.full((1, LAYOUT.width), torch.nan))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            going_on.append(*batch(2))
        except StoreError:
            break
        time.sleep(0.01)
    for _ in range(2):
        with pytest.raises(StoreError, match="sample 3"):
            going_on.append(*batch(3))
    with pytest.raises(StoreError, match="sample 3"):
        going_on.close()
    assert len(ProjectionStore.open(tmp_path)) == len(batch(0)[0])


def test_the_caller_is_held_up_rather_than_memory_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    real = writer_module.write_shard

    def slow(*args: Any) -> Any:
        may_write.wait(30)
        return real(*args)

    monkeypatch.setattr(writer_module, "write_shard", slow)
    going_on = writer(tmp_path, batches_per_shard=2)
    added = 0

    def add() -> None:
        nonlocal added
        for number in range(20):
            going_on.append(*batch(number))
            added += 1

    loop = threading.Thread(target=add)
    loop.start()
    loop.join(0.5)
    assert added < 8
    may_write.set()
    loop.join(30)
    going_on.close()
    assert len(ProjectionStore.open(tmp_path)) == len(rows_of(batches=20)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprints": {"model": "zz", "data": "b2", "config": "c3"}}, "fingerprints.model is 'a1' there"),
        ({"projection": {"kind": "rademacher"}}, "projection.kind is 'gaussian' there and 'rademacher' here"),
        ({"layout": Layout.of([("w", (2, 2), (2, 2))])}, "layout has 3 entries there and 1 here"),
        ({"dtype": "float16"}, "dtype is 'float32' there and 'float16' here"),
        ({"batches_per_shard": 4}, "batches_per_shard is 3 there and 4 here"),
        ({"world_size": 2}, "world_size is 1 there and 2 here"),
    ],
)
def test_goes_on_only_with_the_same_facts(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    build(tmp_path, batches=4)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=message):
        writer(tmp_path, **changes)
    assert {name: data for name, data in contents(tmp_path).items() if name != ".lock-r0"} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8': it should be one of float32, float16, bfloat16, int8"),
        ({"shard_format": "csv"}, "shard_format is 'csv': it should be npy or pt"),
        ({"batches_per_shard": 0}, "batches_per_shard is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2: it should be between 0 and 1"),
        ({"layout": Layout(())}, "layout has no columns"),
        ({"projection": {"seed": torch.ones(1)}}, "plain numbers and text"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        writer(tmp_path / "new", **changes)
    assert not (tmp_path / "new" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([1, 2], torch.ones(3, LAYOUT.width), "do not fit"),
        ([1], torch.ones(1, LAYOUT.width - 1), f"the layout's width|\\[n, {LAYOUT.width}\\]"),
        (torch.tensor([True]), torch.ones(1, LAYOUT.width), "should be integers"),
        ([1.5], torch.ones(1, LAYOUT.width), "should be integers"),
        ([1], torch.ones(1, LAYOUT.width).half(), "should be float32 or float64"),
    ],
)
def test_batches_that_do_not_fit(tmp_path: Path, ids: list[int], rows: torch.Tensor, message: str) -> None:
    with writer(tmp_path) as going_on:
        with pytest.raises(StoreError, match=message):
            going_on.append(ids, rows)
        going_on.append(*batch(0))
    assert len(ProjectionStore.open(tmp_path)) == len(batch(0)[0])


def test_a_rank_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_LOCK_SECONDS", 0.1)
    first = writer(tmp_path, world_size=2)
    with pytest.raises(StoreError, match="being written by another process as rank 0"):
        writer(tmp_path, world_size=2)
    writer(tmp_path, world_size=2, rank=1).abandon()
    first.abandon()
    writer(tmp_path, world_size=2).abandon()


def test_ranks_are_in_order_whoever_ends_first(tmp_path: Path) -> None:
    build(tmp_path, rank=1, world_size=2)
    assert not ProjectionStore.open(tmp_path).complete
    again = writer(tmp_path, rank=1, world_size=2)
    assert again.next_batch == BATCHES
    again.close()
    build(tmp_path, rank=0, world_size=2)
    store = ProjectionStore.open(tmp_path)
    assert store.complete
    np.testing.assert_array_equal(store.sample_ids, rows_of(ranks=2)[0])
    assert not list(tmp_path.glob("journal*"))


def test_files_that_no_journal_names_are_removed_and_others_left(tmp_path: Path) -> None:
    build(tmp_path / "whole")
    torn = tmp_path / "torn"
    with pytest.raises(KeyError), writer(torn):
        raise KeyError
    (torn / "shard-r0-000000.npy").write_bytes(b"half")
    (torn / ".norms-r0-000000.npy.partial").write_bytes(b"half")
    (torn / "notes.txt").write_text("mine")
    with (torn / "journal-r0.jsonl").open("a") as journal:
        journal.write('{"stem": "r0-0000')
    build(torn)
    (torn / "notes.txt").unlink()
    assert contents(torn) == contents(tmp_path / "whole")


def test_a_store_without_its_manifest_is_not_built_over(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match="holds files of a store but no manifest"):
        writer(tmp_path)


def test_a_full_disk_is_said_and_the_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "whole")
    real, calls = os.fsync, 0

    def full(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StoreError, match=r"shard r0-\d+ of \d+ bytes cannot be written \(No space left on device, \d+ bytes"
    ) as caught:
        build(tmp_path / "torn")
    monkeypatch.setattr(os, "fsync", real)
    going_on = writer(tmp_path / "torn")
    assert f"goes on from batch {going_on.next_batch}." in str(caught.value)
    assert going_on.next_batch > 0
    going_on.abandon()
    build(tmp_path / "torn")
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_a_file_that_may_not_grow_is_said(tmp_path: Path) -> None:
    """The system's own refusal, in a process of its own."""
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from tests.ghost.store.building import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with writer(Path(sys.argv[1]), batches_per_shard=1) as going_on:\n"
        "    going_on.append(*batch(0))\n"
        "    while going_on.next_batch < 1: time.sleep(0.01)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "    going_on.append(torch.arange(500), torch.ones(500, LAYOUT.width))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert "StoreError: " in done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    np.testing.assert_array_equal(ProjectionStore.open(tmp_path).sample_ids, batch(0)[0])


def test_the_manifest_says_what_the_rows_are(tmp_path: Path) -> None:
    store = built(tmp_path)
    described = json.loads((tmp_path / "manifest.json").read_text())
    assert described["schema_version"] == 1
    assert described["rows"] == len(store) == len(rows_of()[0])
    assert described["batches"] == [BATCHES]
    assert [part["parameter"] for part in described["layout"]] == LAYOUT.parameters
    assert store.layout == LAYOUT
    assert store.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix == ".npy")


def test_many_shards_open_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghost.store.shards._MAPS", 2)
    store = built(tmp_path, batches_per_shard=1)
    ids, rows = rows_of()
    np.testing.assert_array_equal(np.asarray(store.matrix()), rows)
    np.testing.assert_array_equal(store.search(rows, 1)[0][:, 0], ids)


@pytest.mark.parametrize("name", ["manifest.json", ".lock-r0"])
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, name: str) -> None:
    """A folder stands where the file should be."""
    partial = f".{name}.partial" if name == "manifest.json" else name
    (tmp_path / "store" / partial).mkdir(parents=True)
    with pytest.raises(
        StoreError, match=r"store: the beginning of a store cannot be written \(.+ are free\)"
    ):
        writer(tmp_path / "store")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    with pytest.raises(StoreError, match=r"store cannot be made a folder \(File exists\): choose another"):
        writer(tmp_path / "store")
