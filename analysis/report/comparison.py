"""The report of several runs beside each other, from the folder of their aggregate."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.compute as pc

from analysis.aggregate.tables import Aggregate, read_aggregate
from analysis.compare.comparison import COMPARISON_FILE
from analysis.errors import AnalysisError
from analysis.report.agreement import agreement_section, pair_correlations
from analysis.report.contrasts import contrasts_section
from analysis.report.numbers import correlation, count, percent
from analysis.report.page import KeyFigure, Page, Points, Section, Text, write_page
from analysis.report.spread import (
    columns_section,
    domains_section,
    losses_section,
    runs_section,
    samples_section,
)

_SEVERAL = 3  # different values of a setting that are named


def write_comparison_report(folder: Path, path: Path, comparison: Path | None = None) -> Path:
    """Write the report of an aggregate as one HTML file and return its path.

    Args:
        folder: What `python -m analysis.aggregate` wrote.
        comparison: What `python -m analysis.compare` wrote about groups of runs; None: `comparison.json` in
            the folder, where there is one.

    Raises:
        AnalysisError: The folder holds no aggregate, or a table of it is damaged.
    """
    aggregate = read_aggregate(folder)
    if comparison is None and (folder / COMPARISON_FILE).is_file():
        comparison = folder / COMPARISON_FILE
    return write_page(comparison_page(aggregate, comparison), path)


def comparison_page(aggregate: Aggregate, comparison: Path | None) -> Page:
    """What the report of an aggregate holds."""
    columns = aggregate.columns
    makers: list[Callable[[], Section]] = [
        *([lambda: contrasts_section(comparison)] if comparison is not None else []),
        lambda: runs_section(aggregate),
        lambda: agreement_section(aggregate),
        lambda: samples_section(aggregate),
        lambda: domains_section(aggregate),
        *([lambda: columns_section(columns)] if columns is not None else []),
    ]
    sections = [make() for make in makers]
    try:
        sections.append(losses_section(aggregate))
    except AnalysisError as error:  # the runs' own directories may be gone
        sections.append(Section("Losses", [Text(f"Not shown: {error}")]))
    sections += [_meaning(), _limits(aggregate)]
    runs = len(aggregate.names)
    return Page(
        genre="Report of a comparison",
        title=f"{runs} runs beside each other" if runs > 1 else "One run, aggregated",
        lead="What each training sample was worth over all runs, and how far the runs agree.",
        facts=_facts(aggregate),
        key_figures=_key_figures(aggregate),
        notices=[],
        sections=sections,
    )


def _facts(aggregate: Aggregate) -> list[tuple[str, str]]:
    """What the runs have in common, or the values that they differ by."""
    columns = {
        "Model": "model", "Optimizer": "optimizer", "Number format": "dtype",
        "Seeds": "seed", "Steps": "steps",
    }  # fmt: skip
    facts = [(label, _several(aggregate.runs[name].to_pylist())) for label, name in columns.items()]
    return [*facts, ("Aggregate", str(aggregate.directory.absolute()))]


def _several(values: Sequence[Any]) -> str:
    found = list(dict.fromkeys(str(value) for value in values if value is not None))
    more = f" and {len(found) - _SEVERAL} more" if len(found) > _SEVERAL + 1 else ""
    return ", ".join(found[:_SEVERAL] if more else found) + more or "–"


def _key_figures(aggregate: Aggregate) -> list[KeyFigure]:
    values = aggregate.values
    figures = [
        KeyFigure("Runs", count(len(aggregate.names))),
        KeyFigure(
            "Samples scored", count(len(values)), _in_all(values["runs"].to_pylist(), len(aggregate.names))
        ),
    ]
    found = [value for value in pair_correlations(aggregate).values() if value is not None]
    if found:
        figures.append(
            KeyFigure(
                "Agreement of orders",
                correlation(median(found)),
                f"Spearman, median of pairs; {correlation(min(found))} to {correlation(max(found))}",
            )
        )
    several = values.filter(pc.greater(values["runs"], 1))
    if len(several):
        stable = float(np.mean(several["sign_stability"].to_numpy() >= 1))
        negative = float(np.mean(several["positive"].to_numpy() <= 0))
        figures += [
            KeyFigure("Same sign in all their runs", percent(stable), "of samples that several runs scored"),
            KeyFigure("Never positive", percent(negative), "of samples that several runs scored"),
        ]
    return figures


def _in_all(counts: Sequence[int], runs: int) -> str:
    return f"{count(sum(number == runs for number in counts))} of them by all runs"


def _meaning() -> Section:
    text = (
        "Within a run, a sample's value is the fall in validation loss that it is credited with, in nats, to "
        "first order, or with engine.order=2 to second; positive values help. Here it is the mean over the "
        "runs that scored the sample. Runs with larger learning rates or more steps have larger values, so "
        "orders (ranks) compare better than values do."
    )
    return Section("What the numbers mean", [Text(text)])


def _limits(aggregate: Aggregate) -> Section:
    points = [
        "Agreement between seeds says that values are the sample's own and not the draw's. It does not say "
        "that they are right: a bias that all runs share, such as that of their validation set, agrees with "
        "itself.",
        "A sample that few runs scored has a mean of few numbers; its spread is then not known.",
        "Values are not what leaving a sample out would do. Only training again without it tells "
        "(python -m analysis.select, then data.drop).",
    ]
    runs = aggregate.runs.select(["optimizer", "engine"]).to_pylist()
    if any(run["optimizer"] != "sgd" and "preconditioner" not in run["engine"] for run in runs):
        points.append(
            "With an optimizer other than SGD, the inner product of plain gradients stands in for that "
            "optimizer's own step."
        )
    return Section("What this does not say", [Points(points)])
