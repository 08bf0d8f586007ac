"""The algebra is picked when the shapes are known, can be forced, and is written down."""

import gc
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from ghost import Algebra, GhostEngineManager, LossReduction
from ghost.choice import Choices, Plan, _books, choose, dot, scores, sum_and_dots, sum_and_scores
from ghost.choice import _dot_op as dot_op
from ghost.choice import _scores_op as scores_op
from ghost.choice import _sum_and_dots_op as sum_and_dots_op
from ghost.choice import _sum_and_scores_op as sum_and_scores_op
from ghost.costs import Problem
from tests.ghost.harness import assert_near
from tests.ghost.models import tiny_gpt2, tokens
from tests.ghost.reference import causal_loss

SHAPES = [(4, 6, 3, 7, 9), (1, 1, 1, 1, 1), (5, 33, 2, 13, 2), (3, 17, 1, 1, 40)]  # b, T, v, m, n
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4 * 2**-8}
WAYS = [kind.value for kind in Algebra]


def factors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, t, v, m, n = shape
    sides = ((b, t, m), (b, t, n), (v, t, m), (v, t, n))
    return tuple(torch.randn(*side, dtype=torch.float64).to(dtype) for side in sides)  # type: ignore[return-value]


def gradients(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("btm,btn->bmn", left.double(), right.double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("how", WAYS)
def test_every_algebra_forced_is_exact(shape: tuple[int, ...], dtype: torch.dtype, how: str) -> None:
    left, right, val_left, val_right = factors(shape, dtype)
    mine, theirs = gradients(left, right), gradients(val_left, val_right)
    for chunk in (1 << 26, 256):
        plan = Plan(chunk)
        total, dots = sum_and_scores(left, right, val_left, val_right, [shape[2]], how, plan)
        expected = torch.einsum("bmn,mn->b", mine, theirs.sum(0))
        assert_near(total, mine.sum(0), TOLERANCE[dtype])
        assert_near(dots[:, 0], expected, TOLERANCE[dtype])
        alone = scores(left, right, val_left, val_right, [shape[2]], how, plan)
        assert_near(alone[:, 0], expected, TOLERANCE[dtype])
        target = theirs.sum(0).to(dtype)
        total, dots = sum_and_dots(left, right, target[None], how, plan)
        assert_near(total, mine.sum(0), TOLERANCE[dtype])
        assert_near(dots[:, 0], torch.einsum("bmn,mn->b", mine, target.double()), TOLERANCE[dtype])
        assert_near(dot(left, right, target, plan), dots[:, 0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", WAYS)
def test_operators_are_well_formed(dtype: torch.dtype, how: str) -> None:
    left, right, val_left, val_right = factors((4, 6, 3, 7, 9), dtype)
    targets = torch.randn(2, 7, 9, dtype=torch.float64).to(dtype)
    torch.library.opcheck(sum_and_scores_op, (left, right, val_left, val_right, [1, 2], how, 1 << 20, None))
    torch.library.opcheck(scores_op, (left, right, val_left, val_right, [1, 2], how, 1 << 20, None))
    torch.library.opcheck(sum_and_dots_op, (left, right, targets, how, 1 << 20, None))
    torch.library.opcheck(dot_op, (left, right, targets[0], 1 << 20, None))


def test_what_a_problem_has_not_falls_back_to_the_cheapest() -> None:
    """A part of a matrix wants no sum, and cannot be fused with it."""
    assert choose(Problem(4, 6, 7, 9, 18), "fused", 1 << 20, None) is Algebra.FUSED
    assert choose(Problem(4, 6, 7, 9, 18, wants_sum=False), "fused", 1 << 20, None) is not Algebra.FUSED


def test_choices_are_written_down_by_name_and_changes_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "ghost.choice")
    choices = Choices()
    for name in ("a.weight", "b.weight", "c.weight", "d.weight"):
        choose(Problem(8, 512, 768, 3072, 512), "auto", 1 << 26, choices.plan(name).note)
    choose(Problem(8, 1, 10, 10, 1), "token_token", 1 << 26, choices.plan("head.weight").note)
    assert str(choices) == "fused: 4 matrices; token_token: 1 matrix (head.weight)"
    assert choices.found["a.weight"] is Algebra.FUSED
    assert not caplog.messages
    choose(Problem(8, 16, 768, 3072, 16), "auto", 1 << 26, choices.plan("a.weight").note)
    assert choices.found["a.weight"] is Algebra.TOKEN_TOKEN
    assert "a.weight: token_token instead of fused" in caplog.text


def test_a_book_that_is_gone_is_not_kept() -> None:
    choices = Choices()
    note = choices.plan("w").note
    assert note is not None
    number = note[0].item()
    del choices
    gc.collect()
    assert number not in _books
    assert choose(Problem(8, 16, 768, 3072, 16), "target", 1 << 26, note) is Algebra.TARGET


SEPARATE = {"val_mode": "separate"}
MODES = {"concat": {}, "separate": SEPARATE, "bitwise": SEPARATE | {"bitwise": True}}


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
def test_the_manager_tells_the_algebra_of_each_matrix(mode: dict[str, Any]) -> None:
    model, X, V = tiny_gpt2(), tokens(4, 9), tokens(3, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = mode | {"algebra": "target", "loss_reduction": LossReduction.CAUSAL_TOKEN_MEAN}
    manager = GhostEngineManager(config, model, optimizer, val_data=(V, V), loss_fn=causal_loss)
    assert str(manager.algebra) == ""
    with manager.step(X, X, batch_idx=range(4), iteration=0) as step:
        step.backward(causal_loss(model, step.X, step.Y))
    matrices = {
        name
        for name, p in model.named_parameters()
        if p.dim() == 2 and "wte" not in name and "wpe" not in name
    }
    assert set(manager.algebra.found) == matrices | {"lm_head.weight"}
    assert set(manager.algebra.found.values()) == {Algebra.TARGET}
    manager.cleanup()
