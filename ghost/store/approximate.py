"""Search by a FAISS index: approximate in which rows it finds, exact in their scores."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghost.atomic import sync
from ghost.errors import StoreError
from ghost.store.files import changing, writing
from ghost.store.manifest import Manifest
from ghost.store.search import Queries, spread, top
from ghost.store.shards import Shards

_TRAINING_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 26


def approximate_search(
    shards: Shards, queries: Queries, k: int, divisors: Tensor | None, allowed: Tensor | None, index: str,
    generation: int, complete: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Numbers `[q, k]` of rows that the index finds and their exact scores `[q, k]` float32, best first.

    Args:
        divisors: `[N]` float32, for cosine (see `row_divisors`).
        allowed: `[N]` bool, the rows to search; None for all.
        index: As FAISS describes indexes, and behind a `;` its search parameters.
        generation: Of the store; an index is of one generation.
        complete: Whether the store is.

    Raises:
        StoreError: FAISS is missing or refuses the description, the index finds too few rows, or the store is
            not complete.
    """
    try:
        import faiss  # an extra
    except ImportError as error:
        raise StoreError("search(faiss=...) needs FAISS: pip install 'ghostrunner[faiss]'.") from error
    if not complete:
        raise StoreError(f"{shards.directory} is not complete: finish building it before you index it.")
    description, _, parameters = index.partition(";")
    rows = _IndexedRows(shards, spread(queries.weights, shards.facts.layout).sqrt(), divisors)
    try:
        built = _index(faiss, rows, queries, description, generation)
        if parameters:
            space: Any = faiss.ParameterSpace()  # its stub knows one of several signatures
            space.set_index_parameters(built, parameters)
        _, found = built.search(rows.met_by(queries), k, params=_filter(faiss, built, allowed))
    except RuntimeError as error:  # what all of FAISS's refusals are
        reason = str(error).rpartition("Error: ")[2].strip() or str(error)
        raise StoreError(f"faiss={index!r} is refused by FAISS: {reason}") from error
    if (found < 0).any():
        raise StoreError(
            f"faiss={index!r} finds fewer than {k} rows for query {int((found < 0).any(1).argmax())}: search "
            "more of it, as with ';nprobe=32', or ask for fewer."
        )
    return _scored(shards, queries, divisors, torch.from_numpy(np.sort(found, axis=1)))


@dataclass(frozen=True)
class _IndexedRows:
    """The rows as an index holds them: times the roots of the weights, and for cosine with length 1.

    Attributes:
        shards: The rows.
        roots: `[K]` float64, the roots of the columns' weights.
        divisors: `[N]` float32, for cosine (see `row_divisors`).
    """

    shards: Shards
    roots: Tensor
    divisors: Tensor | None

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """The rows `[n, K]` float32 of some numbers `[n]`."""
        rows = self.shards.taken(numbers) * self.roots.float()
        if self.divisors is not None:
            rows /= self.divisors[torch.from_numpy(numbers), None]
        return rows.numpy()

    def met_by(self, queries: Queries) -> np.ndarray:
        """The queries `[q, K]` float32 whose inner products with these rows rank as the scores do."""
        # A direction carries its weights whole, of which the rows have the one root.
        divisors = torch.where(self.roots > 0, self.roots, 1)
        return (queries.directions / divisors).float().numpy()


def _index(faiss: Any, rows: _IndexedRows, queries: Queries, description: str, generation: int) -> Any:
    """The index of that description for these weights and metric, read from the folder or built into it."""
    what = json.dumps([description, queries.metric, queries.weights.tolist()])
    name = f"index-g{generation}-{hashlib.sha256(what.encode()).hexdigest()[:12]}.faiss"
    path = rows.shards.directory / name
    if path.exists():
        return faiss.read_index(str(path))
    count, width = len(rows.shards), rows.shards.width
    index = faiss.index_factory(width, description, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(rows.at(np.linspace(0, count - 1, min(count, _TRAINING_ROWS)).astype(np.int64)))
    step = max(1, _BLOCK_BYTES // (4 * width))
    for start in range(0, count, step):
        index.add(rows.at(np.arange(start, min(start + step, count))))
    partial = path.with_name(f".{name}.partial")
    with writing(path.parent, name), changing(path.parent):
        contents = Manifest.read(path.parent).contents
        if contents is None or contents.generation != generation:
            return index  # it holds rows that another process has compacted away: it is not kept
        faiss.write_index(index, str(partial))
        os.replace(partial, path)
        sync(path.parent)
    return index


def _filter(faiss: Any, index: Any, allowed: Tensor | None) -> Any:
    if allowed is None:
        return None
    selector = faiss.IDSelectorBatch(np.flatnonzero(allowed.numpy()))
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    return faiss.SearchParameters(sel=selector)


def _scored(
    shards: Shards, queries: Queries, divisors: Tensor | None, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """The exact scores of rows `[q, k]` in stored order, best first."""
    scores = torch.stack(
        [shards.taken(row.numpy()) @ query for row, query in zip(numbers, queries.directions, strict=True)]
    )  # [q, k]
    if divisors is not None:
        scores /= divisors[numbers]
    values, columns = top(scores, numbers.shape[1])
    return numbers.gather(1, columns), (values.double() * queries.lengths[:, None]).float()
