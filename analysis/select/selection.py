"""Parts samples by their values: which are kept, which are dropped."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from omegaconf import DictConfig

from analysis.errors import AnalysisError
from analysis.select.rules import Method, Side, described

METADATA = b"ghostrunner.selection"
"""The key of a Parquet list's schema metadata under which its rule and source stand, as JSON."""

_BASE = {"sample_id": pa.string(), "domain": pa.string(), "value": pa.float64()}
LEAST_RUNS = 2  # for a sign that can agree with another


@dataclass(frozen=True)
class Parted:
    """All samples, and which of them are kept.

    Attributes:
        table: `sample_id` string, `domain` string, `value` float64 (null: never scored), a row each.
        kept: `[n]` bool.
        unscored: `[n]` bool: without a finite value of the column that was compared, so that the rule says
            nothing of them.
    """

    table: pa.Table
    kept: NDArray[np.bool_]
    unscored: NDArray[np.bool_]

    def part(self, side: Side) -> pa.Table:
        """The rows of one side."""
        return self.table.filter(pa.array(self.kept if side == Side.keep else ~self.kept))


def select(values: pa.Table, rule: DictConfig, never_scored: pa.Table) -> Parted:
    """Part the samples of a value table, and those that no run scored, by a rule.

    Where a rule counts samples, those of equal value go by `sample_id`, the first of them as the higher.

    Args:
        values: A run's `values.parquet` or an aggregate's.
        rule: A checked `analysis.select.rules.RuleConfig`.
        never_scored: `sample_id` and `domain` of samples that are in no value table.

    Raises:
        AnalysisError: The table lacks a column that the rule reads, or one side would be empty.
    """
    columns = _columns(values, rule)
    ids, domains = columns["sample_id"].to_numpy(), columns["domain"].to_numpy()
    if len(set(ids.tolist())) < len(ids):
        raise AnalysisError(
            "the table of values has a sample twice: give one run's values, or an aggregate's"
        )
    compared = _floats(columns, str(rule.by))
    spoken = np.isfinite(compared) if rule.method != Method.sign else _floats(columns, "runs") >= LEAST_RUNS
    kept = np.full(len(ids), rule.unscored == Side.keep)
    rows = np.flatnonzero(spoken)
    kept[rows] = _RULES[Method(rule.method)](
        _Rows(ids[rows], domains[rows], compared[rows], columns, rows), rule
    )
    further = len(never_scored)
    parted = Parted(
        _with_never_scored(columns, never_scored),
        np.concatenate([kept, np.full(further, rule.unscored == Side.keep)]),
        np.concatenate([~spoken, np.ones(further, dtype=bool)]),
    )
    _refuse_one_sided(parted, rule)
    return parted


def list_of(parted: Parted, side: Side, rule: DictConfig, source: str) -> pa.Table:
    """One side as a list, with its rule, source and counts in the schema's metadata."""
    record = {
        "list": str(side),
        "rule": described(rule),
        "source": source,
        "kept": int(parted.kept.sum()),
        "dropped": int((~parted.kept).sum()),
        "unscored": int(parted.unscored.sum()),
    }
    return parted.part(side).replace_schema_metadata({METADATA: json.dumps(record).encode()})


def random_samples(samples: pa.Table, dropped: pa.Table, seed: Sequence[int]) -> pa.Table:
    """As many samples as `dropped` has, drawn from all, so that some may be in `dropped` too: the control
    that a choice by value has to beat.

    Args:
        samples: All samples: `sample_id`, `domain` and any others.
        dropped: Some of them.
        seed: Whole numbers that the draw depends on, beside the ids.
    """
    chosen = np.random.default_rng(list(seed)).choice(_by_id(samples), len(dropped), replace=False)
    return samples.take(pa.array(np.sort(chosen)))


def random_samples_per_domain(samples: pa.Table, dropped: pa.Table, seed: Sequence[int]) -> pa.Table:
    """As many samples of each domain as `dropped` has, drawn from the domain: the control that tells a choice
    of samples from one of domains. Arguments as of `random_samples`.
    """
    generator = np.random.default_rng(list(seed))
    order, domains = _by_id(samples), samples["domain"].to_numpy()
    chosen = []
    for domain, number in sorted(Counter(dropped["domain"].to_pylist()).items()):
        own = order[domains[order] == domain]
        chosen += generator.choice(own, number, replace=False).tolist()
    return samples.take(pa.array(sorted(chosen), pa.int64()))


def _by_id(samples: pa.Table) -> NDArray[np.int64]:
    """The rows in the order of their ids, so that a draw does not depend on the table's order."""
    return np.argsort(samples["sample_id"].to_numpy().astype(str), kind="stable")


# ---------------------------------------------------------------- the rules


@dataclass(frozen=True)
class _Rows:
    """The samples that the rule speaks of.

    Attributes:
        ids, domains, compared: `[n]`; the last float64, all finite but for `sign`.
        columns: The whole table.
        rows: `[n]` their rows in it.
    """

    ids: NDArray[np.object_]
    domains: NDArray[np.object_]
    compared: NDArray[np.float64]
    columns: pa.Table
    rows: NDArray[np.int64]

    def best_first(self) -> NDArray[np.int64]:
        """Positions `[n]` from the highest to the lowest; of equals the first id comes first."""
        return np.lexsort((self.ids.astype(str), -self.compared))

    def groups(self, per_domain: bool) -> list[NDArray[np.int64]]:
        """The positions, best first: of all, or of each domain."""
        order = self.best_first()
        if not per_domain:
            return [order]
        return [order[self.domains[order] == domain] for domain in sorted(set(self.domains.tolist()))]


def _threshold(samples: _Rows, rule: DictConfig) -> NDArray[np.bool_]:
    return samples.compared >= rule.threshold


def _quantile(samples: _Rows, rule: DictConfig) -> NDArray[np.bool_]:
    """Of n samples `floor(quantile · n)` are dropped, by the decimal number as it is typed."""
    kept = np.ones(len(samples.ids), dtype=bool)
    for order in samples.groups(rule.per_domain):
        dropped = math.floor(Fraction(str(rule.quantile)) * len(order))
        kept[order[len(order) - dropped :]] = False
    return kept


def _top_k(samples: _Rows, rule: DictConfig) -> NDArray[np.bool_]:
    kept = np.zeros(len(samples.ids), dtype=bool)
    for order in samples.groups(rule.per_domain):
        kept[order[: rule.k]] = True
    return kept


def _sign(samples: _Rows, rule: DictConfig) -> NDArray[np.bool_]:
    """Where more than half of the runs agree on a sign that is not positive, it is negative."""
    positive = _floats(samples.columns, "positive")[samples.rows]
    stability = _floats(samples.columns, "sign_stability")[samples.rows]
    rounding = 1e-9  # of shares such as 2/3; two shares of runs that differ, differ by far more
    return ~((stability > positive + rounding) & (stability >= rule.negative_share - rounding))


_RULES: dict[Method, Callable[[_Rows, DictConfig], NDArray[np.bool_]]] = {
    Method.threshold: _threshold,
    Method.quantile: _quantile,
    Method.top_k: _top_k,
    Method.sign: _sign,
}


# ---------------------------------------------------------------- tables


def _columns(values: pa.Table, rule: DictConfig) -> pa.Table:
    """The columns that the rule reads, in their types."""
    wanted = _BASE | {str(rule.by): pa.float64()}
    if rule.method == Method.sign:
        wanted |= {"runs": pa.int64(), "positive": pa.float64(), "sign_stability": pa.float64()}
    for name in wanted:
        if name not in values.column_names:
            raise AnalysisError(
                f"the table of values has no column {name}, which {described(rule)} reads: give an aggregate "
                "of runs (python -m analysis.aggregate), or another rule"
            )
    return values.select(list(wanted)).cast(pa.schema(wanted))


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column as float64; null becomes NaN."""
    return table[name].cast(pa.float64()).to_numpy().astype(np.float64)


def _with_never_scored(columns: pa.Table, never_scored: pa.Table) -> pa.Table:
    further = never_scored.select(["sample_id", "domain"]).append_column(
        "value", pa.nulls(len(never_scored), pa.float64())
    )
    return pa.concat_tables([columns.select(list(_BASE)), further.cast(pa.schema(_BASE))])


def _refuse_one_sided(parted: Parted, rule: DictConfig) -> None:
    if parted.kept.all():
        raise AnalysisError(
            f"{described(rule)} drops none of {len(parted.kept)} samples: choose another rule"
        )
    if not parted.kept.any():
        raise AnalysisError(
            f"{described(rule)} keeps none of {len(parted.kept)} samples: choose another rule"
        )
