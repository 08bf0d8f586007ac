"""Small networks have the widths that the config gives."""

import pytest
import torch

from runners.models import build_model
from tests.runners.models.zoo import composed


def test_mlp_widths() -> None:
    model = build_model(composed("model=mlp", "model.hidden=[7,5]").model, None, (64,), 10)
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert shapes == [(7, 64), (5, 7), (10, 5)]
    assert model(torch.zeros(3, 64)).shape == (3, 10)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9)])
@pytest.mark.parametrize("channels", ["[4]", "[4,6]", "[2,2,2,2,2]"])
def test_cnn_takes_maps_of_any_size(channels: str, shape: tuple[int, ...]) -> None:
    model = build_model(composed("model=cnn", f"model.channels={channels}").model, None, shape, 10)
    assert model(torch.zeros(3, *shape)).shape == (3, 10)
