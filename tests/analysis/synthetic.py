"""Runs of random score rows, and what their aggregate should be, row by row in plain Python."""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from analysis.aggregate.command import aggregate_runs, with_values
from analysis.runs import load_run
from ghost.scores import ONE_COLUMN, Column
from ghost.values import accumulate, read_shards

CONFIG: dict[str, Any] = {
    "engine": {"name": "graddotprod"},
    "model": {"name": "gpt2-tiny"},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "dtype": {"model": "float32", "autocast": None},
    "seed": 0,
}
SETS = tuple(Column(part, group, val) for part in ("attn", "mlp") for group in (0, 1) for val in ("a", "b"))
PAIRS = tuple(Column(part, 0, f"pair {j}") for part in ("attn", "mlp") for j in range(2))
DOMAINS = ("code", "docs", "mail")
VAL_DOMAINS = ("docs", "docs", "code", "docs")
VAL_IN_TURN = ("val0", "val2", "val1", "val3")  # domains take turns


def write_run(
    path: Path,
    seed: int = 0,
    samples: int = 12,
    first_id: int = 0,
    shards: int = 4,
    columns: tuple[Column, ...] = ONE_COLUMN,
    **config: Any,
) -> Path:
    """Uneven shards, steps of uneven size that go on in the next shard, ties, samples that come twice in a
    step, rows that are not finite, steps that were not taken.
    """
    rng = np.random.default_rng(seed)
    (path / "scores").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"seed": seed} | config))
    offset = int(rng.integers(0, 5))
    ids = [f"sample {first_id + i}" for i in range(samples)]
    domains = [DOMAINS[(first_id + i) % 3] for i in range(samples)]
    table = {
        "index": np.arange(samples + len(VAL_DOMAINS)) + offset,
        "sample_id": [*ids, *(f"val{i}" for i in range(len(VAL_DOMAINS)))],
        "domain": [*domains, *VAL_DOMAINS],
        "split": ["train"] * samples + ["val"] * len(VAL_DOMAINS),
    }
    pq.write_table(pa.table(table), path / "samples.parquet")
    step = 0
    for number in range(shards):
        rows = int(rng.integers(1, 25))
        steps = step + np.cumsum(rng.random(rows) < 0.3)
        step = int(steps[-1])
        wide = (rows, len(columns)) if columns != ONE_COLUMN else (rows,)
        score = rng.normal(size=wide).round(1)
        score[rng.random(wide) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
        clip = torch.tensor(rng.choice([0.0, 0.5, 1.0], rows, p=[0.1, 0.3, 0.6]))
        shard = {
            "step": torch.tensor(steps),
            "sample": torch.tensor(rng.integers(0, samples - 1, rows) + offset),  # the last is never scored
            "score": torch.tensor(score, dtype=torch.float32),
            "lr": torch.tensor(rng.choice([1e-3, 1e-2], wide)),
            "clip": clip,
        }
        if columns == PAIRS:
            shard["val"] = torch.tensor(np.array([rng.permutation(4)[:2] for _ in range(rows)]))
        if columns != ONE_COLUMN:
            described = json.dumps([asdict(column) for column in columns])
            (path / "scores" / f"shard-{number:05d}.json").write_text(described)
        torch.save(shard, path / "scores" / f"shard-{number:05d}.pt")
    found = accumulate(read_shards(path / "scores"))
    rows_of = (found.sample - offset).tolist()
    values = {
        "sample_id": pa.array([ids[i] for i in rows_of], pa.string()),
        "domain": pa.array([domains[i] for i in rows_of], pa.string()),
        "value": found.value.numpy(),
        "times_seen": found.times_seen.numpy(),
    }
    pq.write_table(pa.table(values), path / "values.parquet")
    return path


def tables_of(
    *paths: Path, steps: tuple[int, int] | None = None, points: int = 1000, most_rows: int = 2**20
) -> dict[str, pa.Table]:
    """The aggregate of runs, named as their directories."""
    runs = with_values([load_run(path) for path in paths])
    found = aggregate_runs(runs, steps, points, most_rows)
    return {name: pa.concat_tables(parts) for name, parts in found.items()}


# ---------------------------------------------------------------- in plain Python


def plain_rows(path: Path, steps: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """The finite rows of a run: step, id, domain, value, and the value of each (part, val)."""
    samples = {row["index"]: row for row in pq.read_table(path / "samples.parquet").to_pylist()}
    rows = []
    for file in sorted((path / "scores").glob("shard-*.pt")):
        shard = {name: column.tolist() for name, column in torch.load(file, weights_only=True).items()}
        described = file.with_suffix(".json")
        columns = [Column(**one) for one in json.loads(described.read_text())] if described.exists() else []
        for i, step in enumerate(shard["step"]):
            score, lr, clip = shard["score"][i], shard["lr"][i], shard["clip"][i]
            scores, rates = (score, lr) if columns else ([score], [lr])
            parts = [0.0 if clip == 0 else s * r * clip for s, r in zip(scores, rates, strict=True)]
            value = math.fsum(parts) if all(map(math.isfinite, parts)) else math.nan
            if not math.isfinite(value) or (steps and not steps[0] <= step <= steps[1]):
                continue
            by_column: dict[tuple[str, str], float] = defaultdict(float)
            for k, column in enumerate(columns):
                val = VAL_IN_TURN[shard["val"][i][k % 2]] if "val" in shard else column.val
                by_column[column.part, val] += parts[k]
            sample = samples[shard["sample"][i]]
            rows.append(
                {"step": step, "id": sample["sample_id"], "domain": sample["domain"], "value": value}
                | {"columns": by_column}
            )
    return rows


def share(value: float, others: list[float]) -> float:
    """The average rank's share of a value among others, of which it is one."""
    below, same = sum(o < value for o in others), sum(o == value for o in others)
    return (below + same / 2) / len(others)


def plain_values(paths: list[Path], steps: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """The rows of `values`, in no order."""
    runs = [plain_rows(path, steps) for path in paths]
    totals = []
    for rows in runs:
        total: dict[str, float] = defaultdict(float)
        for row in rows:
            total[row["id"]] += row["value"]
        totals.append(total)
    domain_of = {row["id"]: row["domain"] for rows in runs for row in rows}
    found = []
    for name, domain in domain_of.items():
        own = [total[name] for total in totals if name in total]
        by_run = [[row["value"] for row in rows if row["id"] == name] for rows in runs]
        shares = [
            share(row["value"], [other["value"] for other in rows if other["step"] == row["step"]])
            for rows in runs for row in rows if row["id"] == name
        ]  # fmt: skip
        spread = sum(len(values) - 1 for values in by_run if values)
        squares = sum(statistics.pvariance(values) * len(values) for values in by_run if values)
        positive, negative = sum(v > 0 for v in own), sum(v < 0 for v in own)
        found.append(
            {
                "sample_id": name,
                "domain": domain,
                "value": statistics.fmean(own),
                "times_seen": sum(map(len, by_run)),
                "runs": len(own),
                "std": statistics.stdev(own) if len(own) > 1 else None,
                "low": min(own),
                "high": max(own),
                "run_rank": statistics.fmean(share(t[name], list(t.values())) for t in totals if name in t),
                "step_rank": statistics.fmean(shares),
                "step_std": math.sqrt(squares / spread) if spread else None,
                "positive": positive / len(own),
                "sign_stability": max(positive, negative) / len(own),
            }
        )
    ordered = sorted(found, key=lambda row: (-row["value"], row["sample_id"]))
    return [row | {"rank": i} for i, row in enumerate(ordered, start=1)]
