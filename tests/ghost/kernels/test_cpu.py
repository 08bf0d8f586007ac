"""The C program for a CPU: exact for every shape, the same bits each time, and no need where it cannot be."""

import logging
import subprocess
from collections.abc import Iterator
from ctypes import CDLL
from typing import Any

import pytest
import torch
from torch import Tensor

from ghost import algebra, kernels
from ghost.gradients import OuterProducts, RowGathers
from ghost.kernels import cpu
from ghost.preconditioner import AdamStep, slope
from ghost.weigher import Weigher
from ghost.weighted import Piece, sum_and_dots
from tests.ghost.test_algebra import per_sample, scores

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no gcc, or no AVX2")

SHAPES = [  # b, T, v, S, m, n
    (4, 6, 3, 5, 7, 9),
    (1, 1, 1, 1, 1, 1),
    (3, 5, 2, 3, 14, 32),
    (3, 5, 2, 3, 15, 33),
    (2, 40, 1, 7, 300, 520),  # more than one block each way
    (2, 1100, 1, 1030, 20, 40),  # more tokens than are packed at once
    (2, 513, 1, 3, 5, 6),
    (5, 2, 16, 3, 13, 2),
    (2, 3, 2, 3, 4, 50257),
]


@pytest.fixture(scope="module", params=["AVX512", "AVX2"])
def program(request: pytest.FixtureRequest) -> CDLL:
    """The program for each kind of processor that this one can stand in for."""
    if request.param == "AVX512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no 512-bit vectors")
    return cpu.compiled(cpu.FLAGS[request.param])


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back how many threads there are."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def factors(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """left, right, val_left, val_right."""
    b, t, v, s, m, n = shape
    return tuple(torch.randn(*size) for size in ((b, t, m), (b, t, n), (v, s, m), (v, s, n)))


def assert_close(found: Tensor, expected: Tensor, terms: int) -> None:
    """Within the rounding of a float32 sum of so many products of normal numbers."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * terms**0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_scores(program: CDLL, shape: tuple[int, ...]) -> None:
    b, t, v, s, m, n = shape
    left, right, val_left, val_right = factors(shape)
    for sizes in ([v], [1] * v, [v - v // 2, v // 2]):
        total, dots = cpu.sum_and_scores(left, right, val_left, val_right, sizes, program)
        assert_close(total, per_sample(left, right).sum(0), b * t)
        assert_close(dots, scores(left, right, val_left, val_right, sizes), t * s * m * n)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3])
def test_sums_and_dots(program: CDLL, shape: tuple[int, ...], columns: int) -> None:
    b, t, _, _, m, n = shape
    left, right, *_ = factors(shape)
    targets = torch.randn(columns, m, n, dtype=torch.bfloat16)
    total, dots = cpu.sum_and_dots(left, right, targets, program)
    assert_close(total, per_sample(left, right).sum(0), b * t)
    expected = torch.einsum("bmn,cmn->bc", per_sample(left, right), targets.double())
    assert_close(dots, expected, t * m * n)


NUMBERS = (0.8, 0.3, 0.9, 0.2, 1e-3, 0.0, 1.0)
"""carried, slope, kept, fresh, eps, decay, reach."""


def adam_expected(
    left: Tensor, right: Tensor, targets: Tensor, numbers: tuple[float, ...], state: list[Tensor | None],
    looked_up: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`cpu.adam_sum_and_dots` in float64, and the sum of the squares; `looked_up` is `[b, m, n]`."""
    *step, reach = numbers
    each, wide = per_sample(left, right), [t if t is None else t.double() for t in state]
    m, v, p, before, squares = wide
    total, square = (each + looked_up).sum(0), (each + looked_up).square().sum(0)
    if squares is not None:
        square = square + squares
    grad = total if before is None else total + before
    assert m is not None
    assert v is not None
    weighted = slope(AdamStep(*step), grad * reach, square * reach, m, v, p) * targets.double()
    dots = [torch.einsum("bmn,cmn->bc", part, weighted) for part in (each, looked_up)]
    return total, *dots, square


@pytest.mark.parametrize("shape", [*SHAPES[:-1], (64, 3, 1, 1, 40, 300), (0, 3, 1, 1, 4, 5)], ids=str)
@pytest.mark.parametrize(
    "kind", ["plain", "decay", "several micro-batches", "first step", "no eps", "looked up"]
)
def test_sums_and_dots_of_adams_step(program: CDLL, shape: tuple[int, ...], kind: str) -> None:
    b, t, count, _, m, n = shape
    left, right, *_ = factors(shape)
    targets, numbers = torch.randn(count, m, n), list(NUMBERS)
    state: list[Tensor | None] = [torch.randn(m, n), torch.rand(m, n), None, None, None]
    lookups, looked_up = None, torch.zeros(b, m, n, dtype=torch.float64)
    if kind == "decay":
        state[2], numbers[5] = torch.randn(m, n), 0.1
    elif kind == "several micro-batches":
        state[3], state[4], numbers[6] = torch.randn(m, n), torch.rand(m, n), 2.5
    elif kind == "first step":
        state[0] = state[1] = torch.zeros(()).expand(m, n)
    elif kind == "no eps":
        numbers[4] = 0.0  # beyond the edges there is no gradient, and a slope would be 0 / 0
    elif kind == "looked up" and b:
        places = torch.randperm(b * m)[: b * m // 2 + 1].sort().values
        lookups = places // b, places % b, torch.randn(len(places), n)
        looked_up[lookups[1], lookups[0]] = lookups[2].double()
    expected = adam_expected(left, right, targets, tuple(numbers), state, looked_up)
    found = cpu.adam_sum_and_dots(left, right, targets, numbers, state, lookups, program)
    assert_close(found[0], expected[0], b * t)
    # Slopes are the ratios of sums: their rounding is relative to themselves.
    for dots, exact in zip(found[1:], expected[1:3], strict=True):
        scale = max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
        torch.testing.assert_close(dots.double(), exact, rtol=1e-5, atol=2e-5 * scale)
    if state[4] is not None:
        torch.testing.assert_close(state[4].double(), expected[3], rtol=1e-5, atol=1e-5 * t)


@pytest.mark.usefixtures("threads")
def test_the_same_bits_of_adams_step_each_time(program: CDLL) -> None:
    left, right, *_ = factors((3, 70, 2, 70, 300, 600))
    targets, state = torch.randn(1, 300, 600), [torch.randn(300, 600), torch.rand(300, 600), None, None, None]
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        first, again = (
            cpu.adam_sum_and_dots(left, right, targets, NUMBERS, state, program=program) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_factors_of_any_strides(program: CDLL) -> None:
    """Slices of a wider tensor, one token for all, columns that lie apart, targets that are views."""
    wide, right = torch.randn(6, 9, 50), torch.randn(9, 3, 20).transpose(0, 1)
    one = torch.randn(3, 1, 17).expand(3, 9, 17)
    across = torch.randn(3, 17, 9).transpose(1, 2)
    targets = torch.randn(2, 20, 17).transpose(1, 2)
    for left in (wide[::2, :, 5:22], one, across):
        total, dots = cpu.sum_and_dots(left, right, targets, program)
        each = per_sample(left, right)
        assert_close(total, each.sum(0), 27)
        assert_close(dots, torch.einsum("bmn,cmn->bc", each, targets.double()), 9 * 17 * 20)


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 1, 2, 4, 5), (2, 0, 1, 2, 4, 5), (2, 3, 0, 2, 4, 5), (2, 3, 1, 0, 4, 5), (2, 3, 1, 2, 0, 5)],
)
def test_nothing_to_sum_is_zero(program: CDLL, shape: tuple[int, ...]) -> None:
    b, _, v, *_ = shape
    sides = factors(shape)
    total, dots = cpu.sum_and_scores(*sides, [v], program)
    assert_close(total, per_sample(*sides[:2]).sum(0), 6)
    assert torch.equal(dots, torch.zeros(b, 1))


@pytest.mark.usefixtures("threads")
def test_the_same_bits_each_time(program: CDLL) -> None:
    sides = factors((3, 70, 2, 70, 300, 600))
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        first, again = (cpu.sum_and_scores(*sides, [1, 1], program) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_is_not_finite_stays_with_its_sample(program: CDLL) -> None:
    left, right, val_left, val_right = factors((3, 5, 1, 5, 20, 40))
    left[1, 2, 3] = torch.inf
    total, dots = cpu.sum_and_scores(left, right, val_left, val_right, [1], program)
    assert not dots[1].isfinite()
    assert dots[[0, 2]].isfinite().all()
    assert not total[3].isfinite().any()
    assert total[torch.arange(20) != 3].isfinite().all()


def test_denormal_numbers_are_left_as_they_were() -> None:
    """A library that is compiled for fast arithmetic may switch them off for the whole process."""
    cpu.compiled(cpu.FLAGS["AVX2"])
    assert (torch.tensor([1e-40]) * 1.0).item() > 0


def test_which_factors_it_is_for() -> None:
    assert kernels.serves("cpu", torch.float32, kernels.MOST_COLUMNS)
    assert not kernels.serves("cpu", torch.float32, kernels.MOST_COLUMNS + 1)
    assert not kernels.serves("cpu", torch.float64, 1)


def refuse(error: Exception) -> Any:
    def run(*_: Any, **__: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FileNotFoundError(2, "No such file or directory", "gcc"), "No such file"),
        (subprocess.CalledProcessError(1, ["gcc"], stderr="unrecognized option\nand more"), "unrecognized"),
    ],
)
def test_without_a_compiler_scores_are_the_same(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sides = factors((3, 5, 2, 4, 15, 33))
    total, dots = algebra.fused_sum_and_scores(*sides, [2])
    monkeypatch.setattr(cpu.subprocess, "run", refuse(error))
    cpu.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            plain_total, plain_dots = algebra.fused_sum_and_scores(*sides, [2])
            assert not kernels.serves("cpu", torch.float32, 1)
    finally:
        cpu.library.cache_clear()
    assert len(caplog.records) == 1
    assert "install gcc" in caplog.text
    assert says in caplog.text
    torch.testing.assert_close(plain_total, total)
    torch.testing.assert_close(plain_dots, dots, rtol=1e-5, atol=1e-4)


def test_other_processors_take_the_products_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    cpu.library.cache_clear()
    try:
        assert cpu.library() is None
    finally:
        cpu.library.cache_clear()


@pytest.mark.parametrize("first", [True, False])
def test_a_head_that_is_the_embedding(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is a matrix too, with rows looked up more than once, in either order of its uses."""
    b, t, m, n = 3, 6, 40, 33
    left, right, targets = torch.randn(b, t, m), torch.randn(b, t, n), torch.randn(2, m, n)
    ids = torch.randint(0, 5, (b, t))
    uses = [
        Piece(OuterProducts(left, right), None, b),
        Piece(RowGathers(ids, torch.randn(b, t, n), m), None, b),
    ]
    pieces = uses if first else uses[::-1]
    numbers = torch.tensor(NUMBERS, dtype=torch.float64)
    state = [torch.randn(m, n), torch.rand(m, n), torch.randn(m, n), torch.randn(m, n)]
    found = {}
    for served in (True, False):
        squares = torch.ones(m, n)
        monkeypatch.setattr(kernels, "serves", lambda *_, served=served: served)
        total, dots = sum_and_dots(pieces, targets, Weigher(numbers, *state, squares), 1 << 20)
        found[served] = total, *dots, squares
    for by_kernel, by_tiles in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(by_kernel, by_tiles, rtol=1e-4, atol=1e-4)


def test_adams_step_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """For float32 and for as many columns as it takes; a part of the samples alone is PyTorch's."""
    called: list[int] = []
    run = cpu.adam_sum_and_dots
    monkeypatch.setattr(cpu, "adam_sum_and_dots", lambda *given: called.append(len(given[2])) or run(*given))
    numbers = torch.tensor(NUMBERS, dtype=torch.float64)

    def take(dtype: torch.dtype, columns: int, row: Tensor | None = None) -> int:
        called.clear()
        left, right = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype)
        m, v = torch.zeros(4, 5, dtype=dtype), torch.ones(4, 5, dtype=dtype)
        pieces = [Piece(OuterProducts(left, right), row, 2)]
        sum_and_dots(pieces, torch.randn(columns, 4, 5, dtype=dtype), Weigher(numbers, m, v, m), 1 << 20)
        return len(called)

    assert take(torch.float32, 1)
    assert take(torch.float32, kernels.MOST_COLUMNS)
    assert not take(torch.float32, kernels.MOST_COLUMNS + 1)
    assert not take(torch.float64, 1)
    assert not take(torch.float32, 1, torch.tensor([0, 0]))
