"""Activations with a parameter."""

from typing import Any

import pytest
import torch
from torch import nn

from ghost import LossReduction
from tests.ghost.harness import MODES, assert_exact
from tests.ghost.models import table
from tests.ghost.reference import class_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


@each_mode
@pytest.mark.parametrize("slopes", [1, 3])
@pytest.mark.parametrize("shape", [(), (4,), (2, 4)])
def test_prelu(mode: dict[str, Any], slopes: int, shape: tuple[int, ...]) -> None:
    """Of channels `[b, 3, …]`."""
    prelu = nn.PReLU(slopes)
    nn.init.normal_(prelu.weight)
    width = 3 * torch.Size(shape).numel()
    model = nn.Sequential(
        nn.Linear(5, width), nn.Unflatten(1, (3, *shape)), prelu, nn.Flatten(), nn.Linear(width, 4)
    ).double()
    found = assert_exact(model, mode, table(6), table(3), class_loss, LossReduction.SAMPLE_MEAN)
    assert found.by_layer["2"].ne(0).any()
