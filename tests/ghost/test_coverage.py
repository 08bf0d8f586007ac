"""The coverage report accounts for every trainable parameter, once."""

from typing import Any

import pytest
from torch import nn

from ghost import GhostConfig, Selection
from ghost.coverage import coverage
from tests.ghost import reference
from tests.ghost.models import mlp, table, tiny_gpt2, tokens
from tests.ghost.reference import causal_loss, class_loss


def report(model: nn.Module, **selection: Any) -> dict[str, Any]:
    V = tokens(3, 9)
    return coverage(model, GhostConfig(selection=Selection(**selection)), causal_loss(model, V, V))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_everything_is_scored_by_default(tied: bool) -> None:
    model = tiny_gpt2(tied=tied)
    found = report(model)
    total = sum(p.numel() for p in model.parameters())
    assert found["parameters"] == found["scored_parameters"] == total
    assert found["scored_parameter_share"] == 1
    assert found["scored_val_grad_share"] == pytest.approx(1)
    assert found["unscored_parameters"] == []
    assert sum(row["parameters"] for row in found["layers"]) == total
    assert sum(row["val_grad_share"] for row in found["layers"]) == pytest.approx(1)
    head = found["layers"][-1]
    assert (head["name"], head["type"], head["family"]) == ("lm_head", "Linear", "head")
    assert (head["parameters"] == 0) == tied
    assert (head["shared_parameters"] > 0) == tied
    assert all(p.grad is None for p in model.parameters())


def test_a_selections_share() -> None:
    model, V = tiny_gpt2(), tokens(3, 9)
    config = GhostConfig(selection=Selection(families=("mlp",)))
    found: dict[str, Any] = coverage(model, config, causal_loss(model, V, V))
    grad = reference.gradient(model, causal_loss(model, V, V))
    square = {name: float(g.square().sum()) for name, g in grad.items()}
    chosen = [name for name in square if ".mlp." in name]
    share = sum(square[name] for name in chosen) / sum(square.values())
    assert found["scored_val_grad_share"] == pytest.approx(share, rel=1e-10)
    assert found["scored_parameters"] == sum(grad[name].numel() for name in chosen)
    assert {row["name"] for row in found["layers"] if row["scored"]} == {
        name.rpartition(".")[0] for name in chosen
    }


def test_parameters_without_a_rule_are_listed() -> None:
    model = nn.Sequential(mlp(), nn.PReLU()).double()
    found = coverage(model, GhostConfig(), class_loss(model, *table(3)))
    assert found["unscored_parameters"] == ["1.weight"]
    assert found["parameters"] == found["scored_parameters"] + 1  # type: ignore[operator]


def test_frozen_parameters_are_not_counted() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    found: dict[str, Any] = coverage(model, GhostConfig(), class_loss(model, *table(3)))
    assert found["parameters"] == sum(p.numel() for p in model[2].parameters())
    assert [row["name"] for row in found["layers"]] == ["2"]


def test_a_loss_without_gradient_has_no_shares_to_divide() -> None:
    model = mlp()
    found = coverage(model, GhostConfig(), class_loss(model, *table(3)) * 0)
    assert found["scored_val_grad_share"] == 0
