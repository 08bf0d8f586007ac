"""The sections on values: how they are spread, whose they are, and which samples stand out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.errors import AnalysisError
from analysis.plots import domain_value, value_histogram
from analysis.report.numbers import Scale, count, percent
from analysis.report.page import Block, Column, Picture, Sample, Section, Table, Text, signed_bars
from analysis.runs import Run

SHOWN = 12  # samples at either end
_DOMAINS = 40  # rows of a table

Previews = Mapping[str, str]


@dataclass(frozen=True)
class Ranked:
    """The samples that have a finite value, highest first; ties by id.

    Attributes:
        ids, domains: `[n]`.
        values: `[n]` float64.
        seen: `[n]` int64: how often each was scored.
        not_finite: How many others there are.
    """

    ids: NDArray[np.str_]
    domains: NDArray[np.str_]
    values: NDArray[np.float64]
    seen: NDArray[np.int64]
    not_finite: int

    @classmethod
    def of(cls, table: pa.Table) -> "Ranked":
        """From a table with the columns of `values.parquet`."""
        finite = table.filter(pc.is_finite(table["value"]))
        finite = finite.sort_by([("value", "descending"), ("sample_id", "ascending")])
        return cls(
            finite["sample_id"].to_numpy().astype(str),
            finite["domain"].to_numpy().astype(str),
            finite["value"].to_numpy(),
            finite["times_seen"].to_numpy(),
            len(table) - len(finite),
        )

    @property
    def negative(self) -> float:
        """The share of values below zero."""
        return float((self.values < 0).mean())

    def ends(self) -> tuple[range, range]:
        """Places of the first few and of the last few, the latter lowest first; no sample is in both."""
        n = self.values.size
        highest = min(SHOWN, (n + 1) // 2)
        lowest = min(SHOWN, n - highest)
        return range(highest), range(n - 1, n - 1 - lowest, -1)


def ranked_values(run: Run) -> Ranked:
    """The run's values.

    Raises:
        AnalysisError: There are none, or none is finite.
    """
    found = Ranked.of(run.values)
    if not found.values.size:
        raise AnalysisError(f"{run.directory}/values.parquet has no finite value.")
    return found


def shown_samples(run: Run) -> list[str]:
    """Ids of the samples that a report of this run names.

    Raises:
        AnalysisError: The run has no values.
    """
    found = ranked_values(run)
    return [str(found.ids[place]) for end in found.ends() for place in end]


def spread_section(run: Run) -> Section:
    """How the values are spread."""
    found = ranked_values(run)
    most, least = found.values.max(), found.values.min()
    scale = Scale.of([most, least, float(np.median(found.values))])
    unit = scale.unit("nats")
    text = (
        f"Of {count(found.values.size)} scored samples {percent(1 - found.negative)} have a value of zero or "
        f"more and {percent(found.negative)} a negative one. The median is "
        f"{scale.text(float(np.median(found.values)))}, the range {scale.text(least)} to {scale.text(most)} "
        f"({unit})."
    )
    blocks: list[Block] = [Text(text), Picture(value_histogram(run))]
    if found.not_finite:
        blocks.insert(
            1, Text(f"{count(found.not_finite)} samples have no finite value and are left out here.")
        )
    return Section("How values are spread", blocks)


def samples_section(run: Run, previews: Previews | None) -> Section:
    """The samples at either end, by id; with their words only where these are given."""
    found = ranked_values(run)
    top, bottom = found.ends()
    longest = float(np.abs(found.values).max()) or 1.0

    def table(caption: str, places: Sequence[int]) -> Table:
        names = [str(found.ids[place]) for place in places]
        numbers = [float(found.values[place]) for place in places]
        scale = Scale.of(numbers)
        rows = [
            (
                Sample(name, None if previews is None else previews.get(name)),
                scale.text(number),
                bar,
                str(found.domains[place]),
                count(int(found.seen[place])),
            )
            for name, number, bar, place in zip(
                names, numbers, signed_bars(numbers, longest), places, strict=True
            )
        ]
        columns = [
            Column("Sample", "id"),
            Column("Value", unit=scale.unit("nats")),
            Column("", "bar"),
            Column("Domain", "text"),
            Column("Times scored"),
        ]
        return Table(caption, columns, rows)

    # Values of a run may all have one sign; helping and harming start at zero.
    highest = "The samples that helped most" if found.values[0] > 0 else "The samples that harmed least"
    blocks: list[Block] = [table(highest, top)]
    if bottom:
        lowest = "The samples that harmed most" if found.values[-1] < 0 else "The samples that helped least"
        blocks.append(table(lowest, bottom))
    return Section("Samples that stand out", blocks)


@dataclass(frozen=True)
class DomainTotal:
    """One domain's values; `share` is of the sum of the domains' absolute totals."""

    domain: str
    samples: int
    total: float
    share: float
    mean: float
    negative: float


def domain_totals(values: NDArray[np.float64], domains: NDArray[np.str_]) -> list[DomainTotal]:
    """Values `[n]` by their domains `[n]`, the highest mean first."""
    names, codes = np.unique(domains, return_inverse=True)
    samples = np.bincount(codes)
    totals = np.bincount(codes, weights=values)
    negative = np.bincount(codes, weights=values < 0)
    whole = float(np.abs(totals).sum()) or 1.0
    found = [
        DomainTotal(str(name), int(n), float(total), float(total) / whole, float(total / n), float(below / n))
        for name, n, total, below in zip(names, samples, totals, negative, strict=True)
    ]
    return sorted(found, key=lambda one: (-one.mean, one.domain))


def domains_section(run: Run) -> Section:
    """What each domain is worth, and when its value arose."""
    values = ranked_values(run)
    found = domain_totals(values.values, values.domains)
    blocks: list[Block] = [domain_table(found)]
    if len(found) > _DOMAINS:
        blocks.append(Text(f"{len(found) - _DOMAINS} more domains are between these, by their means."))
    blocks.append(Picture(domain_value(run)))
    return Section("Domains", blocks)


def domain_table(found: Sequence[DomainTotal]) -> Table:
    """A row for each domain; of very many, those at either end."""
    shown = list(found if len(found) <= _DOMAINS else [*found[: _DOMAINS // 2], *found[-_DOMAINS // 2 :]])
    means, totals = Scale.of([one.mean for one in shown]), Scale.of([one.total for one in shown])
    rows = [
        (
            one.domain,
            means.text(one.mean),
            totals.text(one.total),
            percent(one.share),
            bar,
            count(one.samples),
            percent(one.negative, 0),
        )
        for one, bar in zip(shown, signed_bars([one.share for one in shown]), strict=True)
    ]
    columns = [
        Column("Domain", "text"),
        Column("Mean value", unit=means.unit("nats")),
        Column("Total", unit=totals.unit("nats")),
        Column("Share"),
        Column("", "bar"),
        Column("Samples"),
        Column("Negative"),
    ]
    caption = "Value by domain; shares are of the sum of all domains' totals without their signs"
    return Table(caption, columns, rows)
