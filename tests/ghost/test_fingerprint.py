"""A model's weights in one number."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ghost.fingerprint import model_fingerprint


class WithState(nn.BatchNorm1d):
    """A module whose state dict holds more than tensors."""

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        del state


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), WithState(4)).bfloat16()


def test_equal_weights_have_one_fingerprint() -> None:
    first = model()
    assert model_fingerprint(first) == model_fingerprint(copy.deepcopy(first).eval().requires_grad_(False))


@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "1.num_batches_tracked"])
def test_every_parameter_and_buffer_counts(name: str) -> None:
    first = model()
    changed = copy.deepcopy(first)
    with torch.no_grad():
        changed.state_dict()[name].add_(1)
    assert model_fingerprint(changed) != model_fingerprint(first)


def test_dtypes_count() -> None:
    first = model()
    assert model_fingerprint(copy.deepcopy(first).float()) != model_fingerprint(first)
