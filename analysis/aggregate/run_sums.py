"""One run's scores, reduced to sums by sample, by domain and step, and by column."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.aggregate.column_sums import ColumnSums, ColumnValues
from analysis.domains import DomainSums
from analysis.errors import AnalysisError
from analysis.runs import Run
from analysis.samples import RunSamples
from analysis.stream import CHUNK_ROWS, Piece, Rows, Steps, read_pieces, whole_steps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepStatistics:
    """What only score rows tell of the scored samples, each `[n]`.

    Attributes:
        shares: Σ over a sample's rows of the rank's share within the step.
        deviations: Σ over them of the squared deviation from the sample's mean row.
    """

    shares: NDArray[np.float64]
    deviations: NDArray[np.float64]


@dataclass(frozen=True)
class RunSums:
    """A run reduced to its samples.

    Attributes:
        run: Which one.
        ids: Ids of the `n` samples that the run scored.
        domains: Their domains, dictionary-encoded.
        value: `[n]` float64.
        times_seen: `[n]` int64.
        by_step: None for a run that left no score shards here.
        scored_steps: How many steps were scored; None as above.
        trajectories: `step, domain, total`: values up to and with a step; None as above.
        columns: Values by part of the model and validation set or sample; None where scores have one column.
    """

    run: Run
    ids: pa.Array
    domains: pa.DictionaryArray
    value: NDArray[np.float64]
    times_seen: NDArray[np.int64]
    by_step: StepStatistics | None
    scored_steps: int | None
    trajectories: pa.Table | None
    columns: ColumnValues | None


def sum_run(run: Run, steps: Steps | None, points: int, most_rows: int = CHUNK_ROWS) -> RunSums:
    """Reduce a run's score rows, or else its `values.parquet`.

    Args:
        steps: Only rows of the steps from the first to the second; None: all.
        points: Steps of a trajectory at most.
        most_rows: Score rows that are in memory at a time, about.

    Raises:
        AnalysisError: A file is missing or damaged, files do not fit each other, or `steps` cannot be told
            apart without score shards.
    """
    if run.has_shards:
        return _from_shards(run, steps, points, most_rows)
    if steps is not None:
        raise AnalysisError(
            f"{run.directory} has no score shards, so steps=[{steps[0]},{steps[1]}] cannot be told apart: "
            "leave the run or the key out"
        )
    log.warning("%s has no score shards here: its values count, what needs single steps is null.", run.name)
    return _from_values(run)


class SampleSums:
    """Sums over score rows, by running index below `size`."""

    def __init__(self, size: int) -> None:
        self.seen = np.zeros(size, dtype=np.int64)
        self.value = np.zeros(size)
        self._shares = np.zeros(size)
        # Deviations are from a sample's first row, so that the difference of two large sums is none.
        self._first = np.zeros(size)
        self._shifted = np.zeros(size)
        self._squares = np.zeros(size)

    def add(self, rows: Rows) -> None:
        """Add rows, with all rows of their steps."""
        new = np.flatnonzero(self.seen[rows.sample] == 0)
        new = new[::-1]  # of a sample's rows the first is written last, and stays
        self._first[rows.sample[new]] = rows.value[new]
        shifted = rows.value - self._first[rows.sample]
        np.add.at(self.seen, rows.sample, 1)
        np.add.at(self.value, rows.sample, rows.value)
        np.add.at(self._shares, rows.sample, rows.step_shares())
        np.add.at(self._shifted, rows.sample, shifted)
        np.add.at(self._squares, rows.sample, shifted * shifted)

    def statistics(self, index: NDArray[np.int64]) -> StepStatistics:
        """Of the samples with these running indices, each of which has a row."""
        shifted = self._shifted[index]
        deviations = self._squares[index] - shifted * shifted / self.seen[index]
        return StepStatistics(self._shares[index], np.maximum(deviations, 0.0))


def _from_shards(run: Run, steps: Steps | None, points: int, most_rows: int) -> RunSums:
    samples = RunSamples.of(run)
    sums, by_domain = SampleSums(samples.size), DomainSums(len(samples.domains), points)
    columns = ColumnSums(samples)
    pieces = _adding_columns(run, read_pieces(run, steps, most_rows), columns)
    for rows in whole_steps(pieces, most_rows):
        by_domain.add(rows, samples.domains_of(rows.sample))
        sums.add(rows)
    index = np.flatnonzero(sums.seen)
    if steps is None:
        _check_rows(run, int(sums.seen.sum()))
    names = pa.array(samples.domains, pa.string())
    return RunSums(
        run=run,
        ids=samples.ids(index),
        domains=pa.DictionaryArray.from_arrays(pa.array(samples.domain_of[index]), names),
        value=sums.value[index],
        times_seen=sums.seen[index],
        by_step=sums.statistics(index),
        scored_steps=by_domain.scored_steps,
        trajectories=_trajectories(by_domain, samples, index),
        columns=columns.result(index),
    )


def _adding_columns(run: Run, pieces: Iterable[Piece], columns: ColumnSums) -> Iterator[Piece]:
    """The pieces, once their columns are summed; says at the end how many rows were left out."""
    lost = 0
    for piece in pieces:
        columns.add(piece)
        lost += piece.lost
        yield piece
    if lost:
        log.warning("%s: %d score rows are not finite and are left out.", run.name, lost)


def _check_rows(run: Run, rows: int) -> None:
    """Raises `AnalysisError` where the shards hold other rows than the run's values were made of."""
    there = pc.sum(run.values["times_seen"]).as_py() or 0
    if there != rows:
        raise AnalysisError(
            f"{run.directory}/scores has {rows} rows that count and values.parquet was made of {there}: "
            "shards are missing or of another run"
        )


def _trajectories(by_domain: DomainSums, samples: RunSamples, index: NDArray[np.int64]) -> pa.Table:
    """`step, domain, total` of the domains that have one of the samples."""
    present = np.unique(samples.domain_of[index])
    steps, totals = by_domain.steps(), by_domain.cumulative()[:, present]
    names = pa.array(samples.domains, pa.string()).take(pa.array(np.tile(present, len(steps))))
    columns = [pa.array(np.repeat(steps, len(present))), names, pa.array(totals.reshape(-1))]
    return pa.table(columns, names=["step", "domain", "total"])


def _from_values(run: Run) -> RunSums:
    finite = pc.is_finite(run.values["value"])
    table = run.values.filter(finite).combine_chunks()
    if lost := run.values.num_rows - table.num_rows:
        log.warning("%s: %d samples have no finite value and are left out.", run.name, lost)
    return RunSums(
        run=run,
        ids=table["sample_id"].combine_chunks(),
        domains=table["domain"].combine_chunks().dictionary_encode(),
        value=table["value"].to_numpy(),
        times_seen=table["times_seen"].to_numpy(),
        by_step=None,
        scored_steps=None,
        trajectories=None,
        columns=None,
    )
