"""What exact search costs against one NumPy matmul over the same memory-mapped rows.

`python -m benchmarks.store_search [--rows 131072] [--width 2048] [--rounds 7]`: float32 rows in one shard and
in many; 1, 16 and 256 queries; the ten best of each. Search ranks as well and, by cosine, divides by the
rows' lengths; the matmul, the faster of `matrix @ queries.T` and `queries @ matrix.T`, gives inner products.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.common import Ratio, interleave, report
from ghost.layout import Layout
from ghost.store import ProjectionStore, StoreWriter

BATCH = 256
MATMULS = ("matrix @ queries.T", "queries @ matrix.T")


def build(directory: Path, rows: int, width: int, shards: int) -> ProjectionStore:
    """A store of random rows."""
    layout = Layout.of([(f"layer{i}.weight", (64, width), (4, width // 16)) for i in range(4)])
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(directory, layout, {}, {}, batches_per_shard=rows // BATCH // shards) as writer:
        for start in range(0, rows, BATCH):
            writer.append(torch.arange(start, start + BATCH), torch.randn(BATCH, width, generator=generator))
    return ProjectionStore.open(directory)


def measured(one: ProjectionStore, many: ProjectionStore, count: int, rounds: int) -> dict[str, object]:
    """One row of the table: the times of `count` queries."""
    matrix = one.matrix()
    queries = np.random.default_rng(1).standard_normal((count, matrix.shape[1])).astype(np.float32)
    times = interleave(
        {
            MATMULS[0]: lambda: matrix @ queries.T,
            MATMULS[1]: lambda: queries @ matrix.T,
            "inner product": lambda: one.search(queries, 10, "inner_product"),
            "cosine": lambda: one.search(queries, 10),
            "cosine, 64 shards": lambda: many.search(queries, 10),
        },
        rounds,
        settle=0.3,
    )
    matmul = min((times.pop(name) for name in MATMULS), key=np.median)
    return {"queries": count, "matmul, GB/s": round(matrix.nbytes / np.median(matmul) / 1e9, 1)} | {
        f"{name} / matmul": Ratio.of(seconds, matmul) for name, seconds in times.items()
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=131072)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        one = build(Path(folder) / "one", args.rows, args.width, 1)
        many = build(Path(folder) / "many", args.rows, args.width, 64)
        results = [measured(one, many, count, args.rounds) for count in (1, 16, 256)]
    report("store_search", list(results[0]), results)


if __name__ == "__main__":
    main()
