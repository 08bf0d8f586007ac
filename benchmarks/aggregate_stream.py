"""How fast the score rows of a long run are aggregated, and in how much memory.

`python -m benchmarks.aggregate_stream [--rows 2e7] [--rounds 3]`: a synthetic run of real shards of 2^20
rows, as a run writes them (float32 scores, 36 bytes a row), 64 rows a step, of a million samples in five
domains.
All of its tables are made, none is written, in turn with a plain `torch.load` of the same files. A run of
`--rows 1e9` takes 36 GB of disk, more than the system's cache holds; the files are removed at the end.
"""

import argparse
import resource
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from analysis.aggregate.command import aggregate_runs
from analysis.runs import Run, load_run
from benchmarks.common import Ratio, interleave, report

SHARD_ROWS, BATCH, DOMAINS = 2**20, 64, 5
CONFIG = "engine: {name: graddotprod}\noptimizer: {name: adamw}\nseed: 0\n"


def make_run(folder: Path, rows: int, samples: int) -> Run:
    """A run of so many score rows, in whole shards."""
    (folder / "scores").mkdir()
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    rng = np.random.default_rng(0)
    seen = np.zeros(samples, dtype=np.int64)
    for number in range(rows // SHARD_ROWS):
        sample = rng.integers(0, samples, SHARD_ROWS)
        np.add.at(seen, sample, 1)
        first = number * (SHARD_ROWS // BATCH)
        shard = {
            "step": torch.arange(first, first + SHARD_ROWS // BATCH).repeat_interleave(BATCH),
            "sample": torch.from_numpy(sample),
            "score": torch.from_numpy(rng.standard_normal(SHARD_ROWS, dtype=np.float32)),
            "lr": torch.full((SHARD_ROWS,), 1e-3, dtype=torch.float64),
            "clip": torch.ones(SHARD_ROWS, dtype=torch.float64),
        }
        torch.save(shard, folder / "scores" / f"shard-{number:05d}.pt")
    ids = pa.array([f"corpus/{i % DOMAINS}.jsonl#{i}" for i in range(samples)])
    domains = pa.array([f"domain {i % DOMAINS}" for i in range(samples)])
    pq.write_table(
        pa.table({"index": np.arange(samples), "sample_id": ids, "domain": domains}),
        folder / "samples.parquet",
    )
    values = {"sample_id": ids, "domain": domains, "value": np.zeros(samples), "times_seen": seen}
    pq.write_table(pa.table(values), folder / "values.parquet")  # only its counts are looked at
    return load_run(folder)


def read_plainly(run: Run) -> None:
    """Load one shard after the other."""
    for path in run.shards():
        torch.load(path, weights_only=True)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=float, default=2e7)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    shards = max(1, round(args.rows / SHARD_ROWS))
    rows = shards * SHARD_ROWS
    with TemporaryDirectory() as folder:
        run = make_run(Path(folder), rows, args.samples)
        calls = {
            "aggregate": lambda: aggregate_runs([load_run(run.directory)], steps=None, points=1000),
            "plain read": lambda: read_plainly(run),
        }
        seconds = interleave(calls, args.rounds, warmup=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table: list[dict[str, object]] = [
        {
            "rows": f"{rows:.3g}",
            "steps": rows // BATCH,
            "samples": args.samples,
            "seconds": f"{np.median(seconds['aggregate']):.1f}",
            "million rows/s": f"{rows / np.median(seconds['aggregate']) / 1e6:.2f}",
            # A rate is the inverse of a time.
            "rate / plain read's": Ratio.of(seconds["plain read"], seconds["aggregate"]),
            "peak memory of the process, GiB": f"{peak:.2f}",
        }
    ]
    report("aggregate_stream", list(table[0]), table)


if __name__ == "__main__":
    main()
