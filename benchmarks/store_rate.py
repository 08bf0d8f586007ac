"""Whether a store is written as fast at its end as at its beginning.

`python -m benchmarks.store_rate [--gigabytes 6] [--builds 3]`: synthetic rows, 64 of 16 KiB a batch, 16
batches a shard. A tenth's rate is taken over its appends; the rows that wait in memory before the first shard
is written are left out. Time on the processor stands beside the wall's, which has the disk's moods in it, and
so do plain files of the same bytes, written and flushed one after the other: what the disk does by itself.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Ratio, report
from ghost.layout import Layout
from ghost.store import StoreWriter

WIDTH, BATCH, BATCHES_PER_SHARD, TENTHS = 4096, 64, 16, 10
Seconds = dict[str, np.ndarray]
"""Of each tenth `[10]`, by clock."""


def tenths(append: Callable[[int], None], batches: int, waiting: int) -> Seconds:
    """Seconds of each tenth of `batches` appends, after `waiting` others."""
    wall, processor = [], []
    for number in range(waiting + batches + 1):
        if number >= waiting and (number - waiting) % (batches // TENTHS) == 0:
            wall.append(time.perf_counter())
            processor.append(time.process_time())
        append(number)
    return {"wall": np.diff(wall), "processor": np.diff(processor)}


def store(directory: Path, rows: Tensor, batches: int) -> Seconds:
    """A store."""
    layout = Layout.of([(f"layer{i}.weight", (64, 256), (16, 16)) for i in range(WIDTH // 256)])
    ids = torch.arange(BATCH)
    with StoreWriter(directory, layout, {}, {}, batches_per_shard=BATCHES_PER_SHARD) as writer:
        return tenths(lambda n: writer.append(ids + n * BATCH, rows), batches, 2 * BATCHES_PER_SHARD)


def plain_files(directory: Path, rows: Tensor, batches: int) -> Seconds:
    """As many bytes in files of the same size."""
    shard = np.tile(rows.numpy(), (BATCHES_PER_SHARD, 1))

    def append(number: int) -> None:
        if number % BATCHES_PER_SHARD == BATCHES_PER_SHARD - 1:
            with (directory / f"{number}").open("wb") as file:
                file.write(shard.data)
                file.flush()
                os.fsync(file.fileno())

    return tenths(append, batches, 0)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--builds", type=int, default=3)
    args = parser.parse_args()
    shard = BATCHES_PER_SHARD * TENTHS
    batches = int(args.gigabytes * 1e9 / (4 * WIDTH * BATCH)) // shard * shard
    rows = torch.randn(BATCH, WIDTH)
    taken: dict[str, list[Seconds]] = {"store": [], "plain files": []}
    for _ in range(args.builds):
        for name, build in (("store", store), ("plain files", plain_files)):
            with TemporaryDirectory() as folder:
                taken[name].append(build(Path(folder), rows, batches))
    tenth = batches * BATCH * WIDTH * 4 / TENTHS
    table: list[dict[str, object]] = []
    for name, clock in (("store", "wall"), ("store", "processor"), ("plain files", "wall")):
        seconds = np.stack([build[clock] for build in taken[name]])  # [builds, 10]
        table.append(
            {
                "what": f"{name}, {clock}",
                "MB/s, tenth by tenth": " ".join(f"{r:.0f}" for r in tenth / 1e6 / np.median(seconds, 0)),
                # A rate is the inverse of a time.
                "first / last": Ratio.of(list(seconds[:, -1]), list(seconds[:, 0])),
                "first three / last three": Ratio.of(
                    list(seconds[:, -3:].sum(1)), list(seconds[:, :3].sum(1))
                ),
            }
        )
    report("store_rate", list(table[0]), table)


if __name__ == "__main__":
    main()
