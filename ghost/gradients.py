"""Per-sample gradients in factored form: what each sample adds to one parameter's gradient, never
materialised.

In a layer's backward, every sample's part of the parameter gradient is a simple function of the layer's input
and of the gradient that arrives at its output. A `SampleGradients` object keeps those two and answers the
questions that an engine asks:

* `sum()`: the ordinary gradient, summed over the samples;
* `dot(target)`: every sample's inner product with a given gradient;
* `pairwise(val)`: every sample's inner product with every validation sample;
* `sum_and_dot(target)`, `sum_and_score(val)`: both at once, by whichever algebra is the cheapest for the
  shapes at hand.

There are three forms, and they cover all layers: `OuterProducts` (matrices that multiply), `RowGathers`
(tables that are looked up) and `Materialised` (vectors, where the gradient of a sample is no larger than its
activations).
"""

from abc import ABC, abstractmethod
from enum import Enum
from typing import Self

import torch
from torch import Tensor

from ghost import algebra


class Algebra(Enum):
    """How a matrix's per-sample inner products are computed; `AUTO` picks the cheapest for the shapes of the
    batch.
    """

    AUTO = "auto"
    TOKEN_TOKEN = "token_token"
    TARGET = "target"
    FUSED = "fused"


class SampleGradients(ABC):
    """The gradients of one parameter, one for each row of a batch."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of samples."""

    @abstractmethod
    def split(self, rows: int) -> tuple[Self, Self]:
        """The first `rows` samples (training) and the others (validation)."""

    @abstractmethod
    def sum(self) -> Tensor:
        """The parameter's gradient summed over the samples, in the parameter's shape."""

    @abstractmethod
    def dot(self, target: Tensor) -> Tensor:
        """`⟨target, g_i⟩` for every sample i, `[b]`; `target` has the parameter's shape."""

    @abstractmethod
    def pairwise(self, other: Self) -> Tensor:
        """`⟨g_i, h_j⟩` for every sample i here and j of `other`, `[b, v]`."""

    def sum_and_dot(self, target: Tensor, how: Algebra) -> tuple[Tensor, Tensor]:
        """The summed gradient and every sample's inner product with `target`."""
        del how  # only matrices have a choice
        return self.sum(), self.dot(target)

    def sum_and_score(self, val: Self, how: Algebra) -> tuple[Tensor, Tensor]:
        """The summed gradient and every sample's inner product with the sum of the validation rows'
        gradients.
        """
        return self.sum_and_dot(val.sum(), how)


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

    def split(self, rows: int) -> tuple[Self, Self]:
        return type(self)(self.values[:rows]), type(self)(self.values[rows:])

    def sum(self) -> Tensor:
        return self.values.sum(0)

    def dot(self, target: Tensor) -> Tensor:
        dtype = algebra.accumulation_dtype(self.values.dtype)
        return self.values.flatten(1).to(dtype) @ target.flatten().to(dtype)

    def pairwise(self, other: Self) -> Tensor:
        dtype = algebra.accumulation_dtype(self.values.dtype)
        return self.values.flatten(1).to(dtype) @ other.values.flatten(1).to(dtype).T


class OuterProducts(SampleGradients):
    """Per-sample gradients `g_i = Σ_t left_itᵀ right_it` of a matrix `[m, n]`: linear layers and unfolded
    convolutions.

    Args:
        left: `[b, T, m]`, for `nn.Linear` the output gradient.
        right: `[b, T, n]`, for `nn.Linear` the input.
        shape: The parameter's shape where it is not `[m, n]` itself, as for a convolution's kernel `[m, c, k,
            k]`.
    """

    def __init__(self, left: Tensor, right: Tensor, shape: torch.Size | None = None) -> None:
        self.left, self.right = left, right  # [b, T, m], [b, T, n]
        self.shape = shape or torch.Size((left.shape[2], right.shape[2]))

    @property
    def rows(self) -> int:
        return self.left.shape[0]

    def split(self, rows: int) -> tuple[Self, Self]:
        make = type(self)
        return (
            make(self.left[:rows], self.right[:rows], self.shape),
            make(self.left[rows:], self.right[rows:], self.shape),
        )

    def sum(self) -> Tensor:
        return (self.left.flatten(0, 1).T @ self.right.flatten(0, 1)).view(self.shape)

    def dot(self, target: Tensor) -> Tensor:
        target = target.flatten(1).to(self.left.dtype)
        m, n = target.shape
        if m >= n:  # contract over the longer side, so that the intermediate is the shorter one
            return algebra.row_dots(self.left @ target, self.right)
        return algebra.row_dots(self.right @ target.T, self.left)

    def pairwise(self, other: Self) -> Tensor:
        return algebra.token_token(self.left, self.right, other.left, other.right)

    def sum_and_dot(self, target: Tensor, how: Algebra) -> tuple[Tensor, Tensor]:
        choice = how if how in (Algebra.TARGET, Algebra.FUSED) else self._cheapest(0)
        if choice is Algebra.FUSED:
            total, dots = algebra.fused_sum_and_dot(self.left, self.right, target.flatten(1))
            return total.view(self.shape), dots
        return self.sum(), self.dot(target)

    def sum_and_score(self, val: Self, how: Algebra) -> tuple[Tensor, Tensor]:
        choice = self._cheapest(val.rows * val.left.shape[1]) if how is Algebra.AUTO else how
        if choice is Algebra.TOKEN_TOKEN:
            return self.sum(), self.pairwise(val).sum(1)
        if choice is Algebra.FUSED:
            total, dots = algebra.fused_sum_and_score(self.left, self.right, val.left, val.right)
            return total.view(self.shape), dots
        return self.sum(), self.dot(val.sum())

    def _cheapest(self, val_tokens: int) -> Algebra:
        """The cheapest algebra; `val_tokens` is 0 when the target is already a matrix."""
        b, tokens, m = self.left.shape
        return Algebra(algebra.cheapest(b, tokens, val_tokens, m, self.right.shape[2], self.left.device.type))


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

    def split(self, rows: int) -> tuple[Self, Self]:
        make = type(self)
        return (
            make(self.ids[:rows], self.grad[:rows], self.num_rows),
            make(self.ids[rows:], self.grad[rows:], self.num_rows),
        )

    def sum(self) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(
            self.grad, self.ids, self.num_rows, -1, False
        )  # [V, d]

    def dot(self, target: Tensor) -> Tensor:
        return algebra.row_dots(target[self.ids], self.grad)

    def pairwise(self, other: Self) -> Tensor:
        columns = []
        for ids, grad in zip(other.ids, other.grad, strict=True):
            val_row = type(self)(ids[None], grad[None], self.num_rows)
            columns.append(self.dot_compact(*val_row.compact()))
        return torch.stack(columns, dim=1)  # [b, v]

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

    def sum_and_score(self, val: Self, how: Algebra) -> tuple[Tensor, Tensor]:
        del how
        return self.sum(), self.dot_compact(*val.compact())
