"""Search by FAISS: the same call, the same scores."""

import sys
import time
from pathlib import Path

import pytest
import torch

from ghost.errors import StoreError
from ghost.store import ProjectionStore
from tests.ghost.store.building import LAYOUT, batch, built, contents, rows_of, writer


def check_same(store: ProjectionStore, queries: torch.Tensor, **how: object) -> None:
    """An index that looks at every row gives the exact answer."""
    exact = store.search(queries, 5, **how)
    for index in ("Flat", "IVF4,Flat;nprobe=4"):
        found, scores = store.search(queries, 5, faiss=index, **how)
        assert torch.equal(found, exact[0])
        torch.testing.assert_close(scores, exact[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_an_index_of_all_rows_is_exact(tmp_path: Path, metric: str, dtype: str) -> None:
    store = built(tmp_path, dtype=dtype)
    ids, rows = rows_of()
    check_same(store, rows[:6], metric=metric)
    check_same(store, rows[:6], metric=metric, weights={"h.0.attn": 0.25, "*.mlp": 0.0})
    check_same(store, rows[:6], metric=metric, sample_ids=ids[::3])
    store.delete(ids[:4])
    check_same(store, rows[:6], metric=metric)
    store.compact()
    assert not list(tmp_path.glob("index*"))
    check_same(store, rows[:6], metric=metric)


def test_an_index_is_built_once(tmp_path: Path) -> None:
    store = built(tmp_path)
    _, rows = rows_of()
    first = store.search(rows, 3, faiss="Flat")
    kept = contents(tmp_path)
    assert len([name for name in kept if name.startswith("index-g0-")]) == 1
    again = ProjectionStore.open(tmp_path).search(rows, 3, faiss="Flat")
    assert torch.equal(first[0], again[0])
    assert contents(tmp_path) == kept


def test_an_index_of_rows_that_were_compacted_away_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, late = built(tmp_path), ProjectionStore.open(tmp_path)
    ids, rows = rows_of()
    store.delete(ids[:1])
    store.compact()
    monkeypatch.setattr(late, "_stamp", lambda: late._read_stamp)  # its search began before
    late.search(rows[:1], 1, "inner_product", faiss="Flat")
    assert not list(tmp_path.glob("index*"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("Nonsense", "faiss='Nonsense' is refused by FAISS"),
        ("Flat;nonsense=3", "is refused by FAISS"),
        ("IVF16,Flat;nprobe=1", "finds fewer than 30 rows for query 0"),
        ("PCA4,IVF4,Flat", "params have incorrect type"),
    ],
)
def test_refuses(tmp_path: Path, index: str, message: str) -> None:
    store = built(tmp_path)
    _, rows = rows_of()
    store.delete([0])
    with pytest.raises(StoreError, match=message):
        store.search(rows[:1], 30, faiss=index)


def test_only_complete_stores_are_indexed(tmp_path: Path) -> None:
    with writer(tmp_path, batches_per_shard=1) as building:
        building.append(*batch(0))
        while not building.next_batch:
            time.sleep(0.01)
        with pytest.raises(StoreError, match="finish building it before you index it"):
            ProjectionStore.open(tmp_path).search(torch.ones(1, LAYOUT.width), 1, faiss="Flat")


def test_without_faiss_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(StoreError, match=r"pip install 'ghostrunner\[faiss\]'"):
        built(tmp_path).search(torch.ones(1, LAYOUT.width), 1, faiss="Flat")
