"""Convolutions of one, two and three dimensions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import GhostEngineManager, LossReduction, UnsupportedModelError
from tests.ghost.harness import MODES, assert_exact
from tests.ghost.models import classes
from tests.ghost.reference import class_loss

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"stride": 2},
    {"padding": 1},
    {"padding": "same"},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"dilation": 2},
    {"stride": 2, "padding": 2, "dilation": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 1},
    {"kernel_size": 5},  # the whole map
]

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


class Pool(nn.Module):
    """`[b, c, *spatial]` as `[b, c]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def network(spatial: int, **options: Any) -> nn.Sequential:
    """Convolution, ReLU in place, convolution, pooling, classes."""
    conv = CONVS[spatial]
    return nn.Sequential(
        conv(2, 3, **({"kernel_size": 3} | options)), nn.ReLU(inplace=True), conv(3, 3, 1), Pool(),
        nn.Linear(3, 4),
    ).double()  # fmt: skip


def images(rows: int, spatial: int, size: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, *(size,) * spatial, dtype=torch.float64), classes(rows)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_every_setting(spatial: int, options: dict[str, Any]) -> None:
    model = network(spatial, **options)
    train, val = images(4, spatial), images(3, spatial)
    assert_exact(model, {}, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
@pytest.mark.parametrize("algebra", ["auto", "target", "fused"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_each_mode_and_algebra(mode: dict[str, Any], algebra: str, spatial: int) -> None:
    if mode.get("bitwise"):
        algebra = "auto"
    model = network(spatial, stride=2, padding=1)
    train, val = images(4, spatial), images(3, spatial)
    assert_exact(model, mode | {"algebra": algebra}, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
def test_sizes_that_differ_by_axis(mode: dict[str, Any]) -> None:
    conv = nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1))
    model = nn.Sequential(conv, nn.ReLU(inplace=True), Pool(), nn.Linear(3, 4)).double()
    train = torch.randn(4, 2, 6, 7, dtype=torch.float64), classes(4)
    val = torch.randn(3, 2, 6, 7, dtype=torch.float64), classes(3)
    assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
def test_a_map_of_one_pixel(mode: dict[str, Any]) -> None:
    model = network(2, padding=1)
    train, val = images(4, 2, size=1), images(3, 2, size=1)
    assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_groups_are_refused_by_name(spatial: int) -> None:
    model = nn.Sequential(CONVS[spatial](2, 4, 3, groups=2), Pool(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModelError, match=r"'0'.*groups=2"):
        GhostEngineManager({"loss_reduction": "sample_mean"}, model, optimizer, val_data=images(2, spatial))
