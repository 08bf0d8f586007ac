"""Which samples are used, and for what: choices that depend on ids and on the seed alone."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from runners.errors import DataError

log = logging.getLogger(__name__)

WindowKey = tuple[int, int]
"""A document's position in its list, and the number of the window in that document."""

# At most so many windows of one document are drawn while others are left, so that no long document prevails.
WINDOWS_PER_DOCUMENT = 4

# Validation is the same for every seed, so that the values of several seeds are credit for one objective.
VAL_SEED = 0

# The share of the documents that validation may take so as to spread over many of them.
VAL_FRACTION = 0.1


def stable_unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def in_stable_order(ids: Iterable[str], seed: int) -> list[int]:
    """The positions of the ids in a pseudo-random order that depends on the seed and on the ids themselves.

    Unlike a shuffled range, two ids keep their relative order when others are added or removed.
    """
    ranks = np.fromiter((stable_unit(f"{seed}\0{name}") for name in ids), dtype=np.float64)
    return np.argsort(ranks, kind="stable").tolist()


def draw(documents: Sequence[str], count: Callable[[int], int], needed: int, seed: int) -> list[WindowKey]:
    """Up to `needed` windows, in an order that the seed picks, spread over the documents.

    `documents` are the ids and `count(i)` is the number of windows of document i. It is called only for as
    many documents as are needed, in an order picked by the seed.
    """
    chosen: list[WindowKey] = []
    spare: list[WindowKey] = []
    for i in in_stable_order(documents, seed):
        order = in_stable_order((f"{documents[i]}#{k}" for k in range(count(i))), seed)
        keys = [(i, k) for k in order]
        chosen += keys[:WINDOWS_PER_DOCUMENT]
        spare += keys[WINDOWS_PER_DOCUMENT:]
        if len(chosen) >= needed:
            return chosen[:needed]
    order = in_stable_order((f"{documents[i]}#{k}" for i, k in spare), seed)
    return chosen + [spare[k] for k in islice(order, needed - len(chosen))]


def hold_out(documents: Sequence[str], count: Callable[[int], int], needed: int) -> list[int]:
    """The positions of the documents that are kept for validation, so that they hold `needed` windows.

    Documents are taken in an order that depends on their ids alone: as many as let `draw` spread the windows,
    but beyond a tenth of all documents only as many as hold enough windows.

    Raises DataError if no document would be left for training.
    """
    held: list[int] = []
    windows = spread = 0
    for i in in_stable_order(documents, VAL_SEED):
        held.append(i)
        windows += count(i)
        spread += min(count(i), WINDOWS_PER_DOCUMENT)
        if spread >= needed or (windows >= needed and len(held) >= VAL_FRACTION * len(documents)):
            break
    if windows < needed or len(held) == len(documents):
        raise DataError(
            f"data.val_samples={needed} leaves no document to train on: whole documents are kept for "
            f"validation, and there are {len(documents)} with few windows each; lower data.val_samples or "
            "data.seq_len, or bring more documents (a long text can be cut into several)."
        )
    return held


def choose(
    documents: Sequence[str],
    count: Callable[[int], int],
    train_samples: int | None,
    val_samples: int,
    seed: int,
    held: list[int] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation windows, each `[n, 2]` int64: rows (document, window), in the documents' order.

    Validation depends on the ids alone; `held` names its documents where the source marks them, else
    `hold_out` picks them. Training gets all windows of the other documents, or `train_samples` of them picked
    by the seed. `documents` and `count` are those of `draw`.

    Raises DataError if there are too few windows.
    """
    if held is None:
        held = hold_out(documents, count, val_samples)
    val = _drawn(documents, count, held, val_samples, VAL_SEED)
    if len(val) < val_samples:
        raise DataError(
            f"data.val_samples={val_samples} exceeds the {len(val)} windows marked for validation; lower it."
        )
    windows = sum(count(i) for i in held)
    if windows > len(val):
        log.info(
            "%d documents are kept for validation: %d of their %d windows are used, and none is trained on.",
            len(held),
            len(val),
            windows,
        )
    kept = np.ones(len(documents), dtype=bool)
    kept[held] = False
    rest: list[int] = np.flatnonzero(kept).tolist()
    if train_samples is None:
        return _all_windows(count, rest), val
    train = _drawn(documents, count, rest, train_samples, seed)
    if len(train) < train_samples:
        raise DataError(
            f"data.train_samples={train_samples} exceeds the {len(train)} windows there are beside "
            "validation's; lower it, or set it to null to use all."
        )
    return train, val


def _drawn(
    documents: Sequence[str], count: Callable[[int], int], among: list[int], needed: int, seed: int
) -> NDArray[np.int64]:
    keys = draw([documents[i] for i in among], lambda j: count(among[j]), needed, seed)
    return np.array(sorted((among[j], k) for j, k in keys), dtype=np.int64).reshape(-1, 2)


def _all_windows(count: Callable[[int], int], among: list[int]) -> NDArray[np.int64]:
    counts = np.array([count(i) for i in among], dtype=np.int64)
    firsts = np.cumsum(counts) - counts
    windows = np.arange(counts.sum()) - np.repeat(firsts, counts)
    return np.stack([np.repeat(among, counts), windows], axis=1)


def choose_rows(
    ids: Sequence[str],
    train_samples: int | None,
    val_samples: int,
    seed: int,
    held: Sequence[int] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation rows, each `[n]` int64 ascending, where every row is a sample.

    Validation depends on the ids alone: `val_samples` of the rows in `held` where the source marks them, else
    of all. Training gets all others that are not marked, or `train_samples` of them picked by the seed.

    Raises DataError if there are too few rows.
    """
    candidates = list(range(len(ids))) if held is None else list(held)
    order = in_stable_order((ids[i] for i in candidates), VAL_SEED)
    val = [candidates[k] for k in order[:val_samples]]
    if len(val) < val_samples:
        raise DataError(f"data.val_samples={val_samples} exceeds the {len(val)} rows there are; lower it.")
    if held is not None and len(held) > len(val):
        log.info("%d of the %d rows marked for validation are used.", len(val), len(held))
    taken = set(val) if held is None else set(held)
    rest = [i for i in range(len(ids)) if i not in taken]
    wanted = len(rest) if train_samples is None else train_samples
    if not rest or wanted > len(rest):
        raise DataError(
            f"data.train_samples={train_samples} and data.val_samples={val_samples} exceed the data: "
            f"{len(rest)} rows are left to train on; lower one of them."
        )
    train = [rest[k] for k in in_stable_order((ids[i] for i in rest), seed)[:wanted]]
    return np.sort(np.array(train, dtype=np.int64)), np.sort(np.array(val, dtype=np.int64))
