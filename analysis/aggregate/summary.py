"""What an aggregation prints: the runs, how far they agree, the samples that stand out, and the domains."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

_SHOWN_SAMPLES = 5  # at either end
_SHOWN_RUNS = 20
_MEASURES = {"spearman": "Spearman", "kendall": "Kendall", "pearson": "Pearson", "same_sign": "same sign"}


def print_aggregate(tables: Mapping[str, pa.Table], notes: Sequence[str], console: Console) -> None:
    """Print the tables of `analysis.aggregate.tables.SCHEMAS`, shortened.

    Args:
        notes: What kind of values these are, a sentence each.
    """
    _print_runs(tables["runs"], console)
    _print_agreement(tables["correlations"], console)
    _print_samples(tables["values"], console)
    _print_domains(tables["domains"], console)
    for note in notes:
        console.print(Text(note), soft_wrap=True, highlight=False)


def _print_runs(runs: pa.Table, console: Console) -> None:
    table = _table("Runs", ["run", "model", "optimizer", "format"], ["seed", "steps", "samples", "sum"])
    for row in runs.slice(0, _SHOWN_RUNS).to_pylist():
        texts = [row["run"], row["model"], row["optimizer"], row["dtype"]]
        numbers = [row["seed"], row["steps"], row["samples"], f"{row['total']:+.3e}"]
        _add(table, [*texts, *numbers])
    console.print(table)
    if runs.num_rows > _SHOWN_RUNS:
        console.print(Text(f"and {runs.num_rows - _SHOWN_RUNS} more runs"))


def _print_agreement(correlations: pa.Table, console: Console) -> None:
    """Some lines for all pairs of runs that differ in the same keys: one a measure."""
    if not correlations.num_rows:
        return
    headings = ["pairs", "shared", "median", "lowest to highest"]
    table = _table("Agreement of pairs of runs", ["differ in", "measure"], headings)
    for keys in pc.unique(correlations["differ"]).to_pylist():
        own = correlations.filter(pc.equal(correlations["differ"], keys))
        of_all = [keys or "nothing", own.num_rows, pc.min(own["shared"]).as_py()]
        for name, measure in _MEASURES.items():
            named, pairs, shared = of_all if name == "spearman" else ("", "", "")
            _add(table, [named, measure, pairs, shared, *_spread(own[name])])
        table.add_section()
    console.print(table)


def _print_samples(values: pa.Table, console: Console) -> None:
    ordered = values.select(["sample_id", "domain", "value", "std", "run_rank", "positive", "runs", "rank"])
    ends = pc.or_(
        pc.less_equal(values["rank"], _SHOWN_SAMPLES),
        pc.greater(values["rank"], max(_SHOWN_SAMPLES, values.num_rows - _SHOWN_SAMPLES)),
    )
    headings = ["value", "std", "run rank", "> 0", "runs"]
    table = _table(f"Highest and lowest of {values.num_rows} samples", ["sample", "domain"], headings)
    for row in ordered.filter(ends).sort_by("rank").to_pylist():
        if row["rank"] == _SHOWN_SAMPLES + 1 or row["rank"] == values.num_rows - _SHOWN_SAMPLES + 1:
            table.add_section()
        spread = "" if row["std"] is None else f"{row['std']:.1e}"
        shares = [f"{row['run_rank']:.2f}", f"{100 * row['positive']:.0f} %"]
        _add(table, [row["sample_id"], row["domain"], f"{row['value']:+.3e}", spread, *shares, row["runs"]])
    console.print(table)
    most = pc.max(values["runs"]).as_py()
    if fewer := pc.sum(pc.less(values["runs"], most)).as_py():
        line = (
            f"{fewer} of {values.num_rows} samples were scored in fewer than {most} runs: the fewer, the "
            "further a mean may lie from zero by chance."
        )
        console.print(Text(line), soft_wrap=True, highlight=False)


def _print_domains(domains: pa.Table, console: Console) -> None:
    """Means over runs, the domain of the highest mean first."""
    measures = [("mean", "mean"), ("mean", "stddev", pc.VarianceOptions(ddof=1)), ("share", "mean")]
    grouped = domains.group_by("domain").aggregate(
        [*measures, ("negative", "mean"), ("samples", "max"), ("run", "count")]
    )
    headings = ["mean", "std", "share", "negative", "samples", "runs"]
    table = _table("Value by domain, mean over runs", ["domain"], headings)
    for row in grouped.sort_by([("mean_mean", "descending"), ("domain", "ascending")]).to_pylist():
        spread = row["mean_stddev"]
        known = spread is not None and np.isfinite(spread)
        share = "" if row["share_mean"] is None else f"{100 * row['share_mean']:+.0f} %"
        _add(
            table,
            [
                *(row["domain"], f"{row['mean_mean']:+.3e}", f"{spread:.1e}" if known else "", share),
                *(f"{100 * row['negative_mean']:.0f} %", row["samples_max"], row["run_count"]),
            ],
        )
    console.print(table)


def _spread(column: pa.ChunkedArray) -> tuple[str, str]:
    """The median, and the least to the largest of several."""
    found = column.drop_null().to_numpy()
    if not found.size:
        return "undefined", ""
    return f"{np.median(found):.3f}", f"{found.min():.3f} to {found.max():.3f}" if found.size > 1 else ""


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add(table: Table, cells: Sequence[Any]) -> None:
    """A row; as Text, since an id may hold what rich takes for markup."""
    table.add_row(*(Text("" if cell is None else str(cell)) for cell in cells))
