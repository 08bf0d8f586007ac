"""The section on groups of runs: how many steps each needs to a loss, against another group."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis.errors import AnalysisError
from analysis.report.comparison_figures import contrasts
from analysis.report.facts import read_json
from analysis.report.numbers import THIN_SPACE, count, loss, percent
from analysis.report.page import Block, Column, Picture, Points, Section, Table, Text

LOSSES = {"test/loss": "test loss", "val/loss": "validation loss"}
UNITS = {"steps": "steps", "samples": "training samples"}


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
    unit = str(found["unit"])
    took = UNITS[unit]
    yield Text(
        f"Groups are compared by the {took} that their runs take to a {LOSSES[found['metric']]} of "
        f"{loss(found['target_loss'])} nats ({found['target_rule']}), and by the loss at the end. Intervals "
        f"are of {percent(found['confidence'], 0)}, over seeds."
    )
    drawn = [one for one in found["contrasts"] if one["ratio"] is not None and math.isfinite(one["ratio"])]
    if drawn:
        yield Picture(contrasts(drawn, took))
    if found["contrasts"]:
        yield _contrast_table(found["contrasts"], took)
        yield _loss_table(found["contrasts"])
    said = [*(str(one["reading"]) for one in found["contrasts"]), *map(str, found["notes"])]
    if said:
        yield Points([f"{words[:1].upper()}{words[1:]}." for words in said])
    yield _run_table(found["groups"])


def _contrast_table(found: list[Mapping[str, Any]], took: str) -> Table:
    rows = [
        (
            str(one["group"]),
            str(one["against"]),
            _ratio_or_bound(one),
            _interval(one, _ratio),
            count(one["pairs"]) if one["pairs"] else "–",
            str(one["note"] or ""),
        )
        for one in found
    ]
    columns = [
        Column("Group", "text"),
        Column("against", "text"),
        Column("Ratio"),
        Column("Interval"),
        Column("Pairs"),
        Column("Note", "text"),
    ]
    return Table(f"Ratio of the {took} to the target loss; below 1: fewer", columns, rows)


def _loss_table(found: list[Mapping[str, Any]]) -> Table:
    rows = [
        (
            str(one["group"]),
            str(one["against"]),
            *(
                text
                for name in ("final_loss", "best_loss")
                for text in (_difference(one[name]["difference"]), _interval(one[name], _difference))
            ),
        )
        for one in found
    ]
    columns = [
        Column("Group", "text"),
        Column("against", "text"),
        Column("Loss at the end", unit="nats"),
        Column("Interval", unit="nats"),
        Column("Best loss", unit="nats"),
        Column("Interval", unit="nats"),
    ]
    return Table("Differences of losses; below 0: lower", columns, rows)


def _run_table(groups: list[Mapping[str, Any]]) -> Table:
    rows = [
        (
            str(group["name"]),
            str(run["run"]),
            str(run["seed"]),
            _steps(run["steps_to_target"], run["last_step"]),
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


def _steps(to_target: float | None, last: int) -> str:
    """To one place: steps are interpolated between evaluations."""
    return f"not in {count(last)}" if to_target is None else f"{to_target:,.1f}".replace(",", THIN_SPACE)


def _ratio_or_bound(one: Mapping[str, Any]) -> str:
    """The ratio; where runs of one side never reach the target, the bound that this leaves."""
    for bound, sign in ((one["at_least"], ">"), (one["at_most"], "<")):
        if bound is not None:
            return f"{sign} {_ratio(bound)}"
    return _ratio(one["ratio"])


def _interval(one: Mapping[str, Any], text: Callable[[float | None], str]) -> str:
    return "–" if one["low"] is None else f"{text(one['low'])} to {text(one['high'])}"


def _ratio(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _difference(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:+.4f}".replace("-", "−")
