"""Attaching changes no number of a plain model; detaching leaves no trace."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import GhostEngineManager, LossReduction, Selection, UnsupportedModelError
from tests.ghost import reference
from tests.ghost.harness import MODES, assert_gradients, assert_near, scored_step
from tests.ghost.models import classes, mlp, table, tiny_gpt2, tokens
from tests.ghost.reference import causal_loss, class_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


def manager_for(model: nn.Module, mode: dict[str, Any]) -> GhostEngineManager:
    V = tokens(2, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return GhostEngineManager(mode, model, optimizer, val_data=(V, V), loss_fn=causal_loss)


def scored(manager: GhostEngineManager, model: nn.Module, X: Tensor, iteration: int) -> Tensor:
    with manager.step(X, X, batch_idx=range(len(X)), iteration=iteration) as step:
        step.backward(causal_loss(model, step.X, step.Y))
    return manager.scores


def traits(model: nn.Module) -> dict[str, Any]:
    """All that attaching could have changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "state": list(model.state_dict()),
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "hooks": {name: [len(getattr(m, hook)) for hook in hooks] for name, m in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "parameter hooks": {name: p._backward_hooks for name, p in model.named_parameters()},
        "parameter attributes": {name: sorted(vars(p)) for name, p in model.named_parameters()},
        "identities": {name: id(p) for name, p in model.named_parameters()},
        "signature": model.forward.__func__,  # type: ignore[attr-defined]
    }


@each_mode
def test_detaching_restores_the_model(mode: dict[str, Any]) -> None:
    model, X = tiny_gpt2(), tokens(4, 9)
    model.transformer.h[0].ln_1.weight.requires_grad_(False)
    before, output = traits(model), model(X).logits
    manager = manager_for(model, mode)
    scored(manager, model, X, 0)
    assert "forward" in vars(model)
    manager.detach_for_evaluation()
    assert not manager.is_active
    model.zero_grad()
    assert traits(model) == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(X).logits, output)


def test_a_forward_of_the_models_own_is_put_back() -> None:
    model = mlp()
    own = model[0].forward
    model[0].forward = own
    watching = {"val_mode": "separate", "bitwise": True, "loss_reduction": "sample_mean"}
    manager = GhostEngineManager(
        watching, model, torch.optim.SGD(model.parameters(), lr=0.1), val_data=table(2), loss_fn=class_loss
    )
    assert model[0].forward is not own
    manager.cleanup()
    assert model[0].forward is own


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_a_forward_of_the_models_own_is_not_bypassed(val_mode: str) -> None:
    model = mlp()
    model[0].forward = model[0].forward
    with pytest.raises(UnsupportedModelError, match="layer '0' has a forward of its own"):
        GhostEngineManager(
            {"val_mode": val_mode, "loss_reduction": "sample_mean"}, model,
            torch.optim.SGD(model.parameters(), lr=0.1), val_data=table(2), loss_fn=class_loss,
        )  # fmt: skip
    assert "forward" not in vars(model[2])


@each_mode
def test_a_deep_copy_is_a_model_of_its_own(mode: dict[str, Any]) -> None:
    model, X = tiny_gpt2(), tokens(4, 9)
    manager = manager_for(model, mode)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert copied(X).logits.abs().max() == 0
        assert model(X).logits.abs().max() > 0
    manager.cleanup()


@each_mode
def test_a_change_of_what_is_trained_is_noticed(mode: dict[str, Any]) -> None:
    model, X = tiny_gpt2(), tokens(4, 9)
    manager = manager_for(model, mode)
    model.transformer.h[0].ln_1.weight.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="trainable parameters have changed"):
        scored(manager, model, X, 0)


@each_mode
def test_reattaching(mode: dict[str, Any]) -> None:
    model, X = tiny_gpt2(), tokens(4, 9)
    manager = manager_for(model, mode)
    first = scored(manager, model, X, 0)
    for _ in range(2):
        manager.detach_for_evaluation()
        manager.detach_for_evaluation()
        manager.reattach_after_evaluation()
        manager.reattach_after_evaluation()
    assert manager.is_active
    assert torch.equal(scored(manager, model, X, 1), first)
    manager.cleanup()
    assert not any("forward" in vars(module) for module in model.modules())


@each_mode
def test_an_attached_model_computes_the_plain_model_between_steps(mode: dict[str, Any]) -> None:
    model, X = tiny_gpt2(dropout=0.1), tokens(4, 9)
    model.eval()
    plain = model(X).logits
    manager = manager_for(model.train(), mode)
    scored(manager, model, X, 0)
    model.eval()
    assert torch.equal(model(X).logits, plain)
    with torch.no_grad():
        assert torch.equal(model(X).logits, plain)
    with torch.inference_mode():
        assert torch.equal(model(X).logits, plain)
    grads = torch.autograd.grad(causal_loss(model, X, X), list(model.parameters()))
    manager.cleanup()
    again = torch.autograd.grad(causal_loss(model, X, X), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@each_mode
def test_an_evaluation_without_gradients_inside_a_step_is_plain(mode: dict[str, Any]) -> None:
    model, X, other = tiny_gpt2(), tokens(4, 9), tokens(7, 5)
    plain = model(other).logits
    manager = manager_for(model, mode)
    expected = scored(manager, model, X, 0)
    with manager.step(X, X, batch_idx=range(4), iteration=1) as step:
        with torch.no_grad():
            assert torch.equal(model(other).logits, plain)
        step.backward(causal_loss(model, step.X, step.Y))
    assert torch.equal(manager.scores, expected)


class FunctionalHead(nn.Module):
    """Reads its table's matrix instead of calling a layer that shares it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.hidden(self.words(x))), self.words.weight)


@pytest.mark.parametrize("form", ["short", "protocol"])
@pytest.mark.parametrize("mode", [MODES["concat"], MODES["separate"]], ids=["concat", "separate"])
def test_a_parameter_used_outside_its_layer_is_refused_by_name(mode: dict[str, Any], form: str) -> None:
    train, val = ((torch.randint(0, 9, (n, 3)), classes(n)) for n in (4, 2))
    config = mode | {"loss_reduction": "sample_mean"}
    with pytest.raises(UnsupportedModelError, match=r"'words.weight' is used outside its layer"):
        scored_step(FunctionalHead(), config, train, val, class_loss, form)


def test_a_parameter_used_outside_its_layer_is_left_alone_where_it_is_not_scored() -> None:
    model = FunctionalHead()
    train, val = ((torch.randint(0, 9, (n, 3)), classes(n)) for n in (4, 2))
    config = MODES["separate"] | {"selection": Selection(include=["hidden"])}
    found = scored_step(model, config, train, val, class_loss)
    parts = reference.scores_by_parameter(model, class_loss, train, val, LossReduction.SAMPLE_MEAN)
    assert_near(found.scores, parts["hidden.weight"] + parts["hidden.bias"])
    assert_gradients(found.grads, reference.gradient(model, class_loss(model, *train)))


@each_mode
def test_nothing_of_a_step_is_kept_after_it(mode: dict[str, Any]) -> None:
    """The tapped graph, its activations and the probes go with the backward."""
    import gc
    import weakref

    model, X = tiny_gpt2(), tokens(4, 9)
    manager = manager_for(model, mode)
    kept: list[weakref.ref[Tensor]] = []
    hook = model.transformer.ln_f.register_forward_hook(lambda *call: kept.append(weakref.ref(call[2])))
    scored(manager, model, X, 0)
    hook.remove()
    gc.collect()
    assert len(kept) >= 1
    assert all(ref() is None for ref in kept)
    state = manager.engine.state  # type: ignore[attr-defined]
    assert not state.active
    assert state.probes == {}
    assert state.tied == {}
