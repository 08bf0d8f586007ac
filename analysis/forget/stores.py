"""Stores of projected gradients, whose `samples.parquet` says which row is whose."""

from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np
import pyarrow as pa

from analysis.errors import AnalysisError
from analysis.forget.artefact import Artefact
from analysis.forget.scores import indices_of
from analysis.forget.tables import ParquetTable
from ghost import ProjectionStore

SAMPLES = "samples.parquet"


def is_store(folder: Path) -> bool:
    """Whether a folder holds a store's rows; an uploaded manifest alone is none."""
    return (folder / "manifest.json").is_file() and any(folder.glob("shard-*"))


def read_samples(folder: Path) -> pa.Table:
    """The folder's `samples.parquet`, which says whose the running indices are.

    Raises:
        AnalysisError: It is damaged.
    """
    table = ParquetTable(folder / SAMPLES).read()
    if absent := sorted({"index", "sample_id", "domain"} - set(table.column_names)):
        raise AnalysisError(f"{folder / SAMPLES} is damaged: it has no column {absent[0]!r}.")
    return table


class Store(Artefact):
    """A store's folder. Deleting is a tombstone, and `compact` removes the rows."""

    def names(self) -> set[str]:
        return self._table().names()

    def forget(self, ids: Set[str]) -> None:
        table = self._table()
        if self.names() & ids:
            store = ProjectionStore.open(self.path)
            store.delete(np.intersect1d(indices_of(read_samples(self.path), ids), store.sample_ids))
        table.forget(ids)  # last: until then the same command finds the rows

    def compact(self) -> None:
        """Rewrite the store without deleted samples.

        Raises:
            StoreError: The store cannot be changed.
        """
        ProjectionStore.open(self.path).compact()

    def left(self, ids: Set[str]) -> Iterator[str]:
        yield from super().left(ids)
        store = ProjectionStore.open(self.path)
        known = read_samples(self.path)["index"].to_numpy()
        if len(unknown := np.setdiff1d(store.sample_ids, known)):
            yield f"has the row of sample {unknown[0]}, which has no name"
        if any(self.path.glob("deleted-*.npy")):
            yield "has rows of deleted samples until compact=true rewrites it"

    def refuse_unfinished(self) -> None:
        """Raises `AnalysisError` where the store is still being written, and cannot delete."""
        if not ProjectionStore.open(self.path).complete:
            raise AnalysisError(
                f"{self.path} is not complete, so nothing was deleted: finish building it before you delete "
                "samples."
            )

    def _table(self) -> ParquetTable:
        path = self.path / SAMPLES
        if not path.is_file():
            raise AnalysisError(
                f"{path} is missing, so it is not known whose the store's rows are: restore it, or delete by "
                "ghost.ProjectionStore.delete."
            )
        return ParquetTable(path)
