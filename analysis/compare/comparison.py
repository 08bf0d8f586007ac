"""Groups of finished runs held against each other: steps to a target loss, and the losses they reach."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from analysis.compare.contrasts import CONFIDENCE, Estimate, design, difference
from analysis.compare.outcomes import (
    SPLITS,
    VAL_LOSS,
    Outcome,
    common_metric,
    differing_keys,
    finite,
    read_outcome,
    read_series,
    refuse_other_samples,
)
from analysis.runs import Run

COMPARISON_FILE = "comparison.json"

SEEN_BY_SCORES = (
    "losses are of the validation samples that values are computed against, so what values chose looks "
    "better here than on new samples: train with data.test_samples for a fair figure"
)


@dataclass(frozen=True)
class Contrast:
    """One group against another.

    Attributes:
        ratio: Of what it takes to the target, geometric mean; None where a run of either never got there.
        at_least, at_most: Bounds of that ratio where only one of the groups has runs that never got there.
        final, best: Differences of losses, `group - against`.
        pairs: Seeds that are paired; 0: two separate samples.
        censored: Runs of both groups that never got there.
    """

    group: str
    against: str
    ratio: Estimate | None
    at_least: float | None
    at_most: float | None
    final: Estimate
    best: Estimate
    pairs: int
    censored: int
    note: str


@dataclass(frozen=True)
class Comparison:
    """Groups by name in the order given, and what was found of them."""

    metric: str
    target: float
    target_rule: str
    baseline: str
    unit: str
    groups: Mapping[str, Sequence[Outcome]]
    contrasts: Sequence[Contrast]
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """What `comparison.json` holds."""
        return {
            "metric": self.metric,
            "target_loss": self.target,
            "target_rule": self.target_rule,
            "baseline": self.baseline,
            "unit": self.unit,
            "confidence": CONFIDENCE,
            "groups": [
                {"name": name, "runs": [one.as_dict() for one in runs]} for name, runs in self.groups.items()
            ],
            "contrasts": [_contrast_dict(one, self.unit) for one in self.contrasts],
            "notes": list(self.notes),
        }


def compare(
    groups: Mapping[str, Sequence[Run]], baseline: str, metric: str | None, target: float | None
) -> Comparison:
    """Hold every group against the baseline, and the others against each other.

    Args:
        groups: One or more runs each, by the group's name.
        baseline: One of the names.
        metric: One of `SPLITS`; None: `test/loss` where every run has it, else `val/loss`.
        target: The loss to reach; None: the largest of the baseline runs' best losses, which all of these
            reach.

    Raises:
        AnalysisError: A run lacks the metric, was evaluated on other samples than the first, or lacks files.
    """
    runs = [run for members in groups.values() for run in members]
    metric = metric or common_metric(runs)
    refuse_other_samples(runs, SPLITS[metric])
    series = {run.directory: read_series(run, metric) for run in runs}
    rule = "given"
    if target is None:
        target = max(min(finite(series[run.directory]).values()) for run in groups[baseline])
        rule = f"the largest of the best losses of {baseline}'s runs"
    outcomes = {
        name: [read_outcome(run, series[run.directory], target) for run in members]
        for name, members in groups.items()
    }
    unit = "steps" if len({one.samples_a_step for of in outcomes.values() for one in of}) == 1 else "samples"
    others = [name for name in groups if name != baseline]
    pairs = [(name, baseline) for name in others] + list(combinations(others, 2))
    contrasts = [contrast(one, outcomes[one], other, outcomes[other], unit) for one, other in pairs]
    return Comparison(
        metric,
        target,
        rule,
        baseline,
        unit,
        outcomes,
        contrasts,
        _notes(runs, metric, unit, outcomes, target),
    )


def contrast(
    group: str, outcomes: Sequence[Outcome], against: str, others: Sequence[Outcome], unit: str
) -> Contrast:
    """One group's outcomes against another's. Runs of one seed are averaged first."""
    plan = design([one.seed for one in outcomes], [one.seed for one in others])
    if plan.pairs:
        outcomes, others = ([one for one in of if one.seed in plan.pairs] for of in (outcomes, others))
    missing = [sum(one.steps_to_target is None for one in of) for of in (outcomes, others)]
    notes = [plan.note] if plan.note else []
    started_there = any(one.steps_to_target == 0 for one in [*outcomes, *others])
    logs = None
    if started_there:
        notes.append("a run starts at the target: no ratio")
    else:
        logs = difference(
            _by_seed(outcomes, lambda one: _log_cost(one, unit)),
            _by_seed(others, lambda one: _log_cost(one, unit)),
            plan.pairs,
        ).exponential()
    if any(missing):
        runs = len(outcomes) + len(others)
        one_sided = logs is not None and not all(missing)
        kept = "no ratio, only its bound" if one_sided else "no ratio"
        notes.append(f"{sum(missing)} of {runs} runs {_never(sum(missing))} the target: {kept}")
    bound = None if logs is None else logs.mean
    return Contrast(
        group,
        against,
        ratio=None if any(missing) else logs,
        at_least=bound if missing[0] and not missing[1] else None,
        at_most=bound if missing[1] and not missing[0] else None,
        final=_loss_difference(outcomes, others, plan.pairs, lambda one: one.final_loss),
        best=_loss_difference(outcomes, others, plan.pairs, lambda one: one.best_loss),
        pairs=len(plan.pairs),
        censored=sum(missing),
        note="; ".join(notes),
    )


def _never(runs: int) -> str:
    return "never reaches" if runs == 1 else "never reach"


def _loss_difference(
    outcomes: Sequence[Outcome],
    others: Sequence[Outcome],
    pairs: Sequence[int],
    loss: Callable[[Outcome], float],
) -> Estimate:
    return difference(_by_seed(outcomes, loss), _by_seed(others, loss), pairs)


def _by_seed(outcomes: Sequence[Outcome], number: Callable[[Outcome], float]) -> dict[int, float]:
    """The mean of each seed's runs."""
    found: dict[int, list[float]] = {}
    for one in outcomes:
        found.setdefault(one.seed, []).append(number(one))
    return {seed: fmean(numbers) for seed, numbers in found.items()}


def _log_cost(one: Outcome, unit: str) -> float:
    """The logarithm of what the target took; of a run that never got there, of all it did, a lower bound."""
    steps = one.last_step if one.steps_to_target is None else one.steps_to_target
    return math.log(steps * (one.samples_a_step if unit == "samples" else 1))


def _notes(
    runs: Sequence[Run], metric: str, unit: str, outcomes: Mapping[str, Sequence[Outcome]], target: float
) -> list[str]:
    """What the reader must know about the numbers."""
    notes = []
    if metric == VAL_LOSS:
        notes.append(SEEN_BY_SCORES)
    if unit == "samples":
        notes.append("batch sizes differ: ratios are of training samples seen, not of steps")
    for name, of in outcomes.items():
        if missing := [one for one in of if one.steps_to_target is None]:
            notes.append(
                f"{len(missing)} of {len(of)} runs of {name} {_never(len(missing))} {target:.4g} in their "
                f"{max(one.last_step for one in missing)} steps"
            )
    if differing := differing_keys(runs):
        notes.append(f"the runs also differ in {', '.join(differing)}")
    return notes


def reading(one: Contrast, unit: str) -> str:
    """A contrast in words: a difference is clear where its interval leaves out that there is none."""
    cost, ends = f"{unit} to the target", "final loss"
    parts = [
        _clear(one.ratio, 1, f"fewer {cost}", f"more {cost}", cost),
        _clear(one.final, 0, f"a lower {ends}", f"a higher {ends}", ends),
    ]
    return f"{one.group} against {one.against}: {'; '.join(parts)}"


def _clear(found: Estimate | None, none: float, less: str, more: str, what: str) -> str:
    if found is None or found.low is None or found.high is None:
        return f"{what} without an interval"
    if found.low <= none <= found.high:
        return f"no clear difference in {what}"
    return less if found.high < none else more


# ---------------------------------------------------------------- JSON


def _contrast_dict(one: Contrast, unit: str) -> dict[str, Any]:
    return {
        "group": one.group,
        "against": one.against,
        "ratio": one.ratio and one.ratio.mean,
        "low": one.ratio and one.ratio.low,
        "high": one.ratio and one.ratio.high,
        "at_least": one.at_least,
        "at_most": one.at_most,
        "pairs": one.pairs,
        "censored": one.censored,
        "final_loss": _estimate_dict(one.final),
        "best_loss": _estimate_dict(one.best),
        "reading": reading(one, unit),
        "note": one.note,
    }


def _estimate_dict(estimate: Estimate) -> dict[str, float | None]:
    ends = {"difference": estimate.mean, "low": estimate.low, "high": estimate.high}
    return {name: None if end is None else _number(end) for name, end in ends.items()}


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None
