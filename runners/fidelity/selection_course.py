"""What a run with chosen samples costs and reaches: counted compute, losses on the way, what was chosen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from runners.errors import DataError

PRODUCTS = 3
"""Matrix products that a plain row takes: forward, inputs' gradients, weights' gradients."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is.

    Attributes:
        step: Steps taken.
        rows: Compute so far, in plain training rows.
        seconds: Wall clock of the steps so far, without evaluations.
        test_loss: Loss on the test windows.
    """

    step: int
    rows: float
    seconds: float
    test_loss: float


def scored_rows(candidates: int, val: int, kept: float) -> float:
    """Compute of a step that scores before its gradient is formed, in plain training rows.

    The validation rows are plain rows; a candidate has its forward, its inputs' gradients and its product
    with the validation gradient, and one that is kept its part of the weights' gradients.
    """
    return val + candidates + kept / PRODUCTS


def gram_rows(candidates: int, tokens: int) -> float:
    """Compute of a batch's Gram matrix, in plain rows: to form a sample's weight gradient is a product over
    its `tokens`, and to meet each of the batch's is as much as one token of it.
    """
    return candidates * (1 + candidates / tokens) / PRODUCTS


def loss_at(course: Sequence[Checkpoint], budget: float) -> float:
    """The test loss when `budget` rows are spent, on a straight line between evaluations; the course starts
    at zero rows, and its last checkpoint has spent them.
    """
    after = next(i for i, one in enumerate(course) if one.rows >= budget)
    last, first = course[after], course[max(after - 1, 0)]
    if last.rows == first.rows:
        return last.test_loss
    share = (budget - first.rows) / (last.rows - first.rows)
    return first.test_loss + share * (last.test_loss - first.test_loss)


class Tally:
    """Which of the candidates were applied, over the steps of a run."""

    def __init__(self, bad: Tensor) -> None:
        """`bad` says of every training sample whether it is corrupted, `[n]`."""
        self._bad = bad
        self._seen = self._bad_seen = self._kept = 0
        self._applied = self._bad_applied = 0.0

    def add(self, batch: Tensor, weights: Tensor) -> None:
        """One step's candidates, positions `[B]`, and how often each is in its gradient, `[B]`."""
        bad = self._bad[batch]
        self._seen += len(batch)
        self._bad_seen += int(bad.sum())
        self._kept += int((weights > 0).sum())
        self._applied += float(weights.sum())
        self._bad_applied += float(weights[bad].sum())

    def shares(self) -> dict[str, float]:
        """Of the candidates: those kept, and the corrupted; and the corrupted ones' part of what was applied.

        Raises:
            DataError: Nothing was ever kept.
        """
        if not self._kept:
            raise DataError(f"none of {self._seen} candidates was kept: the policy has nothing to train on")
        return {
            "kept_share": self._kept / self._seen,
            "bad_in_batch": self._bad_seen / self._seen,
            "bad_in_kept": self._bad_applied / self._applied,
        }


def by_step(course: Sequence[Checkpoint]) -> dict[int, dict[str, float]]:
    """What each test loss was, and what it had cost."""
    return {
        one.step: {"rows": one.rows, "seconds": one.seconds, "test_loss": one.test_loss} for one in course
    }


def check_finite(course: Sequence[Checkpoint]) -> None:
    """Raises `DataError` where a test loss is not finite."""
    for one in course:
        if not math.isfinite(one.test_loss):
            raise DataError(
                f"the test loss is {one.test_loss} after {one.step} steps: the run diverged, lower "
                "fidelity.adamw_lr"
            )
