"""The sections on what varies from run to run: the runs, samples, domains, parts and losses."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.aggregate.tables import Aggregate
from analysis.errors import AnalysisError
from analysis.plots import VAL_LOSS
from analysis.report import comparison_figures as figures
from analysis.report.numbers import Scale, count, loss, percent
from analysis.report.page import Block, Column, Picture, Sample, Section, Table, Text, signed_bars
from analysis.report.training import finite
from analysis.report.values import SHOWN
from analysis.runs import Run

_RUNS = 60  # rows of a table
_DOMAINS = 20
_PARTS = 24


def runs_section(aggregate: Aggregate) -> Section:
    """What the runs are, by the numbers that figures call them by."""
    found = aggregate.runs.to_pylist()
    opened = aggregate.open_runs()
    scale = Scale.of([row["total"] for row in found[:_RUNS]])

    last = {name: finite(run, VAL_LOSS)[-1:] for name, run in opened.items() if _has_losses(run)}
    rows = [
        (
            str(number),
            row["run"],
            count(row["seed"]),
            row["model"] or "–",
            row["optimizer"] or "–",
            count(row["steps"]),
            count(row["samples"]),
            scale.text(row["total"]),
            loss(next(iter(last.get(row["run"], [])), None)),
        )
        for number, row in enumerate(found[:_RUNS], start=1)
    ]
    columns = [
        Column("No."),
        Column("Run", "text"),
        Column("Seed"),
        Column("Model", "text"),
        Column("Optimizer", "text"),
        Column("Steps"),
        Column("Samples"),
        Column("Sum of values", unit=scale.unit("nats")),
        Column("Last loss", unit="nats"),
    ]
    blocks: list[Block] = [Table("By the numbers that figures call them by", columns, rows)]
    if len(found) > _RUNS:
        blocks.append(Text(f"{len(found) - _RUNS} more runs are in runs.parquet."))
    return Section("Runs", blocks)


def samples_section(aggregate: Aggregate) -> Section:
    """The samples of highest and of lowest mean value, with their spread."""
    values = aggregate.values
    ordered = values.filter(pc.is_finite(values["value"])).sort_by("rank")
    if not len(ordered):
        return Section("Samples that stand out", [Text("No sample has a finite value.")])
    highest = min(SHOWN, (len(ordered) + 1) // 2)
    lowest = min(SHOWN, len(ordered) - highest)
    top, bottom = ordered[:highest].to_pylist(), ordered[len(ordered) - lowest :].to_pylist()
    tables: list[Block] = [_sample_table("Highest mean values", top)]
    if bottom:
        tables.append(_sample_table("Lowest mean values", bottom[::-1]))
    return Section("Samples that stand out", [Picture(figures.sample_spread([*top, *bottom])), *tables])


def _sample_table(caption: str, found: list[dict]) -> Table:
    scale = Scale.of([row[name] for row in found for name in ("value", "low", "high")])
    rows = [
        (
            Sample(row["sample_id"]),
            scale.text(row["value"]),
            scale.text(row["std"]).lstrip("+"),
            f"{scale.text(row['low'])} … {scale.text(row['high'])}",
            percent(row["run_rank"], 0),
            percent(row["sign_stability"], 0),
            count(row["runs"]),
            row["domain"],
        )
        for row in found
    ]
    unit = scale.unit("nats")
    columns = [
        Column("Sample", "id"),
        Column("Mean value", unit=unit),
        Column("Std", unit=unit),
        Column("Lowest … highest run", unit=unit),
        Column("Mean rank"),
        Column("Same sign"),
        Column("Runs"),
        Column("Domain", "text"),
    ]
    return Table(f"{caption}; rank: the share of a run's samples that are lower", columns, rows)


def domains_section(aggregate: Aggregate) -> Section:
    """What each domain is worth in every run, and when its value arises."""
    table = aggregate.domains
    domains = table["domain"].to_numpy().astype(str)
    by_name = {name: table.filter(pc.equal(table["domain"], name)) for name in np.unique(domains).tolist()}
    means = {name: own["mean"].to_numpy() for name, own in by_name.items()}
    order = sorted(means, key=lambda name: -float(means[name].mean()))
    shown = order if len(order) <= _DOMAINS else [*order[: _DOMAINS // 2], *order[-_DOMAINS // 2 :]]
    scale = Scale.of([float(value) for name in shown for value in (means[name].mean(), *_ends(means[name]))])
    rows = [
        (
            name,
            scale.text(float(means[name].mean())),
            scale.text(float(means[name].std(ddof=1))).lstrip("+") if means[name].size > 1 else "–",
            " … ".join(map(scale.text, _ends(means[name]))),
            percent(float(by_name[name]["share"].to_numpy().mean())),
            percent(float(by_name[name]["negative"].to_numpy().mean()), 0),
            count(len(by_name[name])),
        )
        for name in shown
    ]
    unit = scale.unit("nats")
    columns = [
        Column("Domain", "text"),
        Column("Mean value", unit=unit),
        Column("Std", unit=unit),
        Column("Lowest … highest run", unit=unit),
        Column("Share"),
        Column("Negative"),
        Column("Runs"),
    ]
    blocks: list[Block] = [Table("Value by domain, the mean over runs", columns, rows)]
    if len(order) > len(shown):
        blocks.append(Text(f"{len(order) - len(shown)} more domains are between these, by their means."))
    blocks.append(Picture(figures.domain_spread(shown, means)))
    if len(aggregate.trajectories):
        blocks.append(Picture(figures.domain_trajectories(aggregate.trajectories, shown)))
    return Section("Domains", blocks)


def columns_section(table: pa.Table) -> Section:
    """What each part of the scores adds up to, the mean over runs, from `Aggregate.columns`."""
    by_run = table.group_by(["run", "part", "val"]).aggregate([("total", "sum")])
    found = by_run.group_by(["part", "val"]).aggregate([("total_sum", "mean"), ("total_sum", "count")])
    rows = sorted(found.to_pylist(), key=lambda row: -abs(row["total_sum_mean"]))
    totals = [row["total_sum_mean"] for row in rows[:_PARTS]]
    scale, whole = Scale.of(totals), sum(abs(row["total_sum_mean"]) for row in rows) or 1.0
    cells = [
        (
            row["part"],
            row["val"] or "–",
            scale.text(row["total_sum_mean"]),
            percent(row["total_sum_mean"] / whole),
            bar,
            count(row["total_sum_count"]),
        )
        for row, bar in zip(rows, signed_bars(totals), strict=False)
    ]
    columns = [
        Column("Part", "id"),
        Column("Validation set", "text"),
        Column("Total", unit=scale.unit("nats")),
        Column("Share"),
        Column("", "bar"),
        Column("Runs"),
    ]
    blocks: list[Block] = [
        Table("What each part of the scores adds up to, the mean over runs", columns, cells)
    ]
    if len(rows) > _PARTS:
        blocks.append(Text(f"{len(rows) - _PARTS} parts with smaller totals are in columns.parquet."))
    return Section("Values by part", blocks)


def losses_section(aggregate: Aggregate) -> Section:
    """The validation losses of all runs.

    Raises:
        AnalysisError: No run has any that can be read.
    """
    runs = {name: run for name, run in aggregate.open_runs().items() if _has_losses(run)}
    lacking = len(aggregate.names) - len(runs)
    if not runs:
        raise AnalysisError("the directories of the runs are no longer there, or hold no losses.")
    missing = [Text(f"{lacking} of {len(aggregate.names)} runs are left out: their losses cannot be read.")]
    return Section("Losses", [Picture(figures.all_losses(runs)), *(missing if lacking else [])])


def _has_losses(run: Run) -> bool:
    """Whether the run has losses that can be read: one without metrics is still one of the runs."""
    try:
        return bool(run.series(VAL_LOSS))
    except AnalysisError:
        return False


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.min()), float(values.max())
