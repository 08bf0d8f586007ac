"""The sections on the training itself: losses, what the scores speak of, and what scoring cost."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.errors import AnalysisError
from analysis.plots import TRAIN_LOSS, VAL_LOSS, losses
from analysis.report.facts import read_json
from analysis.report.numbers import count, percent
from analysis.report.page import Block, Column, Facts, Picture, Section, Table, Text, share_bars
from analysis.runs import Run

OVERHEAD = "scoring/overhead"
COVERAGE_FILE = "coverage.json"
_GAPS = 20  # rows of a table


def losses_section(run: Run) -> Section:
    """Training and validation loss."""
    if not (run.series(TRAIN_LOSS) or run.series(VAL_LOSS)):
        raise AnalysisError(f"{run.directory}/metrics.jsonl has neither {TRAIN_LOSS} nor {VAL_LOSS}.")
    return Section("Losses", [Picture(losses(run))])


def coverage_section(run: Run) -> Section:
    """Which families of layers are scored, and what is left out."""
    path = run.directory / COVERAGE_FILE
    found = read_json(path)
    try:
        return Section("Coverage", list(_coverage_blocks(found)))
    except (KeyError, TypeError, AttributeError) as error:
        raise AnalysisError(f"{path} is damaged: it lacks {error}.") from error


def scored_shares(run: Run) -> tuple[float, float]:
    """Shares of the trainable parameters and of the squared validation gradient that are scored.

    Raises:
        AnalysisError: `coverage.json` is missing or damaged.
    """
    found = read_json(run.directory / COVERAGE_FILE)
    try:
        return float(found["scored_parameter_share"]), float(found["scored_val_grad_share"])
    except (KeyError, TypeError, ValueError) as error:
        raise AnalysisError(f"{run.directory / COVERAGE_FILE} is damaged: it lacks {error}.") from error


def cost_section(run: Run) -> Section:
    """What scoring cost, and how fast the run was."""
    facts = [*_overhead_facts(run), *_speed_facts(run)]
    if not facts:
        raise AnalysisError(f"{run.directory}/metrics.jsonl says nothing of cost, speed or memory.")
    scored = _overhead_text(run)
    return Section("Cost of scoring" if scored else "Speed and memory", [*scored, Facts(facts)])


def finite(run: Run, name: str) -> list[float]:
    """The finite numbers of a metric, step by step."""
    return [value for value in run.series(name).values() if math.isfinite(value)]


def _coverage_blocks(found: Mapping[str, Any]) -> list[Block]:
    whole = (
        f"{percent(found['scored_parameter_share'])} of the {count(found['parameters'])} trainable "
        f"parameters are scored, with {percent(found['scored_val_grad_share'])} of the validation gradient's "
        "squared norm at the start. What is not scored is trained all the same; values do not speak of it."
    )
    blocks: list[Block] = [Text(whole), _family_table(found["families"])]
    gaps = found["gaps"]
    if gaps:
        blocks.append(_gap_table(gaps[:_GAPS]))
    if len(gaps) > _GAPS:
        blocks.append(Text(f"{len(gaps) - _GAPS} smaller ones are in {COVERAGE_FILE}."))
    if found["unscored_parameters"]:
        names = ", ".join(found["unscored_parameters"][:_GAPS])
        blocks.append(Text(f"Parameters that no layer accounts for: {names}."))
    return blocks


def _family_table(families: Mapping[str, Mapping[str, float]]) -> Table:
    rows = [
        (
            name,
            percent(one["parameter_share"]),
            percent(one["scored_parameter_share"]),
            percent(one["val_grad_share"]),
            percent(one["scored_val_grad_share"]),
            bar,
        )
        for (name, one), bar in zip(
            families.items(),
            share_bars([one["scored_val_grad_share"] for one in families.values()]),
            strict=True,
        )
    ]
    caption = (
        "Shares of the model by family of layers, what layers share at the first that has it; bars: scored "
        "share of the squared gradient"
    )
    columns = [
        Column("Family", "text"),
        Column("Parameters"),
        Column("scored"),
        Column("Squared gradient"),
        Column("scored"),
        Column("", "bar"),
    ]
    return Table(caption, columns, rows)


def _gap_table(gaps: list[Mapping[str, Any]]) -> Table:
    rows = [
        (gap["name"], count(gap["layers"]), percent(gap["parameter_share"]), percent(gap["val_grad_share"]))
        for gap in gaps
    ]
    columns = [Column("Left out", "id"), Column("Layers"), Column("Parameters"), Column("Squared gradient")]
    return Table("What is not scored", columns, rows)


def _overhead_text(run: Run) -> list[Block]:
    if not run.series(OVERHEAD):
        return []
    text = (
        "The cost of scoring is the extra time of a scored step as a share of a plain one over the same "
        "rows, which is timed beside it now and then."
    )
    return [Text(text)]


def _overhead_facts(run: Run) -> list[tuple[str, str]]:
    """The run logs its median so far at each step; the last is that of the whole run."""
    found = finite(run, OVERHEAD)
    if not found:
        return []
    low, high = np.quantile(found, [0.25, 0.75])
    return [
        ("Extra time of a scored step, median", percent(found[-1])),
        ("The same over the middle half of the steps", f"{percent(low)} to {percent(high)}"),
    ]


def _speed_facts(run: Run) -> list[tuple[str, str]]:
    facts = []
    for name, label in (
        ("train/tokens_per_second", "Tokens a second, median"),
        ("train/samples_per_second", "Samples a second, median"),
        ("projection/samples_per_second", "Samples projected a second, median"),
    ):
        if rates := finite(run, name):
            facts.append((label, count(float(np.median(rates)))))
    for name, label in (
        ("memory/peak_gb", "Largest host memory"),
        ("memory/peak_device_gb", "Largest device memory"),
    ):
        if sizes := finite(run, name):
            facts.append((label, f"{max(sizes):.2f} GB"))
    return facts
