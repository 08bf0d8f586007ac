"""Convolutions of one, two and three dimensions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import BatchError, LossReduction
from tests.ghost.harness import MODES, assert_exact, scored_step
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
    {"padding": 2, "padding_mode": "replicate", "stride": 2},
    {"padding": "same", "padding_mode": "circular"},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 1},
    {"kernel_size": 5},  # the whole map
    {"kernel_size": 7, "padding": 1},  # the whole padded map
]

GROUPED: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 1},
    {"kernel_size": 7, "padding": 1},
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
@pytest.mark.parametrize("groups", [1, 2])
def test_a_map_of_one_pixel(mode: dict[str, Any], groups: int) -> None:
    conv = nn.Conv2d(2, 4, 3, padding=1, groups=groups)
    model = nn.Sequential(conv, nn.ReLU(inplace=True), Pool(), nn.Linear(4, 4)).double()
    train, val = images(4, 2, size=1), images(3, 2, size=1)
    assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("options", GROUPED, ids=str)
@pytest.mark.parametrize(
    ("groups", "outputs"), [(2, 6), (4, 4), (4, 8)], ids=["groups", "depthwise", "depthwise with multiplier"]
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_groups(spatial: int, options: dict[str, Any], groups: int, outputs: int) -> None:
    conv = CONVS[spatial](4, outputs, groups=groups, **({"kernel_size": 3} | options))
    model = nn.Sequential(CONVS[spatial](2, 4, 1), conv, nn.ReLU(inplace=True), Pool(), nn.Linear(outputs, 4))
    train, val = images(4, spatial), images(3, spatial)
    assert_exact(model.double(), {}, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
@pytest.mark.parametrize("algebra", ["auto", "token_token", "target", "fused"])
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_in_each_mode_and_algebra(mode: dict[str, Any], algebra: str, groups: int) -> None:
    if mode.get("bitwise") or (algebra == "token_token" and mode["val_mode"] == "separate"):
        algebra = "auto"
    conv = nn.Conv2d(4, 8, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1), groups=groups)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), conv, nn.ReLU(inplace=True), Pool(), nn.Linear(8, 4)).double()
    train, val = images(4, 2), images(3, 2)
    assert_exact(model, mode | {"algebra": algebra}, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_frozen_parameter(mode: dict[str, Any], frozen: str, groups: int) -> None:
    conv = nn.Conv2d(2, 4, 3, groups=groups)
    conv.get_parameter(frozen).requires_grad_(False)
    model = nn.Sequential(conv, nn.ReLU(inplace=True), Pool(), nn.Linear(4, 4)).double()
    found = assert_exact(model, mode, images(4, 2), images(3, 2), class_loss, LossReduction.SAMPLE_MEAN)
    assert f"0.{frozen}" not in found.grads
    assert conv.get_parameter(frozen).grad is None


class Unbatched(nn.Module):
    """Hands a convolution a grey image for each row, which it takes for its channels."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(rows, rows, 3), nn.Linear(9, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x[:, 0]).flatten(1))


def test_rows_taken_for_channels_are_refused_by_name() -> None:
    config = {"loss_reduction": "sample_mean"}
    with pytest.raises(BatchError, match=r"layer 'conv' got an input of shape \(7, 5, 5\).*at least 4 axes"):
        scored_step(Unbatched(4 + 3), config, images(4, 2), images(3, 2), class_loss)
