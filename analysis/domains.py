"""How the value of each domain builds up over training."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.errors import AnalysisError
from analysis.runs import Run
from ghost.values import row_values


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


def domain_trajectories(run: Run) -> DomainTrajectories:
    """Sum the score rows by step and domain; rows that are not finite are left out, as in `values.parquet`.

    Raises:
        AnalysisError: a file is missing or damaged, or a score row belongs to no sample.
    """
    names, code_of = _domain_codes(run)
    scored = np.zeros(code_of.size, dtype=bool)
    by_step: dict[int, NDArray[np.float64]] = {}
    for shard in run.scores():
        value, step, sample = (t.numpy() for t in (row_values(shard), shard["step"], shard["sample"]))
        keep = np.isfinite(value)
        value, step, sample = value[keep], step[keep], sample[keep]
        if sample.size and (sample.max() >= code_of.size or sample.min() < 0 or (code_of[sample] < 0).any()):
            raise AnalysisError(f"{run.directory}/samples.parquet lacks a sample that the score shards name.")
        scored[sample] = True
        found, row = np.unique(step, return_inverse=True)
        sums = np.zeros((found.size, len(names)))
        np.add.at(sums, (row, code_of[sample]), value)
        for number, total in zip(found.tolist(), sums, strict=True):
            by_step[number] = by_step.get(number, 0.0) + total
    counts = np.bincount(code_of[scored], minlength=len(names))
    present = counts > 0
    steps = np.array(sorted(by_step), dtype=np.int64)
    sums = np.stack([by_step[step] for step in steps.tolist()]) if by_step else np.zeros((0, len(names)))
    means = np.cumsum(sums[:, present], axis=0) / counts[present]
    return DomainTrajectories(steps, [name for name, has in zip(names, present, strict=True) if has], means)


def _domain_codes(run: Run) -> tuple[list[str], NDArray[np.int64]]:
    """Domain names, and for each running index the position of its domain among them (-1: no such sample)."""
    index = run.samples["index"].to_numpy()
    names, codes = np.unique(run.samples["domain"].to_numpy().astype(str), return_inverse=True)
    code_of = np.full(int(index.max(initial=-1)) + 1, -1, dtype=np.int64)
    code_of[index] = codes
    return names.tolist(), code_of
