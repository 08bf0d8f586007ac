"""Damaged stores are refused in one sentence that names the file."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ghost.errors import StoreError
from ghost.store import ProjectionStore
from tests.ghost.store.building import batch, built, contents, writer

FILES = ["shard-r0-000001.{}", "ids-r0-000001.npy", "norms-r0-000001.npy", "scales-r0-000001.npy"]


@pytest.mark.parametrize("shard_format", ["npy", "pt"])
@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_shortened_file_is_named_on_opening(
    tmp_path: Path, file: str, shard_format: str
) -> None:
    built(tmp_path, dtype="int8", shard_format=shard_format)
    path = tmp_path / file.format(shard_format)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=f"{path.name} has {len(whole) - 1} bytes and was written with"):
        ProjectionStore.open(tmp_path)
    path.unlink()
    with pytest.raises(StoreError, match=f"{path.name} is missing"):
        ProjectionStore.open(tmp_path)


@pytest.mark.parametrize("shard_format", ["npy", "pt"])
@pytest.mark.parametrize("file", FILES)
def test_one_altered_byte_is_found_by_verify(tmp_path: Path, file: str, shard_format: str) -> None:
    store = built(tmp_path, dtype="int8", shard_format=shard_format)
    store.verify()
    path = tmp_path / file.format(shard_format)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(StoreError, match=f"{path.name} is not what was written"):
        store.verify()


@pytest.mark.parametrize("shard_format", ["npy", "pt"])
def test_a_matrix_of_zeros_bytes_is_refused_on_opening(tmp_path: Path, shard_format: str) -> None:
    built(tmp_path, shard_format=shard_format)
    path = tmp_path / f"shard-r0-000000.{shard_format}"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StoreError, match=f"{path.name} cannot be read"):
        ProjectionStore.open(tmp_path)


def test_an_array_of_another_shape_is_refused_on_opening(tmp_path: Path) -> None:
    built(tmp_path)
    path = tmp_path / "shard-r0-000000.npy"
    np.save(path, np.load(path).reshape(21, -1))
    with pytest.raises(
        StoreError, match=r"shard-r0-000000.npy holds float32 \(21, 7\), not float32 \(7, 21\)"
    ):
        ProjectionStore.open(tmp_path)


def _drop(key: str) -> Callable[[dict], None]:
    return lambda described: described.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda described: described.update(schema_version=2),
            "has schema_version 2 and .* reads 1",
        ),
        (_drop("schema_version"), r"is no manifest \(KeyError: .*schema_version"),
        (_drop("layout"), r"is no manifest \(KeyError: .*layout"),
        (lambda described: described["layout"][0].pop("k_in"), r"is no manifest \(TypeError"),
        (lambda described: described["shards"][0].pop("rows"), r"is no manifest \(TypeError"),
        (lambda described: described.update(dtype="float8"), "dtype is 'float8'"),
    ],
)
def test_a_manifest_that_does_not_fit(tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    built(tmp_path)
    path = tmp_path / "manifest.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    with pytest.raises(StoreError, match=message):
        ProjectionStore.open(tmp_path)


def test_no_store_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no projection store: it has no manifest.json"):
        ProjectionStore.open(tmp_path)
    with pytest.raises(StoreError, match="holds no projection store"):
        ProjectionStore.open(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"is no manifest \(JSONDecodeError"):
        ProjectionStore.open(tmp_path)


def test_a_damaged_build_is_not_gone_on_with(tmp_path: Path) -> None:
    going_on = writer(tmp_path, batches_per_shard=1)
    for number in range(3):
        going_on.append(*batch(number))
    while going_on.next_batch < 3:
        time.sleep(0.01)
    going_on.abandon()
    before = contents(tmp_path)
    assert "shard-r0-000002.npy" in before
    lines = before["journal-r0.jsonl"].splitlines(keepends=True)
    journal = tmp_path / "journal-r0.jsonl"
    for damaged, message in [
        (lines[1] + lines[2], "names no shard that begins with batch 0"),
        (lines[0] + b"{}\n", "cannot be read at line 2"),
        (lines[0] + b"\xff\n", "cannot be read at line 2"),
    ]:
        journal.write_bytes(damaged)
        with pytest.raises(StoreError, match=message):
            writer(tmp_path, batches_per_shard=1)
        with pytest.raises(StoreError, match=message):
            ProjectionStore.open(tmp_path)
    journal.write_bytes(b"".join(lines))
    shard = tmp_path / "shard-r0-000001.npy"
    shard.write_bytes(before[shard.name][:-4])
    with pytest.raises(StoreError, match=r"shard-r0-000001.npy has \d+ bytes"):
        writer(tmp_path, batches_per_shard=1)
    shard.write_bytes(before[shard.name])
    assert {name: data for name, data in contents(tmp_path).items() if name != ".lock-r0"} == {
        name: data for name, data in before.items() if name != ".lock-r0"
    }


@pytest.mark.parametrize("tombstones", [b"", np.ones(3).tobytes()])
def test_tombstones_that_cannot_be_read(tmp_path: Path, tombstones: bytes) -> None:
    store = built(tmp_path)
    store.delete(store.sample_ids[:1])
    (tmp_path / "deleted-g0.npy").write_bytes(tombstones)
    with pytest.raises(
        StoreError, match=r"deleted-g0.npy cannot be read, so it is not known what was deleted"
    ):
        ProjectionStore.open(tmp_path)
    np.save(tmp_path / "deleted-g0.npy", np.ones(2))
    with pytest.raises(StoreError, match=r"deleted-g0.npy holds float64 \(2,\), not ids"):
        ProjectionStore.open(tmp_path)
