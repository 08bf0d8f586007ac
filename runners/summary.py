"""What a run prints at its end: the samples that stand out, values by domain, and how to go on from there."""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

_SHOWN = 5  # samples at either end
_ARTIFACTS = {
    "Values": "values.parquet",
    "Scores": "scores",
    "Plots": "plots",
    "Report": "report.html",
    "Metrics": "metrics.jsonl",
    "Weights": "model",
}


@dataclass(frozen=True)
class SampleValue:
    """One row of `values.parquet`."""

    sample_id: str
    domain: str
    value: float
    times_seen: int


@dataclass(frozen=True)
class DomainValue:
    """The values of one domain's samples; `negative` is the share of samples with a value below zero."""

    domain: str
    mean: float
    total: float
    count: int
    negative: float


def print_summary(
    run_dir: Path,
    values: pa.Table | Sequence[Mapping[str, Any]],
    previews: Callable[[str], str] | None,
    ui_command: str | None,
    run_url: str | None,
    replay_command: str,
    notes: Sequence[str],
    console: Console,
) -> None:
    """Print the tables and the ways on from here.

    Args:
        run_dir: the run directory, for the artifacts' paths.
        values: columns or keys `sample_id`, `domain`, `value`, `times_seen`; may be empty.
        previews: from a sample id to one line of its text; None shows no text.
        ui_command: the command that serves the tracking pages; None where there is none to run.
        run_url: the run's own page; None where nothing is tracked.
        replay_command: the command that runs the same thing again.
        notes: what kind of score this is and what it is not, a sentence each.
        console: where to print; narrow consoles fold ids over several lines and never shorten them.
    """
    rows = _rows(values)
    finite = sorted((row for row in rows if math.isfinite(row.value)), key=lambda row: -row.value)
    if finite:
        helpful, harmful = split_ends(finite)
        # Values of a run may all have one sign; helping and harming start at zero.
        top = "Most helpful samples" if helpful[0].value > 0 else "Least harmful samples"
        bottom = "Most harmful samples" if finite[-1].value < 0 else "Least helpful samples"
        console.print(_sample_table(top, helpful, previews))
        if harmful:
            console.print(_sample_table(bottom, harmful, previews))
        console.print(_domain_table(domain_values(finite)))
    if len(finite) < len(rows):
        print_line(console, f"{len(rows) - len(finite)} samples have no finite value and are left out above.")
    for note in notes:
        print_line(console, note)
    ways = {"Run directory": str(run_dir)}
    ways |= {label: str(run_dir / name) for label, name in _ARTIFACTS.items() if (run_dir / name).exists()}
    print_ways_on(console, {**ways, "Run it again": replay_command}, ui_command, run_url)


def split_ends(rows: Sequence[SampleValue]) -> tuple[list[SampleValue], list[SampleValue]]:
    """The first and the last few of rows sorted from high to low, the latter lowest first; none in both."""
    highest = min(_SHOWN, (len(rows) + 1) // 2)
    lowest = min(_SHOWN, len(rows) - highest)
    return list(rows[:highest]), list(reversed(rows[len(rows) - lowest :]))


def domain_values(rows: Iterable[SampleValue]) -> list[DomainValue]:
    """Values by domain, the highest mean first."""
    by_domain: dict[str, list[float]] = {}
    for row in rows:
        by_domain.setdefault(row.domain, []).append(row.value)
    summed = [
        DomainValue(
            domain=domain,
            mean=math.fsum(values) / len(values),
            total=math.fsum(values),
            count=len(values),
            negative=sum(value < 0 for value in values) / len(values),
        )
        for domain, values in by_domain.items()
    ]
    return sorted(summed, key=lambda domain: -domain.mean)


def replay_command(
    hydra_overrides: Sequence[str], script: str = "run.py", launcher: Sequence[str] = ("python",)
) -> str:
    """The shell command that starts a run with these Hydra overrides; `script` as the user typed it, and
    `launcher` what was typed before it.
    """
    return shlex.join([*launcher, script, *hydra_overrides])


def _rows(values: pa.Table | Sequence[Mapping[str, Any]]) -> list[SampleValue]:
    records = values.to_pylist() if isinstance(values, pa.Table) else values
    return [SampleValue(r["sample_id"], r["domain"], r["value"], r["times_seen"]) for r in records]


def _sample_table(title: str, rows: Iterable[SampleValue], previews: Callable[[str], str] | None) -> Table:
    table = Table(title=title, title_justify="left", show_lines=previews is not None)
    table.add_column("sample", overflow="fold")
    table.add_column("domain", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("seen", justify="right", no_wrap=True)
    for row in rows:
        # Text objects, since an id or a text may hold what rich would take for markup.
        sample = Text(row.sample_id)
        if previews is not None:
            sample.append("\n" + previews(row.sample_id), style="dim")
        table.add_row(sample, Text(row.domain), f"{row.value:+.3e}", str(row.times_seen))
    return table


def _domain_table(domains: Iterable[DomainValue]) -> Table:
    table = Table(title="Value by domain", title_justify="left")
    table.add_column("domain", overflow="fold")
    for heading in ("mean", "sum", "samples", "negative"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in domains:
        share = f"{100 * row.negative:.0f} %"
        table.add_row(Text(row.domain), f"{row.mean:+.3e}", f"{row.total:+.3e}", str(row.count), share)
    return table


def print_ways_on(
    console: Console, ways: Mapping[str, str], ui_command: str | None, run_url: str | None
) -> None:
    """Print paths and commands by label, then where to look at the run's record."""
    ways = dict(ways)
    if ui_command is not None:
        ways["Open MLflow"] = ui_command
    if run_url is not None:
        ways["This run's page"] = run_url
    for label, text in ways.items():
        print_line(console, f"{label:<16} {text}")


def print_whole(table: Table) -> None:
    """Print a table as wide as it is: names folded letter by letter could not be read, nor searched for."""
    console = Console()
    needed = console.measure(table, options=console.options.update(width=1_000)).maximum
    Console(width=max(console.width, needed)).print(table)


def print_line(console: Console, text: str) -> None:
    """Print without markup and without breaking lines, so that commands and links can be copied whole."""
    console.print(Text(text), soft_wrap=True, highlight=False)
