"""Every algebra gives the inner products of per-sample gradients that are held in full."""

import pytest
import torch
from torch import Tensor

from ghost import algebra
from tests.ghost.harness import assert_near

SHAPES = [  # b, T, v, S, m, n
    (4, 6, 3, 5, 7, 9),
    (1, 6, 2, 6, 7, 9),
    (4, 1, 3, 1, 9, 7),
    (3, 8, 1, 2, 1, 5),
    (1, 1, 1, 1, 1, 1),
    (5, 2, 16, 3, 13, 2),
]


def factors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """left, right, val_left, val_right."""
    b, t, v, s, m, n = shape
    sizes = ((b, t, m), (b, t, n), (v, s, m), (v, s, n))
    return tuple(torch.randn(*size, dtype=dtype) for size in sizes)


def per_sample(left: Tensor, right: Tensor) -> Tensor:
    """`[b, m, n]` in float64."""
    return torch.einsum("btm,btn->bmn", left.double(), right.double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1 << 24, 20, 1])
def test_token_token(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "TOKEN_TOKEN_CHUNK", chunk)
    left, right, val_left, val_right = factors(shape)
    expected = torch.einsum("bmn,vmn->bv", per_sample(left, right), per_sample(val_left, val_right))
    assert_near(algebra.token_token(left, right, val_left, val_right), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [1 << 22, 100, 1])
def test_fused_sum_and_dot(shape: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "FUSED_TILE", tile)
    left, right, *_ = factors(shape)
    target = torch.randn(left.shape[2], right.shape[2], dtype=torch.float64)
    total, dots = algebra.fused_sum_and_dot(left, right, target)
    grads = per_sample(left, right)
    assert_near(total, grads.sum(0))
    assert_near(dots, torch.einsum("bmn,mn->b", grads, target))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [1 << 22, 100, 1])
def test_fused_sum_and_score(shape: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "FUSED_TILE", tile)
    left, right, val_left, val_right = factors(shape)
    total, dots = algebra.fused_sum_and_score(left, right, val_left, val_right)
    grads = per_sample(left, right)
    assert_near(total, grads.sum(0))
    assert_near(dots, torch.einsum("bmn,mn->b", grads, per_sample(val_left, val_right).sum(0)))


def test_results_of_earlier_calls_survive_the_shared_buffer() -> None:
    left, right, val_left, val_right = factors((4, 6, 3, 5, 7, 9))
    kept = algebra.fused_sum_and_score(left, right, val_left, val_right)
    first = [t.clone() for t in kept]
    algebra.fused_sum_and_score(left * 3, right, val_left, val_right)
    for was, now in zip(first, kept, strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (3, 2, 5)])
def test_row_dots(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)
    assert_near(algebra.row_dots(a, b), torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_summed_in_float32(dtype: torch.dtype) -> None:
    left, right, val_left, val_right = factors((4, 6, 3, 5, 7, 9), dtype)
    grads, val = per_sample(left, right), per_sample(val_left, val_right)
    pairs = algebra.token_token(left, right, val_left, val_right)
    total, dots = algebra.fused_sum_and_dot(left, right, val.sum(0).to(dtype))
    scored_total, scores = algebra.fused_sum_and_score(left, right, val_left, val_right)
    assert {pairs.dtype, dots.dtype, scores.dtype} == {torch.float32}
    assert total.dtype == scored_total.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps  # of the factors' products, each rounded once
    assert_near(pairs, torch.einsum("bmn,vmn->bv", grads, val), rounding)
    assert_near(dots, torch.einsum("bmn,mn->b", grads, val.sum(0)), rounding)
    assert_near(scores, torch.einsum("bmn,mn->b", grads, val.sum(0)), rounding)


def test_row_dots_of_bfloat16_do_not_stall() -> None:
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)  # a bfloat16 sum of ones would stop at 256
    assert algebra.row_dots(ones, ones).item() == 4096


def test_float32_keeps_five_digits() -> None:
    left, right, val_left, val_right = factors((16, 64, 4, 64, 48, 64), torch.float32)
    expected = torch.einsum("bmn,mn->b", per_sample(left, right), per_sample(val_left, val_right).sum(0))
    assert_near(algebra.fused_sum_and_score(left, right, val_left, val_right)[1], expected, 1e-5)
    assert_near(algebra.token_token(left, right, val_left, val_right).sum(1), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_custom_ops_are_well_formed(dtype: torch.dtype) -> None:
    left, right, val_left, val_right = factors((4, 6, 3, 5, 7, 9), dtype)
    target = torch.randn(7, 9, dtype=dtype)
    torch.library.opcheck(algebra.fused_sum_and_dot, (left, right, target))
    torch.library.opcheck(algebra.fused_sum_and_score, (left, right, val_left, val_right))


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((16, 1, 2, 768, 768), "token_token"),
        ((16, 32, 4096, 768, 768), "target"),
        ((16, 1024, 1024, 768, 768), "fused"),
        ((16, 1024, 0, 768, 768), "fused"),
        ((16, 4, 0, 768, 768), "target"),
    ],
)
def test_cheapest(shape: tuple[int, int, int, int, int], name: str) -> None:
    assert algebra.cheapest(*shape) == name
