"""A store of projected gradients: opened memory-mapped, searched exactly, rid of samples on request."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghost.errors import StoreError, shown
from ghost.layout import Layout
from ghost.store.approximate import approximate_search
from ghost.store.assembly import assembled, journals
from ghost.store.deletion import compact, read_deleted, write_deleted
from ghost.store.files import changing, check_bytes, writing
from ghost.store.manifest import NAME, Contents, Manifest, difference
from ghost.store.matrix import StoredMatrix
from ghost.store.search import Queries, exact_search, row_divisors, slice_weights
from ghost.store.shards import Shards

log = logging.getLogger(__name__)


class ProjectionStore:
    """Rows of projected gradients on disk. Made by `open`.

    Attributes:
        directory: The folder.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._load()

    @classmethod
    def open(cls, directory: str | Path) -> "ProjectionStore":
        """Open a folder, memory-mapped. One that is still being written shows what is safe so far.

        Raises:
            StoreError: It holds no store, or one that is damaged or of another version.
        """
        store = cls(Path(directory))
        if not store.complete:
            log.warning("%s is not complete: its %d rows are what is safe so far.", directory, len(store))
        return store

    def __len__(self) -> int:
        return len(self._shards) if self._living is None else len(self._living)

    @property
    def layout(self) -> Layout:
        """What the columns are."""
        return self._manifest.facts.layout

    @property
    def projection(self) -> Mapping[str, Any]:
        """How the columns were made."""
        return self._manifest.facts.projection

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of the model's weights, the data and the configuration."""
        return self._manifest.facts.fingerprints

    @property
    def dtype(self) -> str:
        """The rows' format on disk."""
        return self._manifest.facts.dtype

    @property
    def complete(self) -> bool:
        """Whether all ranks have written all their batches."""
        return self._manifest.contents is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all files that hold rows."""
        return sum(file.size for file in self._contents.files)

    @property
    def sample_ids(self) -> np.ndarray:
        """`[N]` int64: the rows' samples, in stored order. A sample that was seen twice is there twice."""
        return self._shards.ids if self._living is None else self._shards.ids[self._living]

    def matrix(self) -> np.memmap | StoredMatrix:
        """The rows `[N, K]`.

        The read-only memory map itself where they are a single `.npy` file of float32 or float16 of which no
        row is deleted, else something that reads like it.
        """
        facts, files = self._manifest.facts, self._shards.shards
        plain = facts.shard_format == "npy" and facts.dtype in ("float32", "float16")
        if not plain or len(files) != 1 or self._living is not None:
            return StoredMatrix(self._shards, self._living)
        return np.load(self.directory / files[0].files[0].name, mmap_mode="r")

    def search(
        self, queries: Tensor | np.ndarray, k: int, metric: str = "cosine",
        weights: Mapping[str, float] | None = None, sample_ids: Iterable[int] | None = None,
        faiss: str | None = None, block_rows: int | None = None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """The k best rows of each query, best first, equal ones in stored order.

        Args:
            queries: `[q, K]`, projected as the store's rows are (see `check_matches`).
            k: How many of the rows searched; not more than there are.
            metric: `cosine`, or `inner_product`. The cosine of a row of zeros is 0.
            weights: Factors of the parameters' parts of the inner product, by patterns of parameters or of
                layers (`ghost.patterns`); the last match counts, and 1 where none does.
            sample_ids: Search only these samples; None for all.
            faiss: Find the rows with this FAISS index (`IVF256,Flat;nprobe=16`) and score them exactly. It
                is built once and kept in the store's folder. Rows that it misses are missing.
            block_rows: Rows that are scored at a time; None for a choice by size.

        Returns:
            Ids `[q, k]` int64 and scores `[q, k]` float32; tensors for a tensor, else arrays.

        Raises:
            StoreError: The queries, k, a pattern, an id or a metric do not fit.
        """
        if self._stamp() != self._read_stamp:  # another process has compacted the files away
            self._load()
        asked = Queries.of(torch.as_tensor(queries), metric, slice_weights(weights, self.layout), self.layout)
        allowed = self._allowed(sample_ids)
        count = len(self._shards) if allowed is None else int(allowed.sum())
        if not count:
            raise StoreError(f"{self.directory}: there are no rows to search.")
        if type(k) is not int or not 1 <= k <= count:
            raise StoreError(
                f"k is {shown(k)}: it should be between 1 and {count}, the rows that are searched."
            )
        if block_rows is not None and (type(block_rows) is not int or block_rows < 1):
            raise StoreError(f"block_rows is {shown(block_rows)}: it should be a whole number, 1 or more.")
        divisors = self._row_divisors(asked.weights) if metric == "cosine" else None
        if faiss is None:
            numbers, scores = exact_search(self._shards, asked, k, divisors, allowed, block_rows)
        else:
            numbers, scores = approximate_search(
                self._shards, asked, k, divisors, allowed, faiss, self._contents.generation, self.complete
            )
        ids = self._shards.ids[numbers.numpy()]
        return (torch.from_numpy(ids), scores) if isinstance(queries, Tensor) else (ids, scores.numpy())

    def check_matches(
        self, layout: Layout, projection: Mapping[str, Any], fingerprints: Mapping[str, str]
    ) -> None:
        """Compare what queries were made with; only the fingerprints given are compared.

        Raises:
            StoreError: Names the first thing that differs.
        """
        facts = self._manifest.facts
        mine = {name: facts.fingerprints[name] for name in fingerprints if name in facts.fingerprints}
        there = type(facts)(facts.layout, facts.projection, mine, "float32", "npy", 1, 1).described()
        here = type(facts)(layout, projection, fingerprints, "float32", "npy", 1, 1).described()
        differs = difference(there, here)
        if differs is not None:
            raise StoreError(f"{self.directory} does not fit these queries, for {differs}.")

    def delete(self, sample_ids: Iterable[int]) -> None:
        """Delete samples: no answer has them from now on. `compact` removes their bytes.

        Raises:
            StoreError: The store is not complete, or has no such samples; nothing is deleted then.
        """
        ids = _distinct(sample_ids)
        with writing(self.directory, "the list of deleted samples"), changing(self.directory):
            contents = self._reloaded("delete")
            self._check_known(ids)
            deleted = read_deleted(self.directory, contents.generation)
            if len(ids):
                write_deleted(self.directory, contents.generation, np.concatenate([deleted, ids]))
            self._load()

    def compact(self) -> None:
        """Remove the bytes of deleted samples, and files that interrupted work has left.

        Shards that hold deleted samples are written anew; indexes are built again when next asked for.

        Raises:
            StoreError: The store is not complete.
        """
        with writing(self.directory, "the store without deleted samples"), changing(self.directory):
            contents = self._reloaded("compact")
            deleted = read_deleted(self.directory, contents.generation)
            compact(self.directory, self._manifest, contents, deleted)
            self._load()

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            StoreError: Names the first file that is not what was written.
        """
        for file in self._contents.files:
            check_bytes(self.directory, file)

    def _load(self) -> None:
        """Read what is there, and again where the manifest is replaced meanwhile: its files are removed then,
        tombstones among them.
        """
        while True:
            stamp = self._stamp()
            try:
                self._read()
            except StoreError:
                if self._stamp() == stamp:
                    raise
                continue
            if self._stamp() == stamp:
                self._read_stamp = stamp
                return

    def _stamp(self) -> tuple[int, int] | None:
        """What tells one manifest from another that has replaced it; None where there is none."""
        try:
            found = (self.directory / NAME).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_ino, found.st_mtime_ns

    def _read(self) -> None:
        self._manifest = Manifest.read(self.directory)
        facts = self._manifest.facts
        self._contents: Contents = self._manifest.contents or assembled(journals(self.directory, facts))
        self._shards = Shards(self.directory, facts, self._contents)
        self._divisors: dict[tuple[float, ...], Tensor] = {}
        self._living: np.ndarray | None = None
        deleted = read_deleted(self.directory, self._contents.generation)
        if len(deleted):
            self._living = np.flatnonzero(~np.isin(self._shards.ids, deleted))

    def _reloaded(self, what: str) -> Contents:
        """The contents as they are on disk, where another process may have changed them."""
        self._load()
        if not self.complete:
            raise StoreError(
                f"{self.directory} is not complete: finish building it before you {what} samples."
            )
        return self._contents

    def _check_known(self, ids: np.ndarray) -> None:
        unknown = ids[~np.isin(ids, self.sample_ids)]
        if len(unknown):
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise StoreError(
                f"{self.directory} has no samples {', '.join(map(str, unknown[:3]))}{more}: "
                "nothing was done; give ids of sample_ids."
            )

    def _allowed(self, sample_ids: Iterable[int] | None) -> Tensor | None:
        """Which rows `[N]` are searched; None for all."""
        if sample_ids is None and self._living is None:
            return None
        allowed = np.ones(len(self._shards), bool)
        if self._living is not None:
            allowed[:] = False
            allowed[self._living] = True
        if sample_ids is not None:
            ids = _distinct(sample_ids)
            self._check_known(ids)
            allowed &= np.isin(self._shards.ids, ids)
        return torch.from_numpy(allowed)

    def _row_divisors(self, weights: Tensor) -> Tensor:
        key = tuple(weights.tolist())
        if key not in self._divisors:
            self._divisors[key] = row_divisors(self._shards, weights)
        return self._divisors[key]


def _distinct(sample_ids: Iterable[int]) -> np.ndarray:
    """The ids, each once, rising.

    Raises:
        StoreError: They are not whole numbers; digits of a text or entries of a mask are not taken for ids.
    """
    given = sample_ids.cpu().numpy() if isinstance(sample_ids, Tensor) else sample_ids
    several = isinstance(given, Iterable) and not isinstance(given, np.ndarray | str)
    ids = np.asarray(list(given) if several else given)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise StoreError(f"sample_ids are {shown(sample_ids)}: they should be several whole numbers.")
    return np.unique(ids.astype(np.int64))
