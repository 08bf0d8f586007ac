"""What holds over whole steps: zero impact on training, and accumulation as one large batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import GhostEngineManager, LossReduction
from ghost.loss import count
from tests.ghost import reference
from tests.ghost.harness import MODES, assert_gradients, assert_near, grads_of, scored_step
from tests.ghost.models import tiny_gpt2, tokens, with_ignored
from tests.ghost.reference import causal_loss

CAUSAL = LossReduction.CAUSAL_TOKEN_MEAN
STEPS = 5

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


def trained(config: dict[str, Any] | None, dropout: float) -> list[Tensor]:
    """Weights after a few AdamW steps with clipping; without a manager where there is no config."""
    torch.manual_seed(3)
    model = tiny_gpt2(dropout=dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches, V = tokens(4 * STEPS, 9).split(4), tokens(3, 9)
    manager = None
    if config is not None:
        manager = GhostEngineManager(config, model, optimizer, val_data=(V, V), loss_fn=causal_loss)
    torch.manual_seed(4)
    for t, X in enumerate(batches):
        optimizer.zero_grad()
        if manager is None:
            causal_loss(model, X, X).backward()
        else:
            with manager.step(X, X, batch_idx=range(4), iteration=t) as step:
                step.backward(causal_loss(model, step.X, step.Y))
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if manager is not None:
            manager.aggregate_and_log()
    if manager is not None:
        manager.cleanup()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("config", [{"method": "Regular"}, MODES["bitwise"]], ids=["regular", "bitwise"])
def test_training_is_bit_identical(config: dict[str, Any], dropout: float) -> None:
    for plain, weights in zip(trained(None, dropout), trained(config, dropout), strict=True):
        assert torch.equal(plain, weights)


def test_the_bitwise_test_can_fail() -> None:
    changed = trained(MODES["bitwise"], 0.1)
    assert not all(torch.equal(a, b) for a, b in zip(changed, trained(None, 0.0), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_separate_pass_trains_as_a_plain_run_does_up_to_rounding(dropout: float) -> None:
    for plain, weights in zip(trained(None, dropout), trained(MODES["separate"], dropout), strict=True):
        assert_near(weights, plain, 1e-8)  # AdamW's first steps divide by small numbers


def test_a_joint_batch_trains_as_a_plain_run_does_up_to_rounding() -> None:
    for plain, weights in zip(trained(None, 0.0), trained(MODES["concat"], 0.0), strict=True):
        assert_near(weights, plain, 1e-8)


@each_mode
@pytest.mark.parametrize("form", ["short", "protocol"])
def test_accumulation_weighed_by_counts_equals_one_large_batch(mode: dict[str, Any], form: str) -> None:
    model, V = tiny_gpt2(), tokens(3, 9)
    X = tokens(6, 9)
    Y, val = with_ignored(X, [9, 2, 5, 7, 3, 8]), (V, with_ignored(V, [9, 4, 6]))
    config = mode | {"loss_reduction": CAUSAL}
    whole = scored_step(model, config, (X, Y), val, causal_loss)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager(config, model, optimizer, val_data=val, loss_fn=causal_loss)
    total = count(Y, CAUSAL)
    parts = ([0, 1], [2], [3, 4, 5])
    for part in parts:
        share = count(Y[part], CAUSAL).double() / total
        if form == "short":
            with manager.step(
                X[part], Y[part], batch_idx=part, iteration=0, share=share, last=part is parts[-1]
            ) as step:
                step.backward(causal_loss(model, step.X, step.Y))
        else:
            manager.attach_train_batch(X[part], Y[part], 0, part, share)
            (causal_loss(model, *manager.prepare_forward_input(X[part], Y[part])) * share).backward()
    if form == "protocol":
        manager.prepare_gradients()
    assert_near(manager.scores, whole.scores)
    for layer, score in manager.scores_by_layer.items():
        assert_near(score, whole.by_layer[layer])
    assert_gradients(grads_of(model), whole.grads)
    manager.cleanup()


@each_mode
@pytest.mark.parametrize("form", ["short", "protocol"])
def test_accumulation_divided_by_its_steps(mode: dict[str, Any], form: str) -> None:
    """`gradient_accumulation_steps=k`: the loop divides its loss by k, or the manager does so itself."""
    model, X, V = tiny_gpt2(), tokens(6, 9), tokens(3, 9)
    config = mode | {"loss_reduction": CAUSAL}
    whole = scored_step(model, config, (X, X), (V, V), causal_loss)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager(
        config | {"gradient_accumulation_steps": 3}, model, optimizer, val_data=(V, V), loss_fn=causal_loss
    )
    for m, part in enumerate(X.split(2)):
        ids = [2 * m, 2 * m + 1]
        if form == "short":
            with manager.step(part, part, batch_idx=ids, iteration=0, last=m == 2) as step:
                step.backward(causal_loss(model, step.X, step.Y))
        else:
            manager.attach_train_batch(part, part, 0, ids)
            (causal_loss(model, *manager.prepare_forward_input(part, part)) / 3).backward()
    if form == "protocol":
        manager.prepare_gradients()
    assert_near(manager.scores, whole.scores)
    assert_gradients(grads_of(model), whole.grads)
    manager.cleanup()


@each_mode
def test_the_same_seed_gives_the_same_scores(mode: dict[str, Any]) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        model, X, V = tiny_gpt2(dropout=0.1), tokens(4, 9), tokens(3, 9)
        found.append(scored_step(model, mode | {"loss_reduction": CAUSAL}, (X, X), (V, V), causal_loss))
    assert torch.equal(found[0].scores, found[1].scores)


@each_mode
def test_scores_predict_the_fall_of_the_validation_loss(mode: dict[str, Any]) -> None:
    """One SGD step: the loss falls by lr times the scores' sum, to first order."""
    model, X, V = tiny_gpt2(), tokens(4, 9), tokens(3, 9)
    found = scored_step(model, mode | {"loss_reduction": CAUSAL}, (X, X), (V, V), causal_loss)
    lr = 1e-5
    before = causal_loss(model, V, V)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p -= lr * found.grads[name]
    fall = before - causal_loss(model, V, V)
    torch.testing.assert_close(fall, lr * found.scores.sum(), rtol=1e-3, atol=0.0)


@each_mode
def test_every_micro_batch_of_a_step_is_scored(mode: dict[str, Any]) -> None:
    """The parts' scores stand in the order in which they were attached."""
    model, X, V = tiny_gpt2(), tokens(4, 9), tokens(3, 9)
    expected = reference.scores(model, causal_loss, (X, X), (V, V), CAUSAL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager(
        mode | {"gradient_accumulation_steps": 4}, model, optimizer, val_data=(V, V), loss_fn=causal_loss
    )
    for i in (2, 0, 3, 1):
        with manager.step(X[[i]], X[[i]], batch_idx=[i], iteration=0, last=i == 1) as step:
            step.backward(causal_loss(model, step.X, step.Y))
    assert_near(manager.scores, expected[[2, 0, 3, 1]])
    manager.cleanup()
