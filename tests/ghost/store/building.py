"""Stores for tests: what their rows are, how they are built, and processes that die while they build."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost.layout import Layout
from ghost.store import ProjectionStore, StoreWriter

LAYOUT = Layout.of(
    [
        ("h.0.attn.weight", (10, 12), (3, 4)),
        ("h.0.attn.bias", (10, 1), (3, 1)),
        ("h.1.mlp.weight", (8, 8), (2, 3)),
    ]
)
PROJECTION = {"kind": "gaussian", "seed": 0, "version": 1, "rank_total": 12, "rank_min": 2}
FINGERPRINTS = {"model": "a1", "data": "b2", "config": "c3"}
BATCHES = 11


def batch(number: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Ids `[n]` and rows `[n, K]` of a batch; sizes differ, and one batch is empty."""
    n = (4, 3, 0, 5)[number % 4]
    generator = torch.Generator().manual_seed(1000 * rank + number)
    ids = 10_000 * rank + 100 * number + torch.arange(n)
    return ids, torch.randn(n, LAYOUT.width, generator=generator)


def rows_of(ranks: int = 1, batches: int = BATCHES) -> tuple[Tensor, Tensor]:
    """Ids `[N]` and rows `[N, K]` of a whole store."""
    parts = [batch(number, rank) for rank in range(ranks) for number in range(batches)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([rows for _, rows in parts])


def writer(directory: Path, **changes: Any) -> StoreWriter:
    """A writer with three batches a shard."""
    facts = {
        "layout": LAYOUT, "projection": PROJECTION, "fingerprints": FINGERPRINTS, "batches_per_shard": 3,
    }  # fmt: skip
    return StoreWriter(directory, **(facts | changes))


def build(directory: Path, pause: float = 0, batches: int = BATCHES, rank: int = 0, **changes: Any) -> None:
    """Build a rank's part to its end, from wherever it was left."""
    with writer(directory, rank=rank, **changes) as going_on:
        for number in range(going_on.next_batch, batches):
            going_on.append(*batch(number, rank))
            time.sleep(pause)


def built(directory: Path, **changes: Any) -> ProjectionStore:
    """A store of one rank."""
    build(directory, **changes)
    return ProjectionStore.open(directory)


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def dying(call: int, work: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Do some work in a process that kills itself just before its n-th change of a file.

    A write to the journal is cut in the middle.
    """
    made = 0

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call_or_die(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == call:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call_or_die

    for name in ("replace", "fsync", "write", "ftruncate", "unlink"):
        setattr(os, name, counted(name))
    work(*args, **kwargs)
