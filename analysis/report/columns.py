"""The section on values by column: by part of the model, validation set or validation sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.errors import AnalysisError
from analysis.report.facts import setting
from analysis.report.numbers import Scale, percent
from analysis.report.page import Block, Cell, Column, Section, Table, Text, Tinted, signed_bars
from analysis.runs import Run

COLUMNS_FILE = "values_by_column.parquet"
_OWN = ("sample_id", "domain")
_SHOWN = 24  # columns of the scores, as rows of the table
_WIDE = 12  # columns of the table of domains
_TALL = 30  # its rows


def is_resolved(config: Mapping[str, Any]) -> bool:
    """Whether the scores of a run with this config have several columns."""
    return bool(_has_parts(config) or _has_sets(config))


def columns_section(run: Run) -> Section:
    """What each column adds up to, and what each training domain does for each validation set.

    Raises:
        AnalysisError: The table is missing or damaged.
    """
    domains, columns = _read(run)
    totals = {name: float(np.nansum(values)) for name, values in columns.items()}
    blocks: list[Block] = [_totals_table(totals, _heading(run.config))]
    if len(totals) > _SHOWN:
        blocks.append(Text(f"{len(totals) - _SHOWN} columns with smaller totals are in {COLUMNS_FILE}."))
    sets = _by_set(columns, run.config)
    if 1 < len(sets) <= _WIDE:
        blocks.append(_domain_matrix(domains, sets))
    return Section("Values by part", blocks)


def _read(run: Run) -> tuple[NDArray[np.str_], dict[str, NDArray[np.float64]]]:
    path = run.directory / COLUMNS_FILE
    if not path.is_file():
        raise AnalysisError(f"{path} is missing: the run has not ended, or ended before it was written.")
    try:
        table = pq.read_table(path)
        domains = table["domain"].to_numpy().astype(str)
        return domains, {
            name: table[name].to_numpy().astype(np.float64) for name in table.column_names if name not in _OWN
        }
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise AnalysisError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _heading(config: Mapping[str, Any]) -> str:
    """What a column of this run's scores is."""
    val = "Validation sample" if setting(config, "engine.pairwise") else "Validation set"
    if not _has_parts(config):
        return val
    return f"Part | {val.lower()}" if _has_sets(config) else "Part"


def _totals_table(totals: Mapping[str, float], heading: str) -> Table:
    largest = sorted(totals, key=lambda name: -abs(totals[name]))[:_SHOWN]
    scale = Scale.of([totals[name] for name in largest])
    whole = sum(map(abs, totals.values())) or 1.0
    rows = [
        (name, scale.text(totals[name]), percent(totals[name] / whole), bar)
        for name, bar in zip(largest, signed_bars([totals[name] for name in largest]), strict=True)
    ]
    columns = [
        Column(heading, "id"),
        Column("Total", unit=scale.unit("nats")),
        Column("Share"),
        Column("", "bar"),
    ]
    caption = "What each part of the scores adds up to; the parts of a sample's score sum to its value"
    return Table(caption, columns, rows)


def _by_set(
    columns: Mapping[str, NDArray[np.float64]], config: Mapping[str, Any]
) -> dict[str, NDArray[np.float64]]:
    """Values `[n]` for each validation set, over all parts of the model; none where there is one set."""
    if not _has_sets(config):
        return {}
    sets: dict[str, NDArray[np.float64]] = {}
    for name, values in columns.items():
        label = name.partition(" | ")[2] if _has_parts(config) else name
        sets[label] = sets.get(label, 0.0) + np.nan_to_num(values)
    return sets


def _domain_matrix(domains: NDArray[np.str_], sets: Mapping[str, NDArray[np.float64]]) -> Table:
    names, codes = np.unique(domains, return_inverse=True)
    counts = np.bincount(codes)
    means = np.stack([np.bincount(codes, weights=values) / counts for values in sets.values()], axis=1)
    largest = np.argsort(-counts, kind="stable")[:_TALL]
    scale = Scale.of(means[largest].ravel().tolist())
    strongest = float(np.abs(means[largest]).max()) or 1.0

    def row(name: str, numbers: Sequence[float]) -> list[Cell]:
        return [name, *(Tinted(scale.text(number), number / strongest) for number in numbers)]

    rows = [row(str(names[place]), means[place].tolist()) for place in sorted(largest.tolist())]
    columns = [Column("Training domain", "text"), *(Column(name, unit=scale.unit("nats")) for name in sets)]
    return Table("Mean value of a training domain's samples for each validation set", columns, rows)


def _has_parts(config: Mapping[str, Any]) -> bool:
    return setting(config, "engine.resolution") not in (None, "total")


def _has_sets(config: Mapping[str, Any]) -> bool:
    return bool(setting(config, "engine.pairwise")) or setting(config, "engine.val_sets") not in (None, "one")
