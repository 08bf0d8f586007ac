"""The factored forms answer as the gradients they stand for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ghost import Algebra
from ghost.gradients import Materialised, OuterProducts, RowGathers, SampleGradients
from tests.ghost.harness import assert_near

ROWS, VAL_ROWS = 4, 3


def materialised() -> tuple[SampleGradients, Tensor]:
    values = torch.randn(ROWS + VAL_ROWS, 2, 5, dtype=torch.float64)
    return Materialised(values), values


def outer_products(tokens: int, m: int, n: int) -> tuple[SampleGradients, Tensor]:
    left = torch.randn(ROWS + VAL_ROWS, tokens, m, dtype=torch.float64)
    right = torch.randn(ROWS + VAL_ROWS, tokens, n, dtype=torch.float64)
    return OuterProducts(left, right), torch.einsum("btm,btn->bmn", left, right)


def kernel() -> tuple[SampleGradients, Tensor]:
    form, full = outer_products(6, 3, 8)
    assert isinstance(form, OuterProducts)
    shape = torch.Size((3, 2, 2, 2))
    return OuterProducts(form.left, form.right, shape), full.reshape(-1, *shape)


def row_gathers() -> tuple[SampleGradients, Tensor]:
    ids = torch.randint(0, 4, (ROWS + VAL_ROWS, 6))  # 6 positions, 4 rows looked up: each sample repeats some
    ids[0] = 2
    grad = torch.randn(*ids.shape, 5, dtype=torch.float64)
    full = torch.zeros(len(ids), 9, 5, dtype=torch.float64)
    for i, row in enumerate(ids):
        for t, token in enumerate(row):
            full[i, token] += grad[i, t]
    return RowGathers(ids, grad, 9), full


FORMS: dict[str, Callable[[], tuple[SampleGradients, Tensor]]] = {
    "materialised": materialised,
    "outer products": lambda: outer_products(6, 7, 5),
    "outer products of one token": lambda: outer_products(1, 5, 7),
    "kernel": kernel,
    "row gathers": row_gathers,
}

each_form = pytest.mark.parametrize("make", FORMS.values(), ids=list(FORMS))
each_algebra = pytest.mark.parametrize("how", Algebra)


@each_form
def test_sum(make: Callable[[], tuple[SampleGradients, Tensor]]) -> None:
    form, full = make()
    assert form.rows == len(full)
    assert form.sum().shape == full.shape[1:]
    assert_near(form.sum(), full.sum(0))


@each_form
def test_dot(make: Callable[[], tuple[SampleGradients, Tensor]]) -> None:
    form, full = make()
    target = torch.randn_like(full[0])
    assert_near(form.dot(target), full.flatten(1) @ target.flatten())


SIZES = [(VAL_ROWS,), (1,) * VAL_ROWS, (1, 0, VAL_ROWS - 1)]
each_size = pytest.mark.parametrize("sizes", SIZES, ids=["one column", "pairs", "sets, one empty"])


def column_sums(full: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """`[C, n]`: the flattened gradients added up within columns."""
    return torch.stack([part.sum(0) for part in full.flatten(1).split(list(sizes))])


@each_form
@each_algebra
@each_size
def test_scores(
    make: Callable[[], tuple[SampleGradients, Tensor]], how: Algebra, sizes: tuple[int, ...]
) -> None:
    form, full = make()
    train, val = form.split(ROWS)
    assert (train.rows, val.rows) == (ROWS, VAL_ROWS)
    expected = full[:ROWS].flatten(1) @ column_sums(full[ROWS:], sizes).T
    assert_near(train.scores(val, sizes, how), expected)
    total, dots = train.sum_and_scores(val, sizes, how)
    assert total.shape == full.shape[1:]
    assert_near(total, full[:ROWS].sum(0))
    assert_near(dots, expected)


@each_form
@each_algebra
@pytest.mark.parametrize("columns", [1, 3])
def test_sum_and_dots(make: Callable[[], tuple[SampleGradients, Tensor]], how: Algebra, columns: int) -> None:
    form, full = make()
    targets = torch.randn(columns, *full.shape[1:], dtype=full.dtype)
    total, dots = form.sum_and_dots(targets, how)
    assert total.shape == full.shape[1:]
    assert_near(total, full.sum(0))
    assert_near(dots, full.flatten(1) @ targets.flatten(1).T)


@each_form
def test_no_samples(make: Callable[[], tuple[SampleGradients, Tensor]]) -> None:
    """A micro-batch may have no images at all."""
    form, full = make()
    none, all_rows = form.split(0)
    for how in Algebra:
        total, dots = none.sum_and_scores(all_rows, (form.rows,), how)
        assert torch.equal(total, torch.zeros_like(full[0]))
        assert dots.shape == (0, 1)
        total, dots = all_rows.sum_and_scores(none, (0,), how)
        assert_near(total, full.sum(0))
        assert torch.equal(dots, torch.zeros(form.rows, 1, dtype=full.dtype))
    rows, width = form.matrix
    assert none.tile(slice(0, rows)).shape == (0, rows, width)
    assert_near(form.tile(slice(1, rows)), full.reshape(form.rows, rows, width)[:, 1:])


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("materialised", 1), ("outer products", 0), ("outer products", 1),
        ("outer products of one token", 1), ("row gathers", 1),
    ],
)  # fmt: skip
def test_a_slice_of_the_parameter(name: str, axis: int) -> None:
    form, full = FORMS[name]()
    index = [slice(0, 1), slice(2, 4)]
    part, expected = form.take(axis, index), full.index_select(1 + axis, torch.tensor([0, 2, 3]))
    assert_near(part.sum(), expected.sum(0))
    train, val = part.split(ROWS)
    sums = expected[ROWS:].sum(0).flatten()
    assert_near(train.scores(val, (VAL_ROWS,))[:, 0], expected[:ROWS].flatten(1) @ sums)


@each_form
def test_short_floats_meet_a_float32_target(make: Callable[[], tuple[SampleGradients, Tensor]]) -> None:
    form, full = make()
    for name, value in vars(form).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(form, name, value.bfloat16())
    target = torch.randn_like(full[0]).float()
    expected = full.flatten(1) @ target.double().flatten()
    for how in (Algebra.TARGET, Algebra.FUSED):
        _, dots = form.sum_and_dots(target[None], how)
        assert dots.dtype == torch.float32
        assert_near(dots[:, 0], expected, 0.03)


def test_compact_sums_repeated_rows_without_the_table() -> None:
    form, full = row_gathers()
    assert isinstance(form, RowGathers)
    slots, sums = form.compact()
    assert sums.shape == (form.ids.numel() + 1, 5)
    assert_near(sums[slots], full.sum(0))
