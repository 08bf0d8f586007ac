"""Every algebra gives the inner products of per-sample gradients that are held in full."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


def columns(v: int) -> list[list[int]]:
    """Sizes of one column, of pairs, and of two sets."""
    return [[v], [1] * v, [v - v // 2, v // 2]]


def scores(left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int]) -> Tensor:
    """`[b, C]` in float64, from gradients held in full."""
    sums = [part.sum(0) for part in per_sample(val_left, val_right).split(sizes)]
    return torch.einsum("bmn,cmn->bc", per_sample(left, right), torch.stack(sums))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1 << 24, 60, 20, 1])
def test_token_token(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "TOKEN_TOKEN_CHUNK", chunk)
    sides = factors(shape)
    for sizes in columns(shape[2]):
        assert_near(algebra.token_token(*sides, sizes), scores(*sides, sizes))


def test_token_token_holds_a_chunk_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the numbers of rows and tokens."""
    monkeypatch.setattr(algebra, "TOKEN_TOKEN_CHUNK", 64)
    sides = factors((6, 40, 5, 30, 3, 2))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mul.Tensor:
                largest = max(largest, out.numel())
            return out

    with Watch():
        algebra.token_token(*sides, [5])
    assert 30 <= largest <= 64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [1 << 22, 100, 1])
def test_fused_sum_and_dots(shape: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "FUSED_TILE", tile)
    left, right, *_ = factors(shape)
    for number in (1, 3):
        targets = torch.randn(number, left.shape[2], right.shape[2], dtype=torch.float64)
        total, dots = algebra.fused_sum_and_dots(left, right, targets)
        grads = per_sample(left, right)
        assert_near(total, grads.sum(0))
        assert_near(dots, torch.einsum("bmn,cmn->bc", grads, targets))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [1 << 22, 100, 1])
def test_fused_sum_and_scores(shape: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "FUSED_TILE", tile)
    sides = factors(shape)
    for sizes in columns(shape[2]):
        total, dots = algebra.fused_sum_and_scores(*sides, sizes)
        assert_near(total, per_sample(*sides[:2]).sum(0))
        assert_near(dots, scores(*sides, sizes))


def test_results_of_earlier_calls_survive_the_shared_buffer() -> None:
    left, right, val_left, val_right = factors((4, 6, 3, 5, 7, 9))
    kept = algebra.fused_sum_and_scores(left, right, val_left, val_right, [3])
    first = [t.clone() for t in kept]
    algebra.fused_sum_and_scores(left * 3, right, val_left, val_right, [3])
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
    pairs = algebra.token_token(left, right, val_left, val_right, [1, 1, 1])
    total, dots = algebra.fused_sum_and_dots(left, right, val.sum(0).to(dtype)[None])
    scored_total, summed = algebra.fused_sum_and_scores(left, right, val_left, val_right, [3])
    assert {pairs.dtype, dots.dtype, summed.dtype} == {torch.float32}
    assert total.dtype == scored_total.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps  # of the factors' products, each rounded once
    assert_near(pairs, torch.einsum("bmn,vmn->bv", grads, val), rounding)
    assert_near(dots[:, 0], torch.einsum("bmn,mn->b", grads, val.sum(0)), rounding)
    assert_near(summed[:, 0], torch.einsum("bmn,mn->b", grads, val.sum(0)), rounding)


def test_row_dots_of_bfloat16_do_not_stall() -> None:
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)  # a bfloat16 sum of ones would stop at 256
    assert algebra.row_dots(ones, ones).item() == 4096


def test_float32_keeps_five_digits() -> None:
    sides = factors((16, 64, 4, 64, 48, 64), torch.float32)
    for sizes in ([4], [1, 1, 1, 1]):
        expected = scores(*sides, sizes)
        assert_near(algebra.fused_sum_and_scores(*sides, sizes)[1], expected, 1e-5)
        assert_near(algebra.token_token(*sides, sizes), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_custom_ops_are_well_formed(dtype: torch.dtype) -> None:
    left, right, val_left, val_right = factors((4, 6, 3, 5, 7, 9), dtype)
    targets = torch.randn(2, 7, 9, dtype=dtype)
    torch.library.opcheck(algebra.fused_sum_and_dots, (left, right, targets))
    torch.library.opcheck(algebra.fused_sum_and_scores, (left, right, val_left, val_right, [1, 2]))


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((16, 1, 2, 768, 768), "token_token"),
        ((16, 32, 4096, 768, 768), "target"),
        ((16, 1024, 1024, 768, 768), "fused"),
        ((16, 1024, 0, 768, 768), "fused"),
        ((16, 4, 0, 768, 768), "target"),
        (
            (16, 1024, 16 * 1024, 768, 768, 16),
            "fused",
        ),  # the whole matrix of pairs for the price of one column
        ((16, 1, 16, 768, 768, 16), "token_token"),
        ((16, 1024, 0, 768, 768, 8, "cuda"), "fused"),
        ((16, 1024, 0, 768, 768, 1, "cuda"), "target"),
    ],
)
def test_the_cheapest_algebra(shape: tuple[Any, ...], name: str) -> None:
    costs = algebra.costs(*shape)
    assert min(costs, key=costs.__getitem__) == name
