"""The section on how far runs agree: on the order of samples, and on their signs."""

import math
from statistics import median

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.aggregate.tables import Aggregate
from analysis.errors import AnalysisError
from analysis.report import comparison_figures as figures
from analysis.report.numbers import correlation, count, percent
from analysis.report.page import Block, Column, Picture, Section, Table, Text
from analysis.runs import Run

_PAIRS = 20  # rows of a table
_SHARED = 3  # samples that a scatter needs
_ROUNDING = 1e-9  # of a sum, as a share of its terms

Pair = tuple[str, str]


def pair_correlations(aggregate: Aggregate) -> dict[Pair, float | None]:
    """Spearman's correlation of each pair of runs; None where it is undefined."""
    rows = aggregate.correlations.select(["run_a", "run_b", "spearman"]).to_pylist()
    return {
        (row["run_a"], row["run_b"]): None
        if row["spearman"] is None or math.isnan(row["spearman"])
        else float(row["spearman"])
        for row in rows
        if row["run_a"] != row["run_b"]
    }


def agreement_section(aggregate: Aggregate) -> Section:
    """Correlations of all pairs, the ranks of one pair, and how stable signs are."""
    pairs = pair_correlations(aggregate)
    blocks: list[Block] = []
    if any(value is not None for value in pairs.values()):
        blocks.append(Picture(figures.correlation_map(aggregate.names, _matrix(aggregate.names, pairs))))
        blocks += _scatter(aggregate, pairs)
        blocks.append(_pair_table(aggregate))
    else:
        blocks.append(Text("No two runs scored the same samples, so there is no agreement to measure."))
    several = aggregate.values.filter(pc.greater(aggregate.values["runs"], 1))
    if len(several):
        stability, positive = (several[name].to_numpy() for name in ("sign_stability", "positive"))
        blocks.append(Picture(figures.sign_stability(stability, positive)))
    return Section("How far runs agree", blocks)


def _matrix(names: list[str], pairs: dict[Pair, float | None]) -> NDArray[np.float64]:
    """`[R, R]`, NaN where undefined."""
    place = {name: i for i, name in enumerate(names)}
    matrix = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(matrix, 1.0)
    for (a, b), value in pairs.items():
        if a in place and b in place and value is not None:
            matrix[place[a], place[b]] = matrix[place[b], place[a]] = value
    return matrix


def _scatter(aggregate: Aggregate, pairs: dict[Pair, float | None]) -> list[Block]:
    """Ranks of the pair whose agreement is the median one; a sentence where its values cannot be read."""
    known = sorted((value, pair) for pair, value in pairs.items() if value is not None)
    value, (a, b) = known[(len(known) - 1) // 2]
    runs = aggregate.open_runs()
    try:
        x, y = _shared_values(*(_unchanged(aggregate, runs, name) for name in (a, b)))
    except AnalysisError as error:
        return [Text(f"The ranks of two runs are not drawn: {error}")]
    if x.size < _SHARED:
        return []
    first, second = (_numbered(name, aggregate.names) for name in (a, b))
    drawing = figures.rank_scatter((first, x), (second, y))
    note = (
        f"Spearman {correlation(value)}, the pair of median agreement" if len(known) > 1 else "the only pair"
    )
    return [Picture(figures.Drawing(drawing.figure, drawing.title, [*drawing.notes, note]))]


def _unchanged(aggregate: Aggregate, runs: dict[str, Run], name: str) -> Run:
    """The run, whose values are those that were aggregated."""
    if name not in runs:
        raise AnalysisError(f"the directory of run {name} is no longer there.")
    values = runs[name].values["value"].to_numpy()
    now = float(values[np.isfinite(values)].sum())
    then = aggregate.runs["total"].to_pylist()[aggregate.names.index(name)]
    if abs(now - then) > _ROUNDING * np.abs(values[np.isfinite(values)]).sum():
        raise AnalysisError(f"run {name} has other values now, or only some steps were aggregated.")
    return runs[name]


def _shared_values(a: Run, b: Run) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Finite values of the samples that both runs scored, in one order."""
    tables = [run.values.filter(pc.is_finite(run.values["value"])) for run in (a, b)]
    joined = tables[0].select(["sample_id", "value"]).join(
        tables[1].select(["sample_id", "value"]), "sample_id", right_suffix="_b", join_type="inner"
    )  # fmt: skip
    joined = joined.sort_by("sample_id")
    return joined["value"].to_numpy(), joined["value_b"].to_numpy()


def _pair_table(aggregate: Aggregate) -> Table:
    pairs = aggregate.correlations.to_pylist()
    pairs = sorted(
        (row for row in pairs if row["run_a"] != row["run_b"]),
        key=lambda row: (row["spearman"] is None, row["spearman"] or 0.0),
    )
    rows = [
        (
            _numbered(row["run_a"], aggregate.names),
            _numbered(row["run_b"], aggregate.names),
            count(row["shared"]),
            correlation(row["spearman"]),
            correlation(row["kendall"]),
            correlation(row["pearson"]),
            percent(row["same_sign"], 0),
        )
        for row in pairs[:_PAIRS]
    ]
    columns = [
        Column("Run", "text"),
        Column("and run", "text"),
        Column("Shared samples"),
        Column("Spearman"),
        Column("Kendall"),
        Column("Pearson"),
        Column("Same sign"),
    ]
    shown = (
        f"The {len(rows)} pairs that agree least, of {len(pairs)}"
        if len(rows) < len(pairs)
        else "Pairs of runs"
    )
    return Table(f"{shown}; median Spearman {correlation(_median(pairs))}", columns, rows)


def _numbered(name: str, names: list[str]) -> str:
    """A run by its number in the figures and its name, which may be a number too."""
    return f"{names.index(name) + 1}: {name}"


def _median(pairs: list[dict[str, float | None]]) -> float | None:
    found = [
        row["spearman"] for row in pairs if row["spearman"] is not None and not math.isnan(row["spearman"])
    ]
    return median(found) if found else None
