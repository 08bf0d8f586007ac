"""A store's matrix reads like the array of its rows."""

from pathlib import Path

import numpy as np
import pytest

from ghost.errors import StoreError
from ghost.store.matrix import StoredMatrix
from tests.ghost.store.building import built, rows_of

INDEXES = [
    0, -1, 5, slice(None), slice(2, 19), slice(-3, None), slice(9, 3), slice(20, 2, -3), slice(0, 99),
    np.array([3, 31, 3, -2]), [8, 1], np.arange(32) % 3 == 0, np.array([], int), np.array([[1, 2], [3, 4]]),
]  # fmt: skip


@pytest.mark.parametrize("deleted", [[], [100, 301]])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_reads_like_an_array(tmp_path: Path, dtype: str, deleted: list[int]) -> None:
    store = built(tmp_path, dtype=dtype, batches_per_shard=2)
    store.delete(deleted)
    ids, rows = rows_of()
    expected = rows.numpy()[~np.isin(ids, deleted)]
    matrix = store.matrix()
    assert isinstance(matrix, StoredMatrix)
    assert (matrix.shape, matrix.ndim, matrix.dtype, len(matrix)) == (
        expected.shape,
        2,
        np.float32,
        len(expected),
    )
    whole = np.asarray(matrix)
    np.testing.assert_allclose(whole, expected, atol=0 if dtype == "float32" else 0.02)
    for index in INDEXES:
        chosen = index[: len(whole)] if isinstance(index, np.ndarray) and index.dtype == bool else index
        if isinstance(index, np.ndarray) and index.dtype != bool:
            chosen = np.clip(index, -len(whole), len(whole) - 1)
        np.testing.assert_array_equal(matrix[chosen], whole[chosen])
    np.testing.assert_array_equal(np.concatenate(list(matrix.blocks(5))), whole)
    np.testing.assert_allclose(matrix @ whole[0], whole @ whole[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(matrix @ whole.T, whole @ whole.T, rtol=1e-5, atol=1e-5)
    assert np.asarray(matrix, dtype=np.float64).dtype == np.float64
    matrix[:2][:] = 0  # a copy
    np.testing.assert_array_equal(np.asarray(matrix), whole)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_shard_is_the_memory_map_itself(tmp_path: Path, dtype: str) -> None:
    store = built(tmp_path, dtype=dtype, batches_per_shard=64)
    matrix = store.matrix()
    assert isinstance(matrix, np.memmap)
    assert matrix.dtype == dtype
    np.testing.assert_array_equal(matrix, rows_of()[1].numpy().astype(dtype))
    with pytest.raises(ValueError, match="read-only"):
        matrix[0] = 0
    store.delete([0])
    assert isinstance(store.matrix(), StoredMatrix)
    store.compact()
    assert isinstance(store.matrix(), np.memmap)


def test_refuses_columns_and_rows_that_are_not_there(tmp_path: Path) -> None:
    matrix = built(tmp_path).matrix()
    with pytest.raises(StoreError, match=r"matrix\[0, 1\]: a store is read by rows"):
        matrix[0, 1]
    with pytest.raises(IndexError):
        matrix[32]
    with pytest.raises(ValueError, match="copy=False"):
        np.array(matrix, copy=False)
