"""Norms over the last axes."""

from typing import Any

import pytest
import torch
from torch import nn

from ghost import BatchError, LossReduction
from tests.ghost.harness import MODES, assert_exact, scored_step
from tests.ghost.layers.test_linear import PerRow
from tests.ghost.models import classes, table
from tests.ghost.reference import class_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


@each_mode
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_layer_norm(mode: dict[str, Any], options: dict[str, Any], shape: tuple[int, ...]) -> None:
    norm = nn.LayerNorm(6, **options)
    for p in norm.parameters():
        nn.init.normal_(p)
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 4)).double()
    train = torch.randn(5, *shape, dtype=torch.float64), classes(5)
    val = torch.randn(3, *shape, dtype=torch.float64), classes(3)
    found = assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)
    assert ("1" in found.by_layer) == options.get("elementwise_affine", True)


@each_mode
def test_layer_norm_over_several_axes(mode: dict[str, Any]) -> None:
    norm = nn.LayerNorm((3, 6))
    for p in norm.parameters():
        nn.init.normal_(p)
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 4)).double()
    train = torch.randn(5, 2, 3, 6, dtype=torch.float64), classes(5)
    val = torch.randn(3, 2, 3, 6, dtype=torch.float64), classes(3)
    assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_one_frozen_parameter(mode: dict[str, Any], frozen: str) -> None:
    norm = nn.LayerNorm(5)
    nn.init.normal_(norm.weight)
    norm.get_parameter(frozen).requires_grad_(False)
    model = nn.Sequential(nn.Linear(5, 5), norm, nn.Linear(5, 4)).double()
    found = assert_exact(model, mode, table(6), table(3), class_loss, LossReduction.SAMPLE_MEAN)
    assert f"1.{frozen}" not in found.grads


@each_mode
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("rows", [2, 5])  # 5: as many rows as features
def test_a_vector_is_refused_by_name(mode: dict[str, Any], kind: type[nn.Module], rows: int) -> None:
    config = mode | {"loss_reduction": "sample_mean"}
    with pytest.raises(BatchError, match=r"layer 'layer' got an input of shape \(5,\).*at least 2 axes"):
        scored_step(PerRow(kind(5)).double(), config, table(rows), table(3), class_loss)
