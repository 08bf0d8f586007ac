"""How two groups of runs differ: ratios of steps and differences of losses, with 95 % t-intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean difference of two groups and its interval; both ends are None where there is none."""

    mean: float
    low: float | None
    high: float | None

    def exponential(self) -> "Estimate":
        """A difference of logarithms as a ratio."""
        low, high = (None if end is None else math.exp(end) for end in (self.low, self.high))
        return Estimate(math.exp(self.mean), low, high)


@dataclass(frozen=True)
class Design:
    """How the runs of two groups are held against each other.

    Attributes:
        pairs: Seeds that both groups have; empty where they are two separate samples.
        note: What this leaves out or cannot give; empty where there is nothing to say.
    """

    pairs: tuple[int, ...]
    note: str


def design(seeds: Sequence[int], against: Sequence[int]) -> Design:
    """Pairs by seed where the groups share two or more seeds, or the only one that a group has; else two
    samples.
    """
    own, other = set(seeds), set(against)
    shared = tuple(sorted(own & other))
    if len(shared) >= 2 or (shared and min(len(own), len(other)) == 1):
        left_out = len(own ^ other)
        seeds_are = "1 seed is" if left_out == 1 else f"{left_out} seeds are"
        notes = [f"{seeds_are} in one group only and left out"] if left_out else []
        notes += ["one pair: no interval"] if len(shared) == 1 else []
        return Design(shared, "; ".join(notes))
    notes = ["seeds do not match: Welch's interval"]
    if min(len(own), len(other)) < 2:
        notes = ["seeds do not match, and a group has only one: no interval"]
    return Design((), "; ".join(notes))


def difference(group: Mapping[int, float], against: Mapping[int, float], pairs: Sequence[int]) -> Estimate:
    """The mean of `group - against`.

    Args:
        group, against: One number a seed.
        pairs: The seeds to pair by; empty: two separate samples.
    """
    if pairs:
        return interval_of_mean([group[seed] - against[seed] for seed in pairs])
    return _welch(list(group.values()), list(against.values()))


def interval_of_mean(numbers: Sequence[float]) -> Estimate:
    """The mean with its t-interval; of one number there is none."""
    mean = float(np.mean(numbers))
    if len(numbers) < 2:
        return Estimate(mean, None, None)
    return _around(mean, _squared_error(numbers), len(numbers) - 1)


def _welch(ones: Sequence[float], others: Sequence[float]) -> Estimate:
    mean = float(np.mean(ones) - np.mean(others))
    if min(len(ones), len(others)) < 2:
        return Estimate(mean, None, None)
    first, second = _squared_error(ones), _squared_error(others)
    if first + second == 0:
        return Estimate(mean, mean, mean)
    # Welch and Satterthwaite's degrees of freedom.
    freedom = (first + second) ** 2 / (first**2 / (len(ones) - 1) + second**2 / (len(others) - 1))
    return _around(mean, first + second, freedom)


def _squared_error(numbers: Sequence[float]) -> float:
    """Of the mean."""
    return float(np.var(numbers, ddof=1)) / len(numbers)


def _around(mean: float, squared_error: float, freedom: float) -> Estimate:
    half = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(squared_error)
    return Estimate(mean, mean - half, mean + half)
