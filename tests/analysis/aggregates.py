"""A synthetic aggregate folder: the tables that several runs come to, worked out the plain way."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.domains import domain_trajectories
from analysis.runs import load_run


def build_aggregate(folder: Path, runs: Sequence[Path], columns: bool = False) -> Path:
    """Write the folder of these runs, whose names are their directories'."""
    folder.mkdir(parents=True)
    values = {path.name: pq.read_table(path / "values.parquet").to_pylist() for path in runs}
    _write(folder / "values.parquet", _values(values))
    _write(folder / "runs.parquet", [_run(path, values[path.name], seed) for seed, path in enumerate(runs)])
    _write(folder / "domains.parquet", [row for name, rows in values.items() for row in _domains(name, rows)])
    _write(folder / "trajectories.parquet", [row for path in runs for row in _trajectories(path)])
    pairs = [_pair(a, b, values[a], values[b]) for a, b in combinations(values, 2)]
    _write(folder / "correlations.parquet", pairs or [_pair("", "", [], [])])
    if columns:
        _write(
            folder / "columns.parquet", [row for name, rows in values.items() for row in _columns(name, rows)]
        )
    return folder


def _write(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def _shares(found: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(found)) / max(found.size - 1, 1)


def _values(values: dict[str, list[dict]]) -> list[dict]:
    by_sample: dict[str, list[tuple[dict, float]]] = {}
    for rows in values.values():
        shares = _shares(np.array([row["value"] for row in rows]))
        for row, share in zip(rows, shares, strict=True):
            by_sample.setdefault(row["sample_id"], []).append((row, float(share)))
    found = []
    for sample_id, rows in by_sample.items():
        own = np.array([row["value"] for row, _ in rows])
        positive, negative = float((own > 0).mean()), float((own < 0).mean())
        found.append(
            {
                "sample_id": sample_id,
                "domain": rows[0][0]["domain"],
                "value": float(own.mean()),
                "times_seen": sum(row["times_seen"] for row, _ in rows),
                "runs": own.size,
                "std": float(own.std(ddof=1)) if own.size > 1 else None,
                "low": float(own.min()),
                "high": float(own.max()),
                "rank": 0,
                "run_rank": float(np.mean([share for _, share in rows])),
                "step_rank": 0.5,
                "step_std": None,
                "positive": positive,
                "sign_stability": max(positive, negative),
            }
        )
    found.sort(key=lambda row: (-row["value"], row["sample_id"]))
    return [row | {"rank": rank} for rank, row in enumerate(found, start=1)]


def _run(path: Path, rows: list[dict], seed: int) -> dict:
    return {
        "run": path.name, "directory": str(path), "run_id": None, "seed": seed, "model": "gpt2-tiny",
        "optimizer": "adamw", "dtype": "float32", "engine": "graddotprod", "steps": 12, "samples": len(rows),
        "total": sum(row["value"] for row in rows),
    }  # fmt: skip


def _domains(name: str, rows: list[dict]) -> list[dict]:
    by_domain: dict[str, list[dict]] = {}
    for row in rows:
        by_domain.setdefault(row["domain"], []).append(row)
    totals = {domain: sum(row["value"] for row in own) for domain, own in by_domain.items()}
    whole = sum(map(abs, totals.values())) or 1.0
    return [
        {
            "run": name, "domain": domain, "samples": len(own),
            "times_seen": sum(row["times_seen"] for row in own),
            "total": totals[domain], "mean": totals[domain] / len(own), "share": totals[domain] / whole,
            "negative": sum(row["value"] < 0 for row in own) / len(own),
        }
        for domain, own in by_domain.items()
    ]  # fmt: skip


def _trajectories(path: Path) -> list[dict]:
    found = domain_trajectories(load_run(path))
    return [
        {"run": path.name, "step": step, "domain": domain, "total": mean, "mean": mean}
        for step, means in zip(found.steps.tolist(), found.means.tolist(), strict=True)
        for domain, mean in zip(found.domains, means, strict=True)
    ]


def _pair(a: str, b: str, rows_a: list[dict], rows_b: list[dict]) -> dict:
    own_b = {row["sample_id"]: row["value"] for row in rows_b}
    shared = [(row["value"], own_b[row["sample_id"]]) for row in rows_a if row["sample_id"] in own_b]
    x, y = np.array(shared).reshape(-1, 2).T
    known = x.size > 2
    signs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
    return {
        "run_a": a,
        "run_b": b,
        "shared": x.size,
        "spearman": float(np.corrcoef(_shares(x), _shares(y))[0, 1]) if known else None,
        "kendall": float(signs.sum() / (x.size * (x.size - 1))) if known else None,
        "pearson": float(np.corrcoef(x, y)[0, 1]) if known else None,
        "same_sign": float((np.sign(x) == np.sign(y)).mean()) if known else None,
    }


def _columns(name: str, rows: list[dict]) -> list[dict]:
    """Half of every value to each of two families."""
    return [
        {"run": name, "part": part, "val": "", "domain": row["domain"], "samples": row["samples"],
         "total": row["total"] / 2, "mean": row["mean"] / 2}
        for part in ("attn", "mlp")
        for row in _domains(name, rows)
    ]  # fmt: skip
