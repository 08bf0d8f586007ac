"""The section on groups of runs: how many steps each needs to a loss, against another group."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis.errors import AnalysisError
from analysis.report.comparison_figures import contrasts
from analysis.report.facts import read_json
from analysis.report.numbers import count, loss
from analysis.report.page import Block, Column, Picture, Section, Table, Text

COMPARISON_FILE = "comparison.json"


def contrasts_section(path: Path) -> Section:
    """Contrasts as a figure and a table, then the runs of every group.

    Raises:
        AnalysisError: The file is missing or damaged.
    """
    found = read_json(path)
    try:
        return Section("Groups of runs", list(_blocks(found)))
    except (KeyError, TypeError, AttributeError) as error:
        raise AnalysisError(f"{path} is damaged: it lacks {error}.") from error


def _blocks(found: Mapping[str, Any]) -> Iterator[Block]:
    yield Text(
        "Groups are compared by the steps that their runs take to a validation loss of "
        f"{loss(found['target_loss'])} nats, and by the loss at the end."
    )
    drawn = [one for one in found["contrasts"] if one["ratio"] is not None and math.isfinite(one["ratio"])]
    if drawn:
        yield Picture(contrasts(drawn))
    if found["contrasts"]:
        yield _contrast_table(found["contrasts"])
    yield _run_table(found["groups"])


def _contrast_table(found: list[Mapping[str, Any]]) -> Table:
    rows = [
        (
            str(one["group"]),
            str(one["against"]),
            _ratio(one["ratio"]),
            f"{_ratio(one['low'])} to {_ratio(one['high'])}" if one["low"] is not None else "–",
            count(one["pairs"]),
            str(one["note"] or ""),
        )
        for one in found
    ]
    columns = [
        Column("Group", "text"),
        Column("against", "text"),
        Column("Ratio of steps"),
        Column("Interval"),
        Column("Pairs"),
        Column("Note", "text"),
    ]
    return Table("Steps to the target loss; a ratio below 1 is fewer steps", columns, rows)


def _run_table(groups: list[Mapping[str, Any]]) -> Table:
    rows = [
        (
            str(group["name"]),
            str(run["run"]),
            str(run["seed"]),
            count(run["steps_to_target"]) if run["steps_to_target"] is not None else "not reached",
            loss(run["final_loss"]),
        )
        for group in groups
        for run in group["runs"]
    ]
    columns = [
        Column("Group", "text"),
        Column("Run", "text"),
        Column("Seed"),
        Column("Steps to the target"),
        Column("Loss at the end", unit="nats"),
    ]
    return Table("Runs by group", columns, rows)


def _ratio(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"
