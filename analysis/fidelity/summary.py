"""Points of an experiment as rows: means over seeds with intervals."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from rich.table import Table
from rich.text import Text

from analysis.compare.contrasts import Estimate, interval_of_mean

SEED = "seed"


@dataclass(frozen=True)
class Measurement:
    """One point: where it is, the seed among its coordinates, and what was measured there.

    Attributes:
        metrics: By name, `measure/method`, or the measure alone where no method is in question.
        course: Numbers on the way, by name and step.
    """

    coordinates: Mapping[str, str]
    metrics: Mapping[str, float]
    course: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One method at one place.

    Attributes:
        coordinates: Without the seed.
        method: Empty for what is measured of the place itself.
        estimates: By measure.
        seeds: How many points it is the mean of.
        numbers: What the estimates are of, by measure and seed.
    """

    coordinates: Mapping[str, str]
    method: str
    estimates: Mapping[str, Estimate]
    seeds: int
    numbers: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


def summarise(measurements: Sequence[Measurement]) -> list[Row]:
    """A row for each place and method, places in the order of their coordinates, methods in that of the first
    point's metrics.
    """
    places: dict[tuple[tuple[str, str], ...], list[Measurement]] = defaultdict(list)
    for one in measurements:
        places[tuple((name, text) for name, text in one.coordinates.items() if name != SEED)].append(one)
    return [
        row
        for place in sorted(places, key=lambda place: [_natural(text) for _, text in place])
        for row in _rows(dict(place), places[place])
    ]


def _rows(coordinates: Mapping[str, str], repetitions: Sequence[Measurement]) -> list[Row]:
    numbers: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in repetitions:
        for name, number in one.metrics.items():
            measure, _, method = name.partition("/")
            numbers[method][measure][int(one.coordinates[SEED])] = number
    return [
        Row(
            coordinates, method,
            {measure: interval_of_mean(list(found.values())) for measure, found in measures.items()},
            len(repetitions), measures,
        )
        for method, measures in numbers.items()
    ]  # fmt: skip


def _natural(text: str) -> tuple[bool, float, str]:
    """Sorts 0.0006 before 0.005, and words behind numbers."""
    number = re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text)
    return (number is None, float(text) if number else 0.0, text)


def measures(rows: Sequence[Row]) -> list[str]:
    """All measures of the rows, in the order in which they come."""
    return list(dict.fromkeys(measure for row in rows for measure in row.estimates))


def alike(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows parted so that those of two parts share no measure, parts in the order of their first rows."""
    parts: list[list[int]] = []
    for i, row in enumerate(rows):
        near = [part for part in parts if any(rows[j].estimates.keys() & row.estimates.keys() for j in part)]
        parts = [*(part for part in parts if part not in near), sorted([*chain(*near), i])]
    return [[rows[i] for i in part] for part in sorted(parts)]


def estimate_text(estimate: Estimate) -> str:
    """`0.98 ± 0.01`: the mean and half of its interval, digits as the half asks for them."""
    if estimate.high is None:
        return f"{estimate.mean:.3g}"
    half = estimate.high - estimate.mean
    if half == 0:
        return f"{estimate.mean:.3g} ± 0"
    if max(abs(estimate.mean), half) < 0.001:
        return f"{estimate.mean:.2e} ± {half:.1e}"
    return f"{estimate.mean:.3f} ± {half:.3f}"


def console_tables(title: str, rows: Sequence[Row]) -> list[Table]:
    """The rows for a terminal: methods, then what is measured of the places themselves, parted as `alike`
    parts them.
    """
    kinds = [[row for row in rows if row.method], [row for row in rows if not row.method]]
    return [_console_table(title, part) for kind in kinds for part in alike(kind)]


def _console_table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{title}: means over seeds, with 95 % intervals", title_justify="left")
    coordinates = list(rows[0].coordinates)
    for heading in (*coordinates, "method"):
        table.add_column(heading, no_wrap=True)
    for measure in measures(rows):
        table.add_column(measure.replace("_", " "), justify="right")
    for row in rows:
        cells = [row.estimates.get(measure) for measure in measures(rows)]
        table.add_row(
            *(Text(row.coordinates[name]) for name in coordinates), Text(row.method or "–"),
            *("" if cell is None else estimate_text(cell) for cell in cells),
        )  # fmt: skip
    return table
