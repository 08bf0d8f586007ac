"""Per-sample gradients in factored form: what each sample adds to one parameter's gradient, never
materialised.

In a layer's backward, every sample's part of the parameter gradient is a simple function of the layer's input
and of the gradient that arrives at its output. A `SampleGradients` object keeps those two and answers the
questions that an engine asks:

* `sum()`: the ordinary gradient, summed over the samples;
* `dot(target)`: every sample's inner product with a given gradient;
* `scores(val, sizes)`: every sample's inner products with the validation samples' gradients, added up within
  columns: one column of all of them, one a validation set, or one a validation sample;
* `sum_and_dots(targets)`, `sum_and_scores(val, sizes)`: sum and inner products at once, by whichever algebra
  is the cheapest for the shapes at hand;
* `take(axis, index)`: the same for a slice of the parameter, such as the rows of one attention head;
* `weighed(rows, weights)`: the same for some of the samples, each times a number;
* `project(rows, columns)`: every sample's gradient multiplied by a matrix from either side.

There are three forms, and they cover all layers: `OuterProducts` (matrices that multiply), `RowGathers`
(tables that are looked up) and `Materialised` (vectors, where the gradient of a sample is no larger than its
activations).
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from ghost import algebra, choice
from ghost.choice import Algebra, Plan


def cut(tensor: Tensor, axis: int, index: Sequence[slice]) -> Tensor:
    """The slices `index` of an axis, one behind the other; of a single slice a view."""
    pieces = [tensor.narrow(axis, piece.start, piece.stop - piece.start) for piece in index]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def vectors(values: Tensor) -> Tensor:
    """`[b, *shape]` as `[b, numel]`."""
    return values.flatten(1) if values.dim() > 1 else values[:, None]


def times_rows(values: Tensor, weights: Tensor | None) -> Tensor:
    """`[r, …]` with each row times its weight `[r]`; None for ones."""
    return (
        values if weights is None else values * weights.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    )


def applied(values: Tensor, projection: Tensor | None) -> Tensor:
    """`[b, T, n]` times the projection `[k, n]` along the last axis, `[b, T, k]`, in float32 at least."""
    values = values.to(algebra.accumulation_dtype(values.dtype))
    return values if projection is None else values @ projection.to(values.dtype).T


class SampleGradients(ABC):
    """The gradients of one parameter, one for each row of a batch."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of samples."""

    @abstractmethod
    def samples(self, lo: int, hi: int) -> Self:
        """The samples from `lo` up to `hi`."""

    @abstractmethod
    def weighed(self, rows: Tensor, weights: Tensor | None) -> Self:
        """The gradients of the samples `rows` `[r]` int64, each times its weight `[r]`; None for ones."""

    @abstractmethod
    def take(self, axis: int, index: Sequence[slice]) -> Self:
        """The gradients of a part of the parameter: the slices `index` of its axis `axis`."""

    @abstractmethod
    def sum(self) -> Tensor:
        """The parameter's gradient summed over the samples, in the parameter's shape."""

    @abstractmethod
    def dot(self, target: Tensor) -> Tensor:
        """`⟨target, g_i⟩` for every sample i, `[b]`; `target` has the parameter's shape."""

    @abstractmethod
    def project(self, shape: tuple[int, int], rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """`rows g_i columnsᵀ` for every sample i, `[b, k, l]`, in float32 at least.

        Args:
            shape: The parameter as a matrix, `(m, n)`: its first axes and the others.
            rows: `[k, m]`; None for the identity.
            columns: `[l, n]`; None for the identity.
        """

    @property
    @abstractmethod
    def matrix(self) -> tuple[int, int]:
        """The parameter as a matrix, as `tile` has it: its first axis, and all others as one."""

    @property
    @abstractmethod
    def example(self) -> Tensor:
        """A tensor of the gradients' dtype and device."""

    @abstractmethod
    def tile(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """The samples' gradients at some rows of the parameter, `[b, r, n]`; n are all its other axes as
        one.

        Args:
            out: Contiguous space `[b, r, n]` that may be written to.
        """

    def under(self, plan: Plan) -> Self:
        """The same gradients, their inner products taken as planned."""
        del plan  # only matrices have a choice
        return self

    def split(self, rows: int) -> tuple[Self, Self]:
        """The first `rows` samples (training) and the others (validation)."""
        return self.samples(0, rows), self.samples(rows, self.rows)

    def columns(self, sizes: Sequence[int]) -> Iterator[Self]:
        """The samples column by column: `sizes` of them each, from the first on."""
        for lo, hi in pairwise([0, *accumulate(sizes)]):
            yield self.samples(lo, hi)

    def dots(self, targets: Tensor) -> Tensor:
        """`⟨targets_c, g_i⟩`, `[b, C]`; `targets` is `[C, *shape]`."""
        return torch.stack([self.dot(target) for target in targets], dim=1)

    def scores(self, val: Self, sizes: Sequence[int], how: Algebra = Algebra.AUTO) -> Tensor:
        """`⟨g_i, Σ_{j in c} h_j⟩` for every sample i and column c of the samples j of `val`, `[b, C]`."""
        del how  # only matrices have a choice
        return torch.stack([self.dot(column.sum()) for column in val.columns(sizes)], dim=1)

    def sum_and_dots(self, targets: Tensor, how: Algebra) -> tuple[Tensor, Tensor]:
        """The summed gradient, and `dots`."""
        del how
        return self.sum(), self.dots(targets)

    def sum_and_scores(self, val: Self, sizes: Sequence[int], how: Algebra) -> tuple[Tensor, Tensor]:
        """The summed gradient, and `scores`."""
        return self.sum(), self.scores(val, sizes, how)


class Materialised(SampleGradients):
    """Per-sample gradients that are small enough to hold: biases, norm weights, bare vectors.

    Args:
        values: `[b, *parameter shape]`.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values  # [b, *shape]

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    def samples(self, lo: int, hi: int) -> Self:
        return type(self)(self.values[lo:hi])

    def weighed(self, rows: Tensor, weights: Tensor | None) -> Self:
        return type(self)(times_rows(self.values[rows], weights))

    def take(self, axis: int, index: Sequence[slice]) -> Self:
        return type(self)(cut(self.values, 1 + axis, index))

    def sum(self) -> Tensor:
        return self.values.sum(0)

    @property
    def matrix(self) -> tuple[int, int]:
        own = self.values.shape[1:]
        return (own[0], own[1:].numel()) if own else (1, 1)

    @property
    def example(self) -> Tensor:
        return self.values

    def tile(self, rows: slice, out: Tensor | None = None) -> Tensor:
        del out  # a view serves
        values = self.values if self.values.dim() > 1 else self.values[:, None]
        return values[:, rows].flatten(2) if values.dim() > 2 else values[:, rows, None]

    def dot(self, target: Tensor) -> Tensor:
        values = self._wide()
        return values @ target.flatten().to(values.dtype)

    def dots(self, targets: Tensor) -> Tensor:
        values = self._wide()
        return values @ vectors(targets).to(values.dtype).T

    def scores(self, val: Self, sizes: Sequence[int], how: Algebra = Algebra.AUTO) -> Tensor:
        del how
        if len(sizes) == 1:
            return self.dots(val.values.sum(0, keepdim=True))
        return self.dots(torch.stack([part.sum(0) for part in val.values.split(list(sizes))]))

    def _wide(self) -> Tensor:
        """`[b, numel]`, in float32 at least."""
        return vectors(self.values).to(algebra.accumulation_dtype(self.values.dtype))

    def project(self, shape: tuple[int, int], rows: Tensor | None, columns: Tensor | None) -> Tensor:
        values = self.values.reshape(self.rows, *shape)  # [b, m, n]
        values = applied(values, columns)  # [b, m, l]
        return applied(values.transpose(1, 2), rows).transpose(1, 2)


class OuterProducts(SampleGradients):
    """Per-sample gradients `g_i = Σ_t left_itᵀ right_it` of a matrix `[m, n]`: linear layers and unfolded
    convolutions.

    Args:
        left: `[b, T, m]`, for `nn.Linear` the output gradient.
        right: `[b, T, n]`, for `nn.Linear` the input.
        shape: The parameter's shape where it is not `[m, n]` itself, as for a convolution's kernel `[m, c, k,
            k]`.
        plan: How the inner products are taken.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        shape: torch.Size | None = None,
        plan: Plan = Plan(),  # noqa: B008
    ) -> None:
        self.left, self.right, self.plan = left, right, plan  # [b, T, m], [b, T, n]
        self.shape = shape or torch.Size((left.shape[2], right.shape[2]))

    @property
    def rows(self) -> int:
        return self.left.shape[0]

    def under(self, plan: Plan) -> Self:
        return type(self)(self.left, self.right, self.shape, plan)

    def samples(self, lo: int, hi: int) -> Self:
        return type(self)(self.left[lo:hi], self.right[lo:hi], self.shape, self.plan)

    def weighed(self, rows: Tensor, weights: Tensor | None) -> Self:
        return type(self)(times_rows(self.left[rows], weights), self.right[rows], self.shape, self.plan)

    def take(self, axis: int, index: Sequence[slice]) -> Self:
        if axis == 0:
            return type(self)(cut(self.left, 2, index), self.right, plan=self.plan)
        return type(self)(self.left, cut(self.right, 2, index), plan=self.plan)

    def sum(self) -> Tensor:
        return algebra.summed(self.left, self.right).view(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        return self.left.shape[2], self.right.shape[2]

    @property
    def example(self) -> Tensor:
        return self.left

    def tile(self, rows: slice, out: Tensor | None = None) -> Tensor:
        left = self.left[:, :, rows].transpose(1, 2)
        return torch.bmm(left, self.right) if out is None else torch.bmm(left, self.right, out=out)

    def dot(self, target: Tensor) -> Tensor:
        return choice.dot(self.left, self.right, target.flatten(1), self.plan)

    def project(self, shape: tuple[int, int], rows: Tensor | None, columns: Tensor | None) -> Tensor:
        del shape  # the factors' own
        return applied(self.left, rows).transpose(1, 2) @ applied(self.right, columns)

    def scores(self, val: Self, sizes: Sequence[int], how: Algebra = Algebra.AUTO) -> Tensor:
        return choice.scores(*self._with(val), list(sizes), how.value, self.plan)

    def sum_and_dots(self, targets: Tensor, how: Algebra) -> tuple[Tensor, Tensor]:
        total, dots = choice.sum_and_dots(self.left, self.right, targets.flatten(2), how.value, self.plan)
        return total.view(self.shape), dots

    def sum_and_scores(self, val: Self, sizes: Sequence[int], how: Algebra) -> tuple[Tensor, Tensor]:
        total, dots = choice.sum_and_scores(*self._with(val), list(sizes), how.value, self.plan)
        return total.view(self.shape), dots

    def _with(self, val: Self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.left, self.right, val.left, val.right


class RowGathers(SampleGradients):
    """Per-sample gradients of a table `[V, d]` whose rows `ids` were looked up: embeddings.

    Args:
        ids: `[b, T]` int64, the rows looked up.
        grad: `[b, T, d]`, the gradient at the looked-up rows. Rows of `padding_idx` must already be zero in
            it.
        num_rows: V.
    """

    def __init__(self, ids: Tensor, grad: Tensor, num_rows: int) -> None:
        self.ids, self.grad, self.num_rows = ids, grad, num_rows  # [b, T], [b, T, d]

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    def samples(self, lo: int, hi: int) -> Self:
        return type(self)(self.ids[lo:hi], self.grad[lo:hi], self.num_rows)

    def weighed(self, rows: Tensor, weights: Tensor | None) -> Self:
        return type(self)(self.ids[rows], times_rows(self.grad[rows], weights), self.num_rows)

    def take(self, axis: int, index: Sequence[slice]) -> Self:
        assert axis == 1, "a table is cut by columns"
        return type(self)(self.ids, cut(self.grad, 2, index), self.num_rows)

    def sum(self) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(
            self.grad, self.ids, self.num_rows, -1, False
        )  # [V, d]

    @property
    def matrix(self) -> tuple[int, int]:
        return self.num_rows, self.grad.shape[2]

    @property
    def example(self) -> Tensor:
        return self.grad

    def tile(self, rows: slice, out: Tensor | None = None) -> Tensor:
        del out
        sample, position = ((self.ids >= rows.start) & (self.ids < rows.stop)).nonzero(as_tuple=True)
        size = rows.stop - rows.start
        place = sample * size + self.ids[sample, position] - rows.start
        shape = self.rows, size, self.grad.shape[2]
        found = self.grad.new_zeros(shape)
        found.flatten(0, 1).index_add_(0, place, self.grad[sample, position])
        return found

    def looked_up(self) -> tuple[Tensor, Self]:
        """The rows that were looked up, `[U]`, and the same gradients of a table of these alone."""
        rows, ids = self.ids.unique(return_inverse=True)
        return rows, type(self)(ids, self.grad, len(rows))

    def dot(self, target: Tensor) -> Tensor:
        return algebra.row_dots(target[self.ids], self.grad)

    def project(self, shape: tuple[int, int], rows: Tensor | None, columns: Tensor | None) -> Tensor:
        grad = applied(self.grad, columns)  # [b, T, l]
        if rows is None:
            table = grad.new_zeros(self.rows, self.num_rows, grad.shape[2])  # [b, m, l]
            return table.scatter_add(1, self.ids[:, :, None].expand(-1, -1, grad.shape[2]), grad)
        looked_up = rows.to(grad.dtype).T[self.ids]  # [b, T, k]
        return looked_up.transpose(1, 2) @ grad

    def scores(self, val: Self, sizes: Sequence[int], how: Algebra = Algebra.AUTO) -> Tensor:
        del how
        return torch.stack([self.dot_compact(*part.compact()) for part in val.columns(sizes)], dim=1)

    def compact(self) -> tuple[Tensor, Tensor]:
        """The sum over all samples without the table: `slots [V]` maps a row to its place in `sums [S + 1,
        d]`, S when absent.
        """
        dtype = algebra.accumulation_dtype(self.grad.dtype)
        ids, grad = self.ids.flatten().long(), self.grad.flatten(0, 1).to(dtype)  # [S], [S, d]
        size = ids.shape[0]
        slots = ids.new_full((self.num_rows,), size)
        # Rows that occur more than once keep one of their positions, whichever: only its being unique
        # matters.
        slots = slots.scatter(0, ids, torch.arange(size, device=ids.device))
        sums = grad.new_zeros(size + 1, grad.shape[1]).index_add(0, slots[ids], grad)
        return slots, sums

    def dot_compact(self, slots: Tensor, sums: Tensor) -> Tensor:
        """`dot` with a target given by another object's `compact`."""
        return algebra.row_dots(sums[slots[self.ids]], self.grad)


def sum_of_uses(uses: Sequence[SampleGradients]) -> Tensor:
    """The gradient of a parameter with several uses, in its shape: a table's few rows are added to what the
    others fill.
    """
    tables = [use for use in uses if isinstance(use, RowGathers)]
    others = [use for use in uses if not isinstance(use, RowGathers)]
    dtype = widest(uses)
    total = functools.reduce(torch.add, [use.sum() for use in others or [tables.pop()]]).to(dtype)
    for table in tables:
        total.index_add_(0, table.ids.flatten(), table.grad.flatten(0, 1).to(dtype))
    return total


def widest(uses: Sequence[SampleGradients]) -> torch.dtype:
    """The dtype that holds the gradients of all uses: autocast narrows a head's, not its tied table's."""
    return functools.reduce(torch.promote_types, [use.example.dtype for use in uses])
