"""Transposed convolutions of one, two and three dimensions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import LossReduction, UnsupportedModelError
from tests.ghost.harness import MODES, assert_exact, scored_step
from tests.ghost.layers.test_conv import Pool
from tests.ghost.models import classes
from tests.ghost.reference import class_loss

CONVS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"stride": 2},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"dilation": 2},
    {"dilation": 3, "output_padding": 2},  # room for two more places than the input has
    {"kernel_size": 1},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 5, "stride": 2, "padding": 2},
]

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


def network(spatial: int, **options: Any) -> nn.Sequential:
    """Transposed convolution, ReLU in place, pooling, classes."""
    conv = CONVS[spatial](2, 4, **({"kernel_size": 3} | options))
    return nn.Sequential(conv, nn.ReLU(inplace=True), Pool(), nn.Linear(4, 4)).double()


def images(rows: int, spatial: int, size: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, *(size,) * spatial, dtype=torch.float64), classes(rows)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_setting(spatial: int, groups: int, options: dict[str, Any]) -> None:
    model = network(spatial, groups=groups, **options)
    train, val = images(4, spatial), images(3, spatial)
    assert_exact(model, {}, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_each_mode(mode: dict[str, Any], groups: int, size: int) -> None:
    model = network(2, groups=groups, stride=2, padding=1)
    train, val = images(4, 2, size), images(3, 2, size)
    assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
def test_sizes_that_differ_by_axis(mode: dict[str, Any]) -> None:
    conv = nn.ConvTranspose2d(2, 4, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1))
    model = nn.Sequential(conv, nn.ReLU(inplace=True), Pool(), nn.Linear(4, 4)).double()
    train = torch.randn(4, 2, 6, 7, dtype=torch.float64), classes(4)
    val = torch.randn(3, 2, 6, 7, dtype=torch.float64), classes(3)
    assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_one_frozen_parameter(mode: dict[str, Any], frozen: str) -> None:
    model = network(2)
    model[0].get_parameter(frozen).requires_grad_(False)
    found = assert_exact(model, mode, images(4, 2), images(3, 2), class_loss, LossReduction.SAMPLE_MEAN)
    assert f"0.{frozen}" not in found.grads


class Sized(nn.Module):
    """Asks for an output size, which is a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.ConvTranspose2d(2, 4, 3, stride=2), nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x, [8, 8]).flatten(2).mean(2))


def test_an_output_size_is_refused_by_name() -> None:
    config = {"loss_reduction": "sample_mean"}
    with pytest.raises(UnsupportedModelError, match=r"'conv' was called with 2 inputs"):
        scored_step(Sized(), config, images(4, 2), images(3, 2), class_loss)
