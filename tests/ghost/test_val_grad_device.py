"""Validation gradients kept in the CPU's memory come to every tap by one way, and change no number."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ghost import GhostEngineManager, distributed, taps
from ghost.errors import GhostConfigError
from ghost.loss import LossReduction
from ghost.validation import SeparateValidation
from tests.ghost.harness import assert_exact
from tests.ghost.models import classes, mlp, table
from tests.ghost.reference import class_loss

SAMPLE_MEAN = LossReduction.SAMPLE_MEAN
ON_CPU = {"val_mode": "separate", "val_grad_device": "cpu", "loss_reduction": "sample_mean"}


class Shifted(nn.Module):
    """A parameter of its own, which no rule knows, before the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + self.shift)


@pytest.mark.parametrize("bitwise", [False, True])
def test_scores_are_exact(bitwise: bool) -> None:
    assert_exact(Shifted(), ON_CPU | {"bitwise": bitwise}, table(4), table(3), class_loss, SAMPLE_MEAN)


@pytest.mark.parametrize("bitwise", [False, True])
def test_every_target_comes_by_the_one_way(bitwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, plain_fetched = SeparateValidation.val_grad, distributed.fetched
    devices = []

    def elsewhere(self: SeparateValidation) -> dict[str, Tensor]:
        return {name: -grad for name, grad in taken(self).items()}  # of no use to a tap as it is

    def fetched(target: Tensor, device: torch.device) -> Tensor:
        devices.append(device)
        return plain_fetched(-target, device)

    monkeypatch.setattr(SeparateValidation, "val_grad", elsewhere)
    monkeypatch.setattr(taps, "fetched", fetched)
    model = Shifted()
    assert_exact(model, ON_CPU | {"bitwise": bitwise}, table(4), table(3), class_loss, SAMPLE_MEAN)
    assert set(devices) == {torch.device("cpu")}
    assert len(devices) >= len(list(model.parameters()))


def test_a_target_goes_to_the_device_that_asks() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        kept = torch.zeros(3, 2)
        assert distributed.fetched(kept, torch.device("meta")).device.type == "meta"
    assert distributed.fetched(kept, torch.device("cpu")) is kept


def made(**config: Any) -> GhostEngineManager:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return GhostEngineManager(ON_CPU | config, model, optimizer, val_data=table(3), loss_fn=class_loss)


def test_without_an_effect_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ghost"):
        made().cleanup()
    assert "val_grad_device='cpu' changes nothing: the model is on the CPU." in caplog.text


def test_a_joint_pass_keeps_nothing_that_could_be_elsewhere() -> None:
    with pytest.raises(GhostConfigError, match="val_grad_device='cpu' needs val_mode='separate'"):
        made(val_mode="concat")
    with pytest.raises(GhostConfigError, match="val_grad_device='disk' should be one of model, cpu"):
        made(val_grad_device="disk")


def test_a_failed_step_can_be_taken_again() -> None:
    """What fails between two steps leaves the next validation rows where they were."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"val_batch_size": 1, "loss_reduction": "sample_mean"}
    manager = GhostEngineManager(config, model, optimizer, val_data=table(3), loss_fn=class_loss)
    X, Y = table(4)
    before = manager.state_dict()
    with pytest.raises(RuntimeError, match="no memory"):  # noqa: SIM117
        with manager.step(X, Y, batch_idx=range(4), iteration=0):
            raise RuntimeError("no memory")
    assert manager.state_dict() == before
    with manager.step(X, Y, batch_idx=range(4), iteration=0) as step:
        step.backward(class_loss(model, step.X, step.Y))
    assert classes(4).shape == step.scores.shape
    manager.cleanup()
