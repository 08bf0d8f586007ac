"""Losses that differentiate on their own way, beside the step's backward or through it."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghost import GhostEngineManager, LossReduction, UnsupportedModelError
from ghost.batch import Inputs
from tests.ghost import reference
from tests.ghost.harness import assert_gradients, assert_near, grads_of
from tests.ghost.models import mlp, table, tiny_gpt2, tokens

LossFn = Callable[[nn.Module, Inputs, Tensor], Tensor]
Rows = tuple[Inputs, Tensor]
BY_SAMPLE = LossReduction.SAMPLE_MEAN
# Settings, and what besides scores and gradients they give.
ENGINES: dict[str, dict[str, Any]] = {
    "concat": {},
    "separate": {"val_mode": "separate"},
    "bitwise": {"val_mode": "separate", "bitwise": True},
    "order 2": {"val_mode": "separate", "order": 2},
    "gram": {"gram": True},
    "gram, separate": {"gram": True, "val_mode": "separate"},
}


def adversarial(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Of inputs moved along the sign of the loss's gradient at them."""
    assert isinstance(X, Tensor)
    x = X.detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), Y), x)
    return F.cross_entropy(model((x + 0.1 * grad.sign()).detach()), Y)


def by_saliency(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Each row weighed by its gradient at the inputs, one forward for both."""
    assert isinstance(X, Tensor)
    x = X.detach().requires_grad_()
    losses = F.cross_entropy(model(x), Y, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    return (losses * (1 + grad.norm(dim=1))).mean()


def penalised(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """With the norm of the gradient at the inputs in the loss."""
    assert isinstance(X, Tensor)
    x = X.detach().requires_grad_()
    loss = F.cross_entropy(model(x), Y)
    (grad,) = torch.autograd.grad(loss * len(x), x, create_graph=True)
    return loss + 0.1 * grad.square().sum(1).mean()


def scored(
    model: nn.Module, settings: dict[str, Any], loss_fn: LossFn, optimizer: torch.optim.Optimizer,
    train: Rows, val: Rows,
) -> GhostEngineManager:  # fmt: skip
    """One step."""
    manager = GhostEngineManager(
        {"loss_reduction": "sample_mean", **settings}, model, optimizer, val_data=val, loss_fn=loss_fn
    )
    with manager.step(*train, batch_idx=range(5), iteration=0) as step:
        step.backward(loss_fn(model, step.X, step.Y))
    return manager


@pytest.mark.parametrize("loss_fn", [adversarial, by_saliency])
@pytest.mark.parametrize("settings", ENGINES.values(), ids=list(ENGINES))
def test_a_gradient_at_the_inputs_is_none_of_the_steps(settings: dict[str, Any], loss_fn: LossFn) -> None:
    model, train, val = mlp(), table(5), table(3)
    manager = scored(model, settings, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1), train, val)
    assert_near(manager.scores, reference.scores(model, loss_fn, train, val, BY_SAMPLE))
    assert_gradients(grads_of(model), reference.gradient(model, loss_fn(model, *train)))
    if settings.get("order") == 2:
        assert_near(manager.curvatures, reference.curvatures(model, loss_fn, train, val, BY_SAMPLE))
    if settings.get("gram"):
        each = reference.sample_gradients(model, loss_fn, *train, BY_SAMPLE)
        assert_near(
            manager.gram, torch.stack([torch.stack([reference.dot(a, b) for b in each]) for a in each])
        )
    manager.cleanup()


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_a_gradient_at_the_embeddings_of_a_tied_model(val_mode: str) -> None:
    model, train, val = tiny_gpt2(), tokens(4, 6), tokens(2, 6)

    def loss_fn(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        found: list[Tensor] = []
        table = model.get_submodule("transformer.wte")
        hook = table.register_forward_hook(lambda module, args, output: found.append(output))
        loss = reference.causal_loss(model, X, Y)
        hook.remove()
        torch.autograd.grad(loss, found, retain_graph=True)
        return loss

    settings = {"val_mode": val_mode, "loss_reduction": "causal_token_mean"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows, val_rows = (train, train), (val, val)
    manager = GhostEngineManager(settings, model, optimizer, val_data=val_rows, loss_fn=loss_fn)
    with manager.step(*rows, batch_idx=range(4), iteration=0) as step:
        step.backward(loss_fn(model, step.X, step.Y))
    mean = LossReduction.CAUSAL_TOKEN_MEAN
    wanted = reference.scores(model, reference.causal_loss, rows, val_rows, mean)
    assert_near(manager.scores, wanted)
    manager.cleanup()


@pytest.mark.parametrize("settings", ENGINES.values(), ids=list(ENGINES))
def test_a_second_derivative_is_refused_by_name(settings: dict[str, Any]) -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        UnsupportedModelError, match=r"is differentiated with create_graph=True, and a second"
    ):
        scored(model, settings, penalised, sgd, table(5), table(3))


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_scores_of_the_optimizers_step_want_every_forward_in_the_loss(val_mode: str) -> None:
    model = mlp()
    settings = {"val_mode": val_mode, "preconditioner": "auto"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModelError, match=r"ran more often than the backward came by"):
        scored(model, settings, adversarial, optimizer, table(5), table(3))


class Attending(nn.Module):
    """A module without a formula, on an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inside(x))[:, None]
        h = h * 1.0  # whose only other holder is the attention
        self.seen.append(weakref.ref(h.untyped_storage()))
        return self.out(self.attention(h, h, h)[0][:, 0])


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_what_a_module_without_a_formula_saw_goes_with_its_backward(val_mode: str) -> None:
    model = Attending()
    manager = GhostEngineManager(
        {"val_mode": val_mode, "loss_reduction": "sample_mean"},
        model, torch.optim.SGD(model.parameters(), lr=0.1),
        val_data=(torch.randn(3, 6), torch.randint(0, 3, (3,))), loss_fn=reference.class_loss,
    )  # fmt: skip
    X, Y = torch.randn(5, 6), torch.randint(0, 3, (5,))
    with manager.step(X, Y, batch_idx=range(5), iteration=0) as step:
        loss = reference.class_loss(model, step.X, step.Y)
        step.backward(loss)
    gc.collect()
    assert loss.grad_fn is not None  # the graph is there still
    assert all(ref() is None for ref in model.seen)
    manager.cleanup()


def test_tensors_in_the_place_of_parameters_are_named() -> None:
    model, (X, Y) = mlp(), table(5)
    manager = GhostEngineManager(
        {"val_mode": "separate", "loss_reduction": "sample_mean"}, model,
        torch.optim.SGD(model.parameters(), lr=0.1), val_data=(X, Y), loss_fn=reference.class_loss,
    )  # fmt: skip
    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def with_tensors() -> None:
        with manager.step(X, Y, batch_idx=range(5), iteration=0) as step:
            assert isinstance(step.X, Tensor)
            step.backward(F.cross_entropy(torch.func.functional_call(model, values, (step.X,)), step.Y))

    message = r"has a Tensor for its parameter 'weight', as under torch.func.functional_call"
    with pytest.raises(UnsupportedModelError, match=message):
        with_tensors()
    manager.cleanup()
