"""How the value of each domain builds up over training."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.runs import Run
from analysis.samples import RunSamples
from analysis.stream import Rows, read_pieces, whole_steps


@dataclass(frozen=True)
class DomainTrajectories:
    """Cumulative mean value of each domain.

    Attributes:
        steps: `[S]` int64, ascending: the steps that were scored.
        domains: `D` names, in alphabetical order; only those with a scored sample.
        means: `[S, D]` float64: the domain's values up to and with a step, over its samples that the run
            scored at all. The last row is therefore the mean of `values.parquet`.
    """

    steps: NDArray[np.int64]
    domains: list[str]
    means: NDArray[np.float64]


class DomainSums:
    """Values summed by step and domain; of long runs by several successive steps at a time.

    Args:
        domains: How many there are, `D`.
        points: How many sums over time are kept of a domain at most; None: one for each scored step.
    """

    def __init__(self, domains: int, points: int | None = None) -> None:
        self._points = points
        self._width = 1  # scored steps in a bin
        self.scored_steps = 0
        self._last = np.zeros(0, dtype=np.int64)  # of each bin the last step so far
        self._sums = np.zeros((0, domains))

    def add(self, rows: Rows, domain: NDArray[np.int32]) -> None:
        """Add rows, with all rows of their steps, and the positions `[n]` of their samples' domains."""
        starts = rows.step_starts()
        scored = self.scored_steps + np.arange(len(starts))  # [steps]: their numbers
        self.scored_steps += len(starts)
        while self._points is not None and (self.scored_steps - 1) // self._width >= self._points:
            self._halve()
        bins = scored // self._width
        self._grow(int(bins[-1]) + 1)
        self._last[bins] = rows.step[starts]  # of several steps of a bin the last one stays
        counts = np.diff(np.append(starts, len(rows)))
        place = np.repeat(bins * self._sums.shape[1], counts) + domain
        np.add.at(self._sums.reshape(-1), place, rows.value)

    def steps(self) -> NDArray[np.int64]:
        """The last step of each bin, `[S]`."""
        return self._last[: self._bins()]

    def cumulative(self) -> NDArray[np.float64]:
        """Each domain's values up to and with these steps, `[S, D]`."""
        return np.cumsum(self._sums[: self._bins()], axis=0)

    def _bins(self) -> int:
        return -(-self.scored_steps // self._width)

    def _grow(self, bins: int) -> None:
        if bins > len(self._last):
            more = max(bins, 2 * len(self._last)) - len(self._last)
            self._last = np.pad(self._last, (0, more))
            self._sums = np.pad(self._sums, ((0, more), (0, 0)))

    def _halve(self) -> None:
        """Put every two bins together."""
        self._width *= 2
        self._grow(len(self._last) + len(self._last) % 2)
        self._last = np.maximum(self._last[0::2], self._last[1::2])  # a bin without steps has 0
        self._sums = self._sums[0::2] + self._sums[1::2]


def domain_trajectories(run: Run) -> DomainTrajectories:
    """Sum the score rows by step and domain; rows that are not finite are left out.

    Raises:
        AnalysisError: a file is missing or damaged, or a score row belongs to no sample.
    """
    samples = RunSamples.of(run)
    scored = np.zeros(samples.size, dtype=bool)
    sums = DomainSums(len(samples.domains))
    for rows in whole_steps(read_pieces(run)):
        sums.add(rows, samples.domains_of(rows.sample))
        scored[rows.sample] = True
    counts = np.bincount(samples.domain_of[scored], minlength=len(samples.domains))
    present = counts > 0
    names = [name for name, has in zip(samples.domains, present, strict=True) if has]
    return DomainTrajectories(sums.steps(), names, sums.cumulative()[:, present] / counts[present])
