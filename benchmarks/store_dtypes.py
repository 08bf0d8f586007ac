"""What storing rows in fewer bits costs in recall and in inner products, against float32.

`python -m benchmarks.store_dtypes [--store FOLDER] [--queries 200]`: rows of a float32 store, or synthetic
ones whose slices differ in length by three orders of magnitude and whose entries have heavy tails, as in
gradients. Queries are float32 rows of the store, which do not count as their own neighbours. Errors are
relative to the root mean square of the float32 inner products.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.common import report
from ghost.layout import Layout
from ghost.store import ProjectionStore, StoreWriter

DTYPES = ("float32", "float16", "bfloat16", "int8")
K = 10


def synthetic(directory: Path, n: int = 8192) -> ProjectionStore:
    """Rows in 64 loose clusters, of 48 slices of 64 columns."""
    layout = Layout.of([(f"layer{i}.weight", (64, 64), (8, 8)) for i in range(48)])
    random = np.random.default_rng(0)
    lengths = 10 ** random.uniform(-3, 0, len(layout.slices))
    centres = random.standard_t(4, (64, layout.width))
    rows = centres[random.integers(0, 64, n)] + random.standard_t(4, (n, layout.width))
    rows *= np.repeat(lengths, 64) * 10 ** random.normal(0, 0.3, (n, 1))
    return stored(directory, layout, np.arange(n), rows.astype(np.float32), "float32")


def stored(directory: Path, layout: Layout, ids: np.ndarray, rows: np.ndarray, dtype: str) -> ProjectionStore:
    """The rows in a format."""
    with StoreWriter(directory, layout, {}, {}, dtype=dtype) as writer:
        for start in range(0, len(rows), 256):
            writer.append(
                torch.from_numpy(ids[start : start + 256]), torch.from_numpy(rows[start : start + 256])
            )
    return ProjectionStore.open(directory)


def neighbours(store: ProjectionStore, queries: np.ndarray, own: np.ndarray, metric: str) -> list[set[int]]:
    """The K nearest of each query but itself."""
    found, _ = store.search(queries, K + 1, metric)
    return [set(row[row != i][:K].tolist()) for row, i in zip(found, own, strict=True)]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--queries", type=int, default=200)
    args = parser.parse_args()
    results: list[dict[str, object]] = []
    with TemporaryDirectory() as folder:
        given = ProjectionStore.open(args.store) if args.store else synthetic(Path(folder) / "rows")
        rows = np.array(given.matrix()[:], dtype=np.float32)
        numbers = np.arange(len(rows))  # ids may repeat, numbers do not
        own = np.linspace(0, len(rows) - 1, args.queries).astype(int)
        exact = rows[own].astype(np.float64) @ rows.T.astype(np.float64)
        plain: dict[str, list[set[int]]] = {}
        for dtype in DTYPES:
            store = stored(Path(folder) / dtype, given.layout, numbers, rows, dtype)
            products = np.asarray(store.matrix() @ rows[own].T).T
            row: dict[str, object] = {
                "dtype": dtype,
                "MB": round(store.nbytes / 1e6, 1),
                "rms error": f"{np.sqrt(np.mean((products - exact) ** 2) / np.mean(exact**2)):.1e}",
            }
            for metric in ("cosine", "inner_product"):
                found = neighbours(store, rows[own], own, metric)
                kept = [len(a & b) for a, b in zip(found, plain.setdefault(metric, found), strict=True)]
                row[f"recall@{K}, {metric}"] = round(float(np.mean(kept)) / K, 4)
            results.append(row)
    report("store_dtypes", list(results[0]), results)


if __name__ == "__main__":
    main()
