"""How far runs agree on the values of the samples that they share."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import kendalltau

from analysis.aggregate.sample_totals import RunValues
from analysis.aggregate.tables import CORRELATIONS
from analysis.ranks import rank_shares

# What makes runs different experiments; where they ran and what was recorded does not.
_COMPARED = ("seed", "model", "data", "engine", "layers", "dtype", "optimizer", "trainer")
_LABELS = ("name", "kind")


def correlate(runs: Sequence[RunValues], configs: Sequence[Mapping[str, Any]], samples: int) -> pa.Table:
    """A row for each pair of runs (`analysis.aggregate.tables.CORRELATIONS`).

    Args:
        configs: The runs' configs, in step with them.
        samples: How many samples all runs have together.
    """
    rows = []
    for (a, config_a), (b, config_b) in combinations(zip(runs, configs, strict=True), 2):
        x, y = _shared(a, b, samples)
        row = {"run_a": a.name, "run_b": b.name, "shared": len(x), **agreement(x, y)}
        rows.append(row | {"differ": ", ".join(differing_keys(config_a, config_b))})
    return pa.Table.from_pylist(rows, schema=CORRELATIONS)


def agreement(x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, float | None]:
    """Spearman's, Kendall's (tau-b) and Pearson's correlation of two runs' values `[n]` of the same samples,
    and the share of samples whose values have one sign; None for what is not defined: without samples, and
    for correlations where all values of a run are alike.
    """
    found: dict[str, float | None] = dict.fromkeys(("spearman", "kendall", "pearson", "same_sign"))
    if not len(x):
        return found
    found["same_sign"] = float((np.sign(x) == np.sign(y)).mean())
    if x.min() < x.max() and y.min() < y.max():
        found["spearman"] = _pearson(rank_shares(x[None])[0], rank_shares(y[None])[0])
        found["kendall"] = float(kendalltau(x, y).statistic)
        found["pearson"] = _pearson(x, y)
    return found


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The config keys in which two experiments differ; of groups with different names only the name."""
    differ = []
    for group in _COMPARED:
        keys_a, keys_b = dict(_leaves(group, a.get(group))), dict(_leaves(group, b.get(group)))
        found = sorted(key for key in keys_a | keys_b if keys_a.get(key) != keys_b.get(key))
        labels = [key for label in _LABELS if (key := f"{group}.{label}") in found]
        differ += labels[:1] or found
    return differ


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """`a.b.c` and its value, for every value of a nested mapping."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    return [leaf for key, child in value.items() for leaf in _leaves(f"{name}.{key}", child)]


def _shared(a: RunValues, b: RunValues, samples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both runs' values of the samples that both scored, in one order."""
    place = np.full(samples, -1, dtype=np.int64)
    place[a.position] = np.arange(len(a.position))
    found = place[b.position]
    return a.value[found[found >= 0]], b.value[found >= 0]


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Neither is constant."""
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares of tiny values would vanish
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))
