"""Layer norms."""

from typing import Any

import pytest
import torch
from torch import nn

from ghost import LossReduction
from tests.ghost.harness import MODES, assert_exact
from tests.ghost.models import classes
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
