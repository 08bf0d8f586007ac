"""Samples across runs: which are the same, and what the runs say of each."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.aggregate.run_sums import RunSums
from analysis.aggregate.tables import VALUES
from analysis.errors import AnalysisError
from analysis.ranks import rank_shares


@dataclass(frozen=True)
class RunValues:
    """A run's values of the samples that it scored: positions among the samples of all runs, and values."""

    name: str
    position: NDArray[np.int64]
    value: NDArray[np.float64]


class SampleTotals:
    """Merges runs one after the other; memory is a few numbers a sample, and two a sample and run."""

    def __init__(self) -> None:
        self.runs: list[RunValues] = []
        self.ids: pa.Array = pa.array([], pa.string())
        self.domain = np.zeros(0, dtype=np.int32)  # [N]: codes of `domain_names`
        self._domain_code: dict[str, int] = {}
        self._scored_by = np.zeros(0, dtype=np.int64)
        self._seen = np.zeros(0, dtype=np.int64)
        self._step_rows = np.zeros(0, dtype=np.int64)
        self._spread_rows = np.zeros(0, dtype=np.int64)  # Σ over runs of rows - 1
        self._step_shares = np.zeros(0)
        self._deviations = np.zeros(0)

    def add(self, sums: RunSums) -> NDArray[np.int64]:
        """Add a run, and return the positions `[n]` of its samples among those of all runs.

        Raises:
            AnalysisError: The run has an id twice, or in another domain than an earlier run.
        """
        position = self._positions(sums)
        self._grow()
        self._scored_by[position] += 1  # a run has each position once
        self._seen[position] += sums.times_seen
        if sums.by_step is not None:
            self._step_rows[position] += sums.times_seen
            self._spread_rows[position] += sums.times_seen - 1
            self._step_shares[position] += sums.by_step.shares
            self._deviations[position] += sums.by_step.deviations
        self.runs.append(RunValues(sums.run.name, position, sums.value))
        return position

    def __len__(self) -> int:
        return len(self.ids)

    def domains(self) -> pa.Array:
        """The samples' domains `[N]`, as strings."""
        return pa.array(list(self._domain_code), pa.string()).take(pa.array(self.domain))

    def table(self) -> pa.Table:
        """A row for each sample, in the order in which runs brought them; the schema is `tables.VALUES`."""
        size, scored_by = len(self), self._scored_by
        total, ranks, positive, negative = (np.zeros(size) for _ in range(4))
        low, high = np.full(size, np.inf), np.full(size, -np.inf)
        for run in self.runs:
            total[run.position] += run.value
            ranks[run.position] += rank_shares(run.value[None])[0]
            positive[run.position] += run.value > 0
            negative[run.position] += run.value < 0
            low[run.position] = np.minimum(low[run.position], run.value)
            high[run.position] = np.maximum(high[run.position], run.value)
        mean = total / scored_by
        squares = np.zeros(size)
        for run in self.runs:
            squares[run.position] += (run.value - mean[run.position]) ** 2
        columns = {
            "sample_id": self.ids,
            "domain": self.domains(),
            "value": mean,
            "times_seen": self._seen,
            "runs": scored_by,
            "std": _root_of_quotient(squares, scored_by - 1),
            "low": low,
            "high": high,
            "rank": _ranks(mean, self.ids),
            "run_rank": ranks / scored_by,
            "step_rank": _quotient(self._step_shares, self._step_rows),
            "step_std": _root_of_quotient(self._deviations, self._spread_rows),
            "positive": positive / scored_by,
            "sign_stability": np.maximum(positive, negative) / scored_by,
        }
        return pa.table(columns, schema=VALUES)

    def _positions(self, sums: RunSums) -> NDArray[np.int64]:
        if pc.count_distinct(sums.ids).as_py() < len(sums.ids):
            counts = pc.value_counts(sums.ids)
            twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
            raise AnalysisError(
                f"{sums.run.directory} scored two samples of the id {twice.as_py()!r}: ids tell samples apart"
            )
        domain = self._domain_codes(sums.domains)
        found = pc.index_in(sums.ids, value_set=self.ids)
        new = found.is_null().to_numpy(zero_copy_only=False)
        position = found.fill_null(0).to_numpy().astype(np.int64)
        known = np.flatnonzero(~new)
        differ = known[self.domain[position[known]] != domain[known]]
        if differ.size:
            self._refuse_domain(sums, int(differ[0]), int(position[differ[0]]))
        position[new] = len(self.ids) + np.arange(int(new.sum()))
        self.ids = pa.concat_arrays([self.ids, sums.ids.filter(pa.array(new))])
        self.domain = np.concatenate([self.domain, domain[new]])
        return position

    def _domain_codes(self, domains: pa.DictionaryArray) -> NDArray[np.int32]:
        names = domains.dictionary.to_pylist()
        codes = [self._domain_code.setdefault(name, len(self._domain_code)) for name in names]
        return np.array(codes, dtype=np.int32)[domains.indices.to_numpy()]

    def _refuse_domain(self, sums: RunSums, place: int, position: int) -> None:
        first = next(run.name for run in self.runs if position in run.position)
        before = list(self._domain_code)[self.domain[position]]
        raise AnalysisError(
            f"{sums.ids[place].as_py()} has domain {before!r} in run {first} and "
            f"{sums.domains[place].as_py()!r} in run {sums.run.name}: aggregate runs whose "
            "samples have the same domains"
        )

    def _grow(self) -> None:
        more = len(self.ids) - len(self._seen)
        for name in ("_scored_by", "_seen", "_step_rows", "_spread_rows", "_step_shares", "_deviations"):
            setattr(self, name, np.pad(getattr(self, name), (0, more)))


def _ranks(value: NDArray[np.float64], ids: pa.Array) -> NDArray[np.int64]:
    """1 for the highest value; of equal values the first id in the alphabet is the higher."""
    keys = pa.table({"value": value, "sample_id": ids})
    order = pc.sort_indices(keys, sort_keys=[("value", "descending"), ("sample_id", "ascending")])
    ranks = np.empty(len(value), dtype=np.int64)
    ranks[order.to_numpy()] = np.arange(1, len(value) + 1)
    return ranks


def _quotient(total: NDArray[np.float64], count: NDArray[np.int64]) -> pa.Array:
    """`total / count`, null where there is nothing to divide by."""
    return pa.array(total / np.maximum(count, 1), mask=count <= 0)


def _root_of_quotient(total: NDArray[np.float64], count: NDArray[np.int64]) -> pa.Array:
    return pc.sqrt(_quotient(total, count))
