"""How rows differ from the row that they are held against, seed by seed."""

from collections.abc import Mapping, Sequence

from analysis.compare.contrasts import Estimate, difference
from analysis.fidelity.summary import Row

METHOD = "method"
"""A row's method among the names of a reference; its other names are coordinates."""


def differences(rows: Sequence[Row], reference: Mapping[str, str], compared: Sequence[str]) -> list[Row]:
    """What every other row is above the reference row of its place, measure by measure.

    All rows of a seed share model, samples and random numbers: differences within a seed vary less than
    either row does over seeds.

    Args:
        reference: What a reference row has in the place of a row's own `METHOD` or coordinates.
        compared: The measures.

    Returns:
        Rows of mean differences over the seeds that both have; a row that shares no measure with its
        reference is left out.
    """
    by_identity = {_identity(row, {}): row for row in rows}
    found = []
    for row in rows:
        against = by_identity.get(_identity(row, reference))
        if against is None or against is row:
            continue
        pairs = {measure: _shared_seeds(row, against, measure) for measure in compared}
        estimates = {
            measure: difference(row.numbers[measure], against.numbers[measure], seeds)
            for measure, seeds in pairs.items()
            if seeds
        }
        if estimates:
            found.append(Row(row.coordinates, row.method, estimates, max(map(len, pairs.values()))))
    return found


def leaves_zero_out(estimate: Estimate) -> bool:
    """Whether the interval, where there is one, lies on one side of 0."""
    if estimate.low is None or estimate.high is None:
        return False
    return estimate.low > 0 or estimate.high < 0


def _identity(row: Row, instead: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset({**row.coordinates, METHOD: row.method, **instead}.items())


def _shared_seeds(row: Row, against: Row, measure: str) -> list[int]:
    """The seeds that have the measure of both."""
    return sorted(set(row.numbers.get(measure, {})) & set(against.numbers.get(measure, {})))
