"""Policies that look at each sample's score by itself, or at its place among the others'.

Equal scores keep the order in which the samples came: of two that tie at a limit, the earlier one counts as
the larger. Several columns of scores are added up first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost.errors import GhostConfigError, shown
from ghost.policies.base import Policy, StepSamples, check_count, check_number, number_of, register_policy


def best_first(scores: Tensor) -> Tensor:
    """The samples from the largest score to the smallest, `[B]` int64; ties in their order."""
    return scores.argsort(descending=True, stable=True)


def only(kept: Tensor, scores: Tensor) -> Tensor:
    """Weights of one for the samples `kept` (indices or a mask) and zero for the others, `[B]`."""
    weights = torch.zeros_like(scores)
    weights[kept] = 1.0
    return weights


@register_policy
@dataclass(frozen=True)
class All(Policy):
    """Every sample, with its own weight: the ordinary step."""

    name = "all"

    def weigh(self, samples: StepSamples) -> Tensor:
        return torch.ones_like(samples.totals)


@register_policy
@dataclass(frozen=True)
class TopK(Policy):
    """The k samples with the largest scores.

    Attributes:
        k: A count, or a fraction of the step's samples. A step with fewer than k samples keeps them all.
    """

    name = "top_k"

    k: int | float = 0.5

    def __post_init__(self) -> None:
        check_count(self.name, self.k)

    def weigh(self, samples: StepSamples) -> Tensor:
        scores = samples.totals
        return only(best_first(scores)[: number_of(self.k, len(scores))], scores)


@register_policy
@dataclass(frozen=True)
class BottomK(TopK):
    """The k samples with the smallest scores: the opposite, to see whether the order matters."""

    name = "bottom_k"

    def weigh(self, samples: StepSamples) -> Tensor:
        scores = samples.totals
        return only(best_first(scores)[-number_of(self.k, len(scores)) :], scores)


@register_policy
@dataclass(frozen=True)
class Threshold(Policy):
    """The samples with scores above a limit; with 0, those whose gradients lower the validation loss.

    Attributes:
        above: The limit, itself excluded.
    """

    name = "threshold"

    above: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.name, "above", self.above)

    def weigh(self, samples: StepSamples) -> Tensor:
        scores = samples.totals
        return only(scores > self.above, scores)


@register_policy
@dataclass(frozen=True)
class Softmax(Policy):
    """Weights `exp(z_i / temperature)`, with z the scores less their mean, over their standard deviation.

    Standardised, since the scale of scores falls with the gradients while training goes on; equal scores give
    equal weights.

    Attributes:
        temperature: Large ones weigh all samples alike, small ones the best alone.
    """

    name = "softmax"

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.name, "temperature", self.temperature, above=0.0)

    def weigh(self, samples: StepSamples) -> Tensor:
        scores = samples.totals
        spread = scores.std(correction=0)
        z = (scores - scores.mean()) / torch.where(spread > 0, spread, torch.ones_like(spread))
        return (z / self.temperature).softmax(0)


@register_policy
@dataclass(frozen=True)
class Curriculum(Policy):
    """The samples whose rank among the step's scores lies in a window that moves over the steps.

    Sample i's quantile is `(r_i + 1/2) / B`, with `r_i` the number of samples below it. At step t the window
    is `start + min(t / steps, 1) · (end - start)`, bound by bound. One that falls between two quantiles keeps
    the sample nearest its middle.

    Attributes:
        start, end: Quantiles `(low, high)` that bound the window at step 0, and from step `steps` on; `(0.5,
            1)` are the better half.
        steps: How many steps the window moves.
    """

    name = "curriculum"

    start: Sequence[float] = (0.5, 1.0)
    end: Sequence[float] = (0.0, 1.0)
    steps: int = 1000

    def __post_init__(self) -> None:
        for key in ("start", "end"):
            object.__setattr__(self, key, self._window(key, getattr(self, key)))
        if type(self.steps) is not int or self.steps < 1:
            raise GhostConfigError(
                f"policy={self.name!r} has steps={shown(self.steps)}, which should be a whole number of at "
                "least 1."
            )

    def _window(self, key: str, given: object) -> tuple[float, float]:
        window = tuple(given) if isinstance(given, Sequence) else ()
        if len(window) == 2 and all(isinstance(bound, int | float) for bound in window):
            low, high = window
            if 0 <= low < high <= 1:
                return low, high
        raise GhostConfigError(
            f"policy={self.name!r} has {key}={shown(given)}, which should be two quantiles between 0 and 1, "
            "the lower one first."
        )

    def weigh(self, samples: StepSamples) -> Tensor:
        scores = samples.totals
        done = min(samples.iteration / self.steps, 1.0)
        low, high = (a + done * (b - a) for a, b in zip(self.start, self.end, strict=True))
        rank = torch.empty_like(scores, dtype=torch.float64)
        worst_first = best_first(scores).flip(0)
        rank[worst_first] = torch.arange(len(scores), dtype=torch.float64, device=scores.device)
        quantile = (rank + 0.5) / len(scores)
        inside = (quantile >= low) & (quantile <= high)
        if not bool(inside.any()):  # narrower than 1 / B
            return only((quantile - (low + high) / 2).abs().argmin(), scores)
        return only(inside, scores)
