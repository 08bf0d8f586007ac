"""A store's rows, to be read like a NumPy array."""

from collections.abc import Iterator

import numpy as np

from ghost.errors import StoreError, shown
from ghost.store.shards import Shards

_BLOCK_BYTES = 1 << 25


class StoredMatrix:
    """The rows `[N, K]` of a store, read-only and float32; only the rows asked for are read and decoded.

    It is indexed by row: a number, a slice, an array of numbers or of booleans. `np.asarray` reads all rows,
    and `matrix @ other` as many at a time as fit into a block.

    Args:
        shards: The stored rows.
        living: Numbers `[N]` of those that are not deleted; None for all.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, shards: Shards, living: np.ndarray | None) -> None:
        self._shards, self._living = shards, living
        self.shape = (len(shards) if living is None else len(living), shards.width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray | list[int]) -> np.ndarray:
        """One row `[K]` for a number, rows `[..., K]` for anything else."""
        if isinstance(index, tuple):
            raise StoreError(
                f"matrix[{shown(index)[1:-1]}]: a store is read by rows; take matrix[rows][:, columns]."
            )
        if isinstance(index, slice) and index.step in (None, 1) and self._living is None:
            start, stop, _ = index.indices(len(self))
            return self._shards.decoded(start, max(start, stop)).numpy()
        numbers = np.arange(len(self)) if self._living is None else self._living
        chosen = np.asarray(numbers[index])
        return self._shards.taken(chosen.flatten()).numpy().reshape(*chosen.shape, self.shape[1])

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """All rows in order, `rows` at a time."""
        return (self[start : start + rows] for start in range(0, len(self), rows))

    def __matmul__(self, other: np.ndarray) -> np.ndarray:
        rows = max(1, _BLOCK_BYTES // (4 * self.shape[1]))
        return np.concatenate([block @ other for block in self.blocks(rows)] or [np.asarray(self) @ other])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a store's rows are decoded into new memory: copy=False cannot be had")
        return self[:].astype(dtype or self.dtype, copy=False)
