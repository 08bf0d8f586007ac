"""One scored step of a model, and the comparison of its numbers with the plain way's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghost import GhostEngineManager, LossReduction
from ghost.batch import row_count
from ghost.values import read_shards
from tests.ghost import reference
from tests.ghost.models import mlp, table
from tests.ghost.reference import Gradient, LossFn, Rows, class_loss

EXACT = 1e-10
"""Relative tolerance in float64."""

OWN_LOSS = 1e-6
"""Where a Hugging Face loss in float32 is on the way."""


@dataclass
class Scored:
    """What a step gave."""

    scores: Tensor
    by_layer: dict[str, Tensor]
    grads: Gradient


def grads_of(model: nn.Module) -> Gradient:
    """`.grad` of every trainable parameter, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def scored_step(
    model: nn.Module, config: dict[str, Any], train: Rows, val: Rows, loss_fn: LossFn, form: str = "short"
) -> Scored:
    """One step from cleared gradients: `manager.step` ("short"), or GhostSuite's calls ("protocol")."""
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager(config, model, optimizer, val_data=val, loss_fn=loss_fn)
    ids = list(range(row_count(train[0], "batch")))
    if form == "short":
        with manager.step(*train, batch_idx=ids, iteration=0) as step:
            step.backward(loss_fn(model, step.X, step.Y))
    else:
        manager.attach_train_batch(*train, 0, ids)
        loss_fn(model, *manager.prepare_forward_input(*train)).backward()
        manager.prepare_gradients()
    found = Scored(manager.scores, manager.scores_by_layer, grads_of(model))
    manager.cleanup()
    return found


def assert_near(actual: Tensor, expected: Tensor, rtol: float = EXACT) -> None:
    """Equal up to `rtol` of the largest expected entry."""
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=rtol * max(scale, 1e-30))


def assert_gradients(actual: Gradient, expected: Gradient, rtol: float = EXACT) -> None:
    """Each tensor equal up to `rtol` of its own largest entry, or to rounding where that is zero but for
    rounding (a key's bias in attention), float32's where float32 is on the way.
    """
    assert actual.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    rounding = 1e-5 if rtol <= EXACT else 0.05
    for name, grad in expected.items():
        atol = rtol * max(float(grad.abs().max()), rounding * largest)
        torch.testing.assert_close(actual[name].double(), grad.double(), rtol=0.0, atol=atol, msg=name)


def assert_exact(
    model: nn.Module, config: dict[str, Any], train: Rows, val: Rows, loss_fn: LossFn,
    reduction: LossReduction, form: str = "short", rtol: float = EXACT,
) -> Scored:  # fmt: skip
    """The step's scores and gradients are those of the plain way, and the invariants hold."""
    config = {"loss_reduction": reduction, **config}
    expected = reference.scores(model, loss_fn, train, val, reduction)
    plain = reference.gradient(model, loss_fn(model, *train))
    val_grad = reference.gradient(model, loss_fn(model, *val))
    found = scored_step(model, config, train, val, loss_fn, form)
    assert_near(found.scores, expected, rtol)
    assert_gradients(found.grads, plain, rtol)
    assert_near(
        torch.stack(list(found.by_layer.values())).sum(0),
        found.scores,
        EXACT if found.scores.dtype == torch.float64 else 1e-6,
    )
    size = expected.abs().sum().clamp_min(1e-30)
    assert float(abs(found.scores.sum() - reference.dot(val_grad, plain)) / size) < rtol
    return found


MODES: dict[str, dict[str, Any]] = {
    "concat": {"val_mode": "concat"},
    "separate": {"val_mode": "separate"},
    "bitwise": {"val_mode": "separate", "bitwise": True},
}


class Run:
    """An MLP under a manager, a step at a time."""

    def __init__(
        self, config: dict[str, Any] | None = None, optimizer: Any = None, scaler: Any = None, **options: Any
    ) -> None:
        self.model = options.pop("model", None) or mlp()
        self.train, self.val = table(6), table(3)
        self.optimizer = optimizer or torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scaler = scaler
        settings = {"loss_reduction": "sample_mean", "val_batch_size": 3} | (config or {})
        self.manager = GhostEngineManager(
            settings, self.model, self.optimizer, val_data=self.val, loss_fn=class_loss, scaler=scaler
        )

    def backward(self, t: int) -> Tensor:
        self.optimizer.zero_grad()
        with self.manager.step(*self.train, batch_idx=range(6), iteration=t) as step:
            step.backward(class_loss(self.model, step.X, step.Y))
        return self.manager.scores

    def step(self, t: int) -> Tensor:
        scores = self.backward(t)
        self.optimizer.step()
        self.manager.aggregate_and_log()
        return scores

    def rows(self, directory: Path) -> dict[str, Tensor]:
        """All rows, after `cleanup`."""
        self.manager.cleanup()
        shards = list(read_shards(directory / "scores"))
        return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
