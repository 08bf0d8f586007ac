"""Layers under `torch.compile`, without graph breaks."""

from typing import Any

import pytest
import torch
from torch import nn

from ghost import GhostEngineManager, LossReduction
from tests.ghost import reference
from tests.ghost.harness import EXACT, MODES, assert_gradients, assert_near, grads_of
from tests.ghost.layers.test_conv import Pool
from tests.ghost.models import classes
from tests.ghost.reference import Rows, class_loss


def network() -> nn.Sequential:
    """Every kind of convolution, norm and activation with a rule of its own."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same"), nn.GroupNorm(2, 4), nn.PReLU(4),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=4), nn.BatchNorm2d(4).eval(),
        nn.PReLU(),
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.InstanceNorm2d(6, affine=True),
        Pool(), nn.RMSNorm(6), nn.Linear(6, 4),
    ).double()  # fmt: skip


def assert_compiled_exact(
    inner: nn.Module, mode: dict[str, Any], train: Rows, val: Rows, rtol: float = EXACT
) -> None:
    """A compiled classifier's step gives the plain way's scores and gradients."""
    torch._dynamo.reset()
    expected = reference.scores(inner, class_loss, train, val, LossReduction.SAMPLE_MEAN)
    plain = reference.gradient(inner, class_loss(inner, *train))
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    config = mode | {"loss_reduction": "sample_mean"}
    manager = GhostEngineManager(config, model, optimizer, val_data=val, loss_fn=class_loss)
    with manager.step(*train, batch_idx=range(len(train[1])), iteration=0) as step:
        step.backward(class_loss(model, step.X, step.Y))
    assert_near(manager.scores, expected, rtol)
    assert_gradients(grads_of(inner), plain, rtol)
    manager.cleanup()
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
def test_image_layers_in_one_graph(mode: dict[str, Any]) -> None:
    train, val = ((torch.randn(n, 2, 4, 4, dtype=torch.float64), classes(n)) for n in (5, 3))
    assert_compiled_exact(network(), mode, train, val)
