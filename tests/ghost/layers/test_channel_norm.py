"""Norms with one weight and bias a channel: by group, by instance, and by running statistics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from ghost import LossReduction, UnsupportedModelError
from ghost.batch import Inputs
from tests.ghost import reference
from tests.ghost.harness import MODES, assert_exact, assert_near, scored_step
from tests.ghost.layers.test_conv import CONVS, Pool
from tests.ghost.models import classes, table
from tests.ghost.reference import class_loss

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
each_spatial = pytest.mark.parametrize("spatial", [1, 2, 3])


def worn(module: nn.Module) -> nn.Module:
    """Away from the ones and zeros of a fresh start: parameters and running statistics."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return module.double()


def network(norm: nn.Module, spatial: int) -> nn.Sequential:
    """A convolution, the norm of its 6 channels, ReLU in place, pooling, classes."""
    conv = CONVS[spatial](2, 6, 2)
    return nn.Sequential(conv, worn(norm), nn.ReLU(inplace=True), Pool(), nn.Linear(6, 4)).double()


def images(rows: int, spatial: int, size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, *(size,) * spatial, dtype=torch.float64), classes(rows)


@each_mode
@each_spatial
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_group_norm(mode: dict[str, Any], spatial: int, groups: int) -> None:
    model, train, val = network(nn.GroupNorm(groups, 6), spatial), images(4, spatial), images(3, spatial)
    found = assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)
    assert found.by_layer["1"].ne(0).all()


@each_mode
@each_spatial
def test_instance_norm(mode: dict[str, Any], spatial: int) -> None:
    model = network(INSTANCE_NORMS[spatial](6, affine=True), spatial)
    train, val = images(4, spatial), images(3, spatial)
    found = assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)
    assert found.by_layer["1"].ne(0).all()


@each_mode
@each_spatial
@pytest.mark.parametrize("norms", [BATCH_NORMS, INSTANCE_NORMS], ids=["batch", "instance"])
def test_running_statistics(
    mode: dict[str, Any], spatial: int, norms: dict[int, Callable[..., nn.Module]]
) -> None:
    norm = norms[spatial](6, affine=True, track_running_stats=True).eval()
    model, train, val = network(norm, spatial), images(4, spatial), images(3, spatial)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    found = assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)
    assert found.by_layer["1"].ne(0).all()
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


@each_mode
@pytest.mark.parametrize(
    "make",
    [nn.BatchNorm1d, nn.SyncBatchNorm, lambda width: nn.GroupNorm(3, width)],
    ids=["batch", "synchronised batch", "group"],
)
def test_channels_without_a_map(mode: dict[str, Any], make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(5, 6), worn(make(6)).eval(), nn.ReLU(), nn.Linear(6, 4)).double()
    found = assert_exact(model, mode, table(6), table(3), class_loss, LossReduction.SAMPLE_MEAN)
    assert found.by_layer["1"].ne(0).all()


@each_mode
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.GroupNorm(3, 6), lambda: nn.InstanceNorm2d(6, affine=True), lambda: nn.BatchNorm2d(6).eval()],
    ids=["group", "instance", "batch"],
)
def test_one_frozen_parameter(mode: dict[str, Any], frozen: str, make: Callable[[], nn.Module]) -> None:
    model = network(make(), 2)
    model[1].get_parameter(frozen).requires_grad_(False)
    found = assert_exact(model, mode, images(4, 2), images(3, 2), class_loss, LossReduction.SAMPLE_MEAN)
    assert f"1.{frozen}" not in found.grads


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (nn.BatchNorm2d, "takes its statistics from the batch"),
        (nn.SyncBatchNorm, "takes its statistics from the batch"),
        (nn.InstanceNorm2d, "tracks running statistics, into which validation rows would go"),
    ],
)
def test_statistics_of_the_batch_are_refused_by_name(
    val_mode: str, kind: Callable[..., nn.Module], reason: str
) -> None:
    config = {"val_mode": val_mode, "loss_reduction": "sample_mean"}
    model = network(kind(6, affine=True, track_running_stats=True), 2)
    with pytest.raises(UnsupportedModelError, match=rf"layer '1' is a \w+ that {reason}.*layer\.eval\(\)"):
        scored_step(model, config, images(4, 2), images(3, 2), class_loss)


@each_mode
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
    ids=["bfloat16", "bfloat16 autocast", "float16 autocast"],
)
@pytest.mark.parametrize(
    "make",
    [lambda: nn.GroupNorm(3, 6), lambda: nn.InstanceNorm2d(6, affine=True), lambda: nn.BatchNorm2d(6).eval()],
    ids=["group", "instance", "batch"],
)
def test_short_floats(
    mode: dict[str, Any], dtype: torch.dtype, autocast: torch.dtype | None, make: Callable[[], nn.Module]
) -> None:
    model, train, val = network(make(), 2), images(6, 2), images(3, 2)
    expected = reference.scores(model, class_loss, train, val, LossReduction.SAMPLE_MEAN)

    def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return class_loss(model, X, Y)

    short = ((X.to(dtype), Y) for X, Y in (train, val))
    found = scored_step(model.to(dtype), mode | {"loss_reduction": "sample_mean"}, *short, loss)
    assert_near(found.scores, expected, 0.05)


def logits_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Cross-entropy of a Hugging Face classifier's logits."""
    return nn.functional.cross_entropy(model(pixel_values=X).logits, Y)


def resnet() -> nn.Module:
    config = ResNetConfig(
        num_channels=2, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic", num_labels=4
    )
    return worn(ResNetForImageClassification(config)).eval()


def efficientnet() -> nn.Module:
    config = EfficientNetConfig(
        num_channels=2, width_coefficient=0.125, depth_coefficient=1.0, depth_divisor=2, kernel_sizes=[3, 5],
        in_channels=[32, 32], out_channels=[32, 48], strides=[1, 2], num_block_repeats=[1, 2],
        expand_ratios=[1, 2], depthwise_padding=[], hidden_dim=160, num_labels=4,
    )  # fmt: skip
    return worn(EfficientNetForImageClassification(config)).eval()


@each_mode
@pytest.mark.parametrize("make", [resnet, efficientnet])
def test_vision_models_of_transformers(mode: dict[str, Any], make: Callable[[], nn.Module]) -> None:
    model, train, val = make(), images(4, 2, size=16), images(3, 2, size=16)
    assert_exact(model, mode, train, val, logits_loss, LossReduction.SAMPLE_MEAN)
