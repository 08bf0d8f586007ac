"""Deleted samples are in no answer at once, and in no file after `compact`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghost.errors import StoreError
from ghost.store import ProjectionStore
from ghost.store import store as store_module
from tests.ghost.store.building import BATCHES, built, contents, rows_of, writer


def test_deleted_samples_are_in_no_answer(tmp_path: Path) -> None:
    store = built(tmp_path)
    ids, rows = rows_of()
    gone = [int(ids[0]), int(ids[9])]
    kept = ~np.isin(ids, gone)
    store.delete(gone)
    for seen in (store, ProjectionStore.open(tmp_path)):
        assert len(seen) == kept.sum() == seen.matrix().shape[0]
        np.testing.assert_array_equal(seen.sample_ids, ids[kept])
        np.testing.assert_array_equal(np.asarray(seen.matrix()), rows[kept])
        found, _ = seen.search(rows, len(seen))
        assert not np.isin(found, gone).any()
        with pytest.raises(StoreError, match=f"no samples {gone[0]}: nothing was done"):
            seen.search(rows, 1, sample_ids=gone[:1])


def test_unknown_samples_are_named_and_nothing_is_deleted(tmp_path: Path) -> None:
    store = built(tmp_path)
    ids, _ = rows_of()
    before = contents(tmp_path)
    with pytest.raises(StoreError, match="no samples 7, 8, 9 and 1 more: nothing was done"):
        store.delete([int(ids[0]), 7, 8, 9, 11])
    store.delete([])
    assert contents(tmp_path) == before
    store.delete(ids[:1])
    with pytest.raises(StoreError, match="no samples 0"):
        store.delete(ids[:1])


@pytest.mark.parametrize("shard_format", ["npy", "pt"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_after_compact_neither_ids_nor_rows_are_in_any_file(
    tmp_path: Path, dtype: str, shard_format: str
) -> None:
    ids, rows = rows_of()
    ids = ids * 1_000_003 + 123_456_789  # so that their bytes occur by no accident
    with writer(tmp_path, dtype=dtype, shard_format=shard_format) as building:
        for part in range(0, len(ids), 4):
            building.append(ids[part : part + 4], rows[part : part + 4])
    store = ProjectionStore.open(tmp_path)
    stored = [store._shards.values(i) for i in range(len(store._shards.shards))]
    bits = torch.cat(stored).view(torch.uint8).numpy()
    gone = [3, 4, 20]
    store.delete(ids[gone])

    def traces() -> set[int]:
        whole = b"".join(contents(tmp_path).values())
        return {
            row for row in gone
            if ids[row].numpy().tobytes() in whole
            or str(int(ids[row])).encode() in whole
            or bits[row].tobytes() in whole
            or bits[row][4:12].tobytes() in whole
        }  # fmt: skip

    assert traces() == set(gone)
    store.compact()
    assert traces() == set()
    kept = np.setdiff1d(np.arange(len(ids)), gone)
    for seen in (store, ProjectionStore.open(tmp_path)):
        seen.verify()
        np.testing.assert_array_equal(seen.sample_ids, ids[kept])
        again = torch.cat([seen._shards.values(i) for i in range(len(seen._shards.shards))])
        np.testing.assert_array_equal(again.view(torch.uint8).numpy(), bits[kept])


def test_only_the_shards_concerned_are_written_anew(tmp_path: Path) -> None:
    store = built(tmp_path)
    ids, _ = rows_of()
    before = contents(tmp_path)
    store.delete(ids[:1])
    store.compact()
    after = contents(tmp_path)
    assert {name for name in before if name not in after} == {
        f"{kind}-r0-000000.npy" for kind in ("shard", "ids", "norms")
    }
    unchanged = set(before) & set(after) - {"manifest.json"}
    assert {name: before[name] for name in unchanged} == {name: after[name] for name in unchanged}
    store.compact()
    assert contents(tmp_path) == after


def test_again_and_again_until_nothing_is_left(tmp_path: Path) -> None:
    store = built(tmp_path)
    ids, rows = rows_of()
    while len(store):
        first = store.sample_ids[:5]
        store.delete(torch.from_numpy(first.copy()))
        store.compact()
        np.testing.assert_array_equal(store.sample_ids, ids[len(ids) - len(store) :])
        np.testing.assert_array_equal(np.asarray(store.matrix()), rows[len(ids) - len(store) :])
    assert ProjectionStore.open(tmp_path).matrix().shape == (0, rows.shape[1])
    assert set(contents(tmp_path)) == {".lock", "manifest.json"}
    assert writer(tmp_path).next_batch == BATCHES


@pytest.mark.parametrize("ids", ["12", [3.7], 3, [True, False]])
def test_only_whole_numbers_are_ids(tmp_path: Path, ids: Any) -> None:
    store = built(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match="should be several whole numbers"):
        store.delete(ids)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("maps_first", [True, False])
def test_a_store_that_is_compacted_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maps_first: bool
) -> None:
    """Neither are deleted samples back because their tombstones have just gone, nor are files missed."""
    store = built(tmp_path)
    ids, _ = rows_of()
    store.delete(ids[:2])
    real = store_module.Shards

    def while_compacting(*args: Any) -> Any:
        monkeypatch.setattr(store_module, "Shards", real)
        mapped = real(*args) if maps_first else None
        store.compact()
        return mapped or real(*args)

    monkeypatch.setattr(store_module, "Shards", while_compacting)
    np.testing.assert_array_equal(ProjectionStore.open(tmp_path).sample_ids, ids[2:])


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_a_search_notices_that_another_process_has_compacted(tmp_path: Path, metric: str) -> None:
    store, other = built(tmp_path), ProjectionStore.open(tmp_path)
    ids, rows = rows_of()
    store.delete(ids[:2])
    store.compact()
    found, _ = other.search(rows[:3], len(ids) - 2, metric)
    assert not np.isin(found, ids[:2]).any()


def test_all_rows_of_a_sample_go(tmp_path: Path) -> None:
    ids = [1, 2, 1, 3]
    with writer(tmp_path) as building:
        building.append(ids, torch.randn(4, rows_of()[1].shape[1]))
    store = ProjectionStore.open(tmp_path)
    store.delete([1])
    assert store.sample_ids.tolist() == [2, 3]


def test_another_process_has_deleted_in_the_meantime(tmp_path: Path) -> None:
    store = built(tmp_path)
    ids, rows = rows_of()
    ProjectionStore.open(tmp_path).delete(ids[:2])
    store.delete(ids[2:3])
    np.testing.assert_array_equal(store.sample_ids, ids[3:])
    other = ProjectionStore.open(tmp_path)
    store.compact()
    np.testing.assert_array_equal(np.asarray(other.matrix()), rows[3:])  # its maps outlive the files
    other.compact()
    np.testing.assert_array_equal(np.asarray(other.matrix()), rows[3:])
