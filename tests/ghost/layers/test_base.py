"""Layers of the user's own: registered with one class, or not."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import LayerRule, LossReduction, UnsupportedModelError, register_layer
from ghost.discovery import find_layers
from ghost.gradients import Materialised, SampleGradients
from ghost.layers import WholeRule, base
from tests.ghost.harness import MODES, assert_exact, scored_step
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
    rules = {layer.name: layer.rule for layer in find_layers(model_with(SubScale))}
    assert type(rules["1"]) is WholeRule
    assert type({layer.name: layer.rule for layer in find_layers(model_with(Scale))}["1"]) is ScaleRule


@each_mode
def test_a_rule_can_be_one_function(registry: None, mode: dict[str, Any]) -> None:
    """The module's own forward does the rest."""

    @register_layer(Scale)
    def scale_gradients(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        return {"factor": Materialised(x * grad)}

    found = assert_exact(model_with(Scale), mode, table(6), table(3), class_loss, LossReduction.SAMPLE_MEAN)
    assert "1" in found.by_layer


@each_mode
def test_an_unregistered_layer_is_exact(mode: dict[str, Any]) -> None:
    for layer in (Scale, SubScale):
        model = model_with(layer)
        found = assert_exact(model, mode, table(6), table(3), class_loss, LossReduction.SAMPLE_MEAN)
        assert found.by_layer["1"].abs().min() > 0


def test_a_rule_sees_one_input(registry: None) -> None:
    register_layer(TwoInputs)(ScaleRule)
    with pytest.raises(UnsupportedModelError, match=r"'inner' was called with 2 inputs"):
        scored_step(Twice().double(), {"loss_reduction": "sample_mean"}, table(6), table(3), class_loss)
