"""What values say of planted samples, and what dropping samples saves."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from analysis.compare.outcomes import finite, steps_to
from runners.data.base import DataBundle
from runners.errors import DataError
from runners.fidelity.planting import Planted

ALL = "all"
"""The run on all samples."""

Curves = dict[str, dict[int, float]]
"""Test loss by step, by the run's name."""


def bad_in_lowest(values: Tensor, bad: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Of the samples with the lowest values `[n]`, as many as are bad: which share of the bad ones they are,
    in all and by kind.
    """
    every = [i for positions in bad.values() for i in positions]
    lowest = set(values.argsort(stable=True)[: len(every)].tolist())
    found = {f"{kind}_in_lowest": len(lowest & set(places)) / len(places) for kind, places in bad.items()}
    return {"bad_in_lowest": len(lowest & set(every)) / len(every)} | found


def negative_share(values: Tensor) -> dict[str, float]:
    """Share of all samples that have a negative value."""
    return {"negative_share": float((values < 0).double().mean())}


def value_of_copies(values: Tensor, alone: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """Mean value of originals and copies, over that of the same originals where they have no copies."""
    members = [i for group in groups for i in group]
    return float(values[members].mean() / alone[[group[0] for group in groups]].mean())


def saved(curves: Curves) -> dict[str, float]:
    """What each run saves against the one on all samples, and what becomes of the best loss.

    Raises:
        DataError: A run never gets below the loss that it started with.
    """
    best = {name: min(finite(curve).values(), default=math.inf) for name, curve in curves.items()}
    target = max(best.values())
    if not target < min(curve[0] for curve in curves.values()):
        raise DataError(
            f"a run's test loss never falls below its first, {curves[ALL][0]:.3f}: change fidelity.adamw_lr, "
            "or raise fidelity.steps"
        )
    steps = {name: steps_to(curve, target) for name, curve in curves.items()}
    metrics = {"target_loss": target}
    for name, taken in steps.items():
        whole = steps[ALL]
        assert taken is not None  # the target is a loss that every run reaches
        assert whole is not None
        if name != ALL:
            metrics[f"iterations_saved/{name}"] = 1 - taken / whole
            metrics[f"best_loss_change/{name}"] = best[name] - best[ALL]
    return metrics


def value_table(
    data: DataBundle, planted: Planted, values: Mapping[str, Tensor]
) -> dict[str, Sequence[object]]:
    """A row for each training sample: what it is, and its values."""
    kinds = [""] * len(planted.tokens)
    for kind, positions in planted.bad.items():
        for i in positions:
            kinds[i] = kind
    group = [-1] * len(planted.tokens)
    for number, members in enumerate(planted.groups):
        for i in members:
            group[i] = number
    columns: dict[str, Sequence[object]] = {
        "sample_id": list(data.train.sample_ids),
        "domain": list(data.train.domains),
        "planted": kinds,
        "group": group,
    }
    return columns | {method: value.tolist() for method, value in values.items()}


def curve_table(curves: Curves) -> dict[str, Sequence[object]]:
    """A row for each test loss: `run`, `step`, `loss`."""
    rows = [(name, step, loss) for name, curve in curves.items() for step, loss in curve.items()]
    return {name: [row[i] for row in rows] for i, name in enumerate(("run", "step", "loss"))}
