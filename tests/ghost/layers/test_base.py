"""Layers of the user's own: registered with one class, or not."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import (
    GhostConfig,
    GhostEngineManager,
    LayerRule,
    LossReduction,
    UnsupportedModelError,
    register_layer,
)
from ghost.coverage import coverage
from ghost.gradients import Materialised, SampleGradients
from ghost.layers import base
from tests.ghost import reference
from tests.ghost.harness import MODES, assert_exact, assert_near, scored_step
from tests.ghost.models import table
from tests.ghost.reference import class_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


class Scale(nn.Module):
    """`y = s ∘ x`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class SubScale(Scale):
    """A subclass may compute something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor**2


class TwoInputs(Scale):
    """A layer whose rule can see one input only."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return (x + y) * self.factor


class Twice(nn.Module):
    """Hands its layer two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = TwoInputs(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x, x))


class ScaleRule(LayerRule):
    """The weight's gradient is `grad ∘ x`."""

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return x * params["factor"]

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        return {"factor": Materialised((x * grad).flatten(1, -2).sum(1) if x.dim() > 2 else x * grad)}


def model_with(layer: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 5), layer(5), nn.Linear(5, 4)).double()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of the test end with it."""
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))


@each_mode
def test_a_registered_layer_is_exact(registry: None, mode: dict[str, Any]) -> None:
    register_layer(Scale)(ScaleRule)
    found = assert_exact(model_with(Scale), mode, table(6), table(3), class_loss, LossReduction.SAMPLE_MEAN)
    assert "1" in found.by_layer


def test_a_rule_speaks_for_the_type_alone(registry: None) -> None:
    register_layer(Scale)(ScaleRule)
    with pytest.raises(UnsupportedModelError, match=r"1\.factor \(in SubScale\)"):
        scored_step(model_with(SubScale), {"loss_reduction": "sample_mean"}, table(6), table(3), class_loss)


def test_an_unregistered_layer_is_refused_by_name_in_a_joint_batch() -> None:
    model = model_with(Scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModelError, match=r"1\.factor \(in Scale\).*register_layer.*'separate'"):
        GhostEngineManager({"loss_reduction": "sample_mean"}, model, optimizer, val_data=table(3))
    assert "forward" not in vars(model)


@pytest.mark.parametrize("bitwise", [False, True])
def test_an_unregistered_layer_is_left_unscored_beside_a_separate_pass(bitwise: bool) -> None:
    model, train, val = model_with(Scale), table(6), table(3)
    config = {"val_mode": "separate", "bitwise": bitwise}
    found = scored_step(model, config, train, val, class_loss)
    parts = reference.scores_by_parameter(model, class_loss, train, val, LossReduction.SAMPLE_MEAN)
    unscored = parts.pop("1.factor")
    assert_near(found.scores, torch.stack(list(parts.values())).sum(0))
    assert unscored.abs().max() > 0
    for name, grad in reference.gradient(model, class_loss(model, *train)).items():
        assert_near(found.grads[name], grad)
    report = coverage(model, GhostConfig.read(config), class_loss(model, *val))
    assert report["unscored_parameters"] == ["1.factor"]
    share = report["scored_val_grad_share"]
    assert isinstance(share, float)
    assert 0 < share < 1


def test_a_rule_sees_one_input(registry: None) -> None:
    register_layer(TwoInputs)(ScaleRule)
    with pytest.raises(UnsupportedModelError, match=r"'inner' was called with 2 inputs"):
        scored_step(Twice().double(), {"loss_reduction": "sample_mean"}, table(6), table(3), class_loss)


def test_rules_are_named_in_messages() -> None:
    assert {"Linear", "Conv1D", "Embedding", "LayerNorm", "Conv2d"} <= set(base.registered_types())
