"""Linear layers on inputs of any rank."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ghost import BatchError, LossReduction
from ghost.batch import Inputs
from tests.ghost.harness import MODES, assert_exact, scored_step
from tests.ghost.models import classes, mlp, table
from tests.ghost.reference import class_loss, class_loss_sum, token_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


def token_loss_sum(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Cross-entropy of labels `[b, T]`, a sum."""
    return F.cross_entropy(model(X).flatten(0, 1), Y.flatten(), reduction="sum")


def inputs(rows: int, rank: int) -> Tensor:
    """`[rows, 5]`, `[rows, 3, 5]`, `[rows, 2, 3, 5]` or `[rows, 2, 2, 3, 5]`."""
    return torch.randn(rows, *(2, 2, 3)[5 - rank :], 5, dtype=torch.float64)


@each_mode
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_of_any_rank(mode: dict[str, Any], rank: int, bias: bool) -> None:
    train, val = (inputs(6, rank), classes(6)), (inputs(3, rank), classes(3))
    assert_exact(mlp(bias=bias), mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
@pytest.mark.parametrize("algebra", ["auto", "target", "fused"])
@pytest.mark.parametrize("length", [0, 1])
def test_rows_of_no_token_or_one(mode: dict[str, Any], algebra: str, length: int) -> None:
    """No token is no gradient: those samples' scores are zero, and nothing is divided by their number."""
    if mode.get("bitwise"):
        algebra = "auto"
    X, V = (torch.randn(rows, length, 5, dtype=torch.float64) for rows in (4, 3))
    Y, W = torch.randint(0, 4, (4, length)), torch.randint(0, 4, (3, length))
    config = mode | {"algebra": algebra}
    found = assert_exact(mlp(), config, (X, Y), (V, W), token_loss_sum, LossReduction.SUM)
    assert found.scores.eq(0).all() == (length == 0)


class PerRow(nn.Module):
    """Hands its layer one row at a time."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(row) for row in x])


@each_mode
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("rows", [2, 5])  # 5: as many rows as features
def test_a_vector_is_refused_by_name(mode: dict[str, Any], kind: type[nn.Module], rows: int) -> None:
    config = mode | {"loss_reduction": "sample_mean"}
    with pytest.raises(BatchError, match=r"layer 'layer' got an input of shape \(5,\).*at least 2 axes"):
        scored_step(PerRow(kind(5, 5)).double(), config, table(rows), table(3), class_loss)


@each_mode
def test_the_linear_layer_that_is_not_quantised(mode: dict[str, Any]) -> None:
    model = nn.Sequential(NonDynamicallyQuantizableLinear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    found = assert_exact(model, mode, table(6), table(3), class_loss, LossReduction.SAMPLE_MEAN)
    assert found.by_layer["0"].ne(0).all()


@pytest.mark.parametrize("algebra", ["auto", "token_token", "target", "fused"])
@pytest.mark.parametrize("form", ["short", "protocol"])
@pytest.mark.parametrize("rank", [2, 3])
def test_each_algebra(algebra: str, form: str, rank: int) -> None:
    train, val = (inputs(6, rank), classes(6)), (inputs(3, rank), classes(3))
    config = {"algebra": algebra}
    assert_exact(mlp(), config, train, val, class_loss, LossReduction.SAMPLE_MEAN, form)


@each_mode
@pytest.mark.parametrize("form", ["short", "protocol"])
def test_a_summed_loss(mode: dict[str, Any], form: str) -> None:
    assert_exact(mlp(), mode, table(6), table(3), class_loss_sum, LossReduction.SUM, form)


@each_mode
@pytest.mark.parametrize("form", ["short", "protocol"])
def test_a_mean_over_counted_labels(mode: dict[str, Any], form: str) -> None:
    train = inputs(4, 3), torch.tensor([[1, 2, 3], [0, -100, -100], [-100] * 3, [3, -100, 1]])
    val = inputs(2, 3), torch.tensor([[-100, 1, -100], [0, 1, 2]])
    found = assert_exact(mlp(), mode, train, val, token_loss, LossReduction.TOKEN_MEAN, form)
    assert found.scores[2] == 0  # the row without a label


@each_mode
def test_the_whole_model_is_one_layer(mode: dict[str, Any]) -> None:
    model = nn.Linear(5, 4).double()
    assert_exact(model, mode, table(6), table(3), class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
def test_frozen_parameters_are_neither_scored_nor_given_gradients(mode: dict[str, Any]) -> None:
    model = mlp()
    first = model.get_submodule("0")
    first.weight.requires_grad_(False)
    found = assert_exact(model, mode, table(6), table(3), class_loss, LossReduction.SAMPLE_MEAN)
    assert first.weight.grad is None
    assert set(found.grads) == {"0.bias", "2.weight", "2.bias"}


@each_mode
def test_conv1d_of_transformers(mode: dict[str, Any]) -> None:
    model = nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(4, 7)).double()
    for bias in (model[0].bias, model[2].bias):
        nn.init.normal_(bias)
    train, val = (inputs(6, 3), classes(6)), (inputs(3, 3), classes(3))
    assert_exact(model, mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
@pytest.mark.parametrize("rank", [2, 3])
def test_activations_in_place(mode: dict[str, Any], rank: int) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 4), nn.LeakyReLU(inplace=True))
    train, val = (inputs(6, rank), classes(6)), (inputs(3, rank), classes(3))
    assert_exact(model.double(), mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
def test_float32(mode: dict[str, Any]) -> None:
    model = mlp().float()
    (X, Y), (V, W) = table(16), table(4)
    assert_exact(
        model, mode, (X.float(), Y), (V.float(), W), class_loss, LossReduction.SAMPLE_MEAN, rtol=1e-5
    )
