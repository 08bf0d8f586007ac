"""Taps: identities on a layer's output whose backward defines the gradients of the layer's parameters and of
its probes.

A tapped layer runs on detached parameters, so autograd itself finds only the gradient of its input. The tap
on its output receives the output's gradient, takes the layer's per-sample gradients from it, and returns

* for the parameters: the gradient of the *training* rows alone, which lands in `.grad` like any other
  (clipping and optimizers see an ordinary step);
* for the probes (zero tensors with one entry per training sample, which take no part in the forward): the
  inner products `⟨∇L_val, g_i⟩`. Autograd adds them up over uses and micro-batches.

A tap keeps no state, uses no hooks, and is traced by `torch.compile` like any autograd function.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ghost.algebra import row_dots
from ghost.errors import UnsupportedModelError
from ghost.gradients import Algebra, OuterProducts, RowGathers, SampleGradients
from ghost.layers import Layer

Grads = list[Tensor | None]


def in_dtype_of(grad: Tensor, x: Tensor) -> Tensor:
    """The input as the layer computed with it: autocast runs a layer in another dtype than its input's."""
    return x.to(grad.dtype) if x.is_floating_point() else x


def wide(grad: Tensor) -> Tensor:
    """The gradient in a dtype that can hold products of two: float16 under a loss scale overflows."""
    return grad.float() if grad.dtype is torch.float16 else grad


@dataclass(frozen=True)
class Tap(ABC):
    """What a layer's tap computes. Its tensors are, in this order: parameters, probes, targets."""

    layer: Layer
    scored: bool
    how: Algebra

    def sample_gradients(self, x: Tensor, grad: Tensor) -> list[SampleGradients]:
        """Per-sample gradients of the layer's trainable parameters, in their order."""
        grad = wide(grad)
        found = self.layer.rule.gradients(self.layer.module, in_dtype_of(grad, x), grad)
        missing = set(self.layer.params) - set(found)
        if missing:
            raise UnsupportedModelError(
                f"the rule {type(self.layer.rule).__name__} gives no gradients for {sorted(missing)} of "
                f"layer {self.layer.name!r}."
            )
        return [found[name] for name in self.layer.params]

    @abstractmethod
    def backward(self, train_rows: int, x: Tensor, grad: Tensor, targets: Sequence[Tensor]) -> Grads:
        """Gradients for the tap's tensors.

        Args:
            train_rows: b, the leading rows of the batch that are training samples.
            x: The layer's input `[rows, …]`.
            grad: The gradient at its output `[rows, …]`.
            targets: Validation gradients in the parameters' shapes, where the tap has any.
        """


class ConcatTap(Tap):
    """Training and validation rows in one batch: the validation gradient is found in the same backward."""

    def backward(self, train_rows: int, x: Tensor, grad: Tensor, targets: Sequence[Tensor]) -> Grads:
        totals: Grads = []
        dots: Grads = []
        for gradients in self.sample_gradients(x, grad):
            train, val = gradients.split(train_rows)
            if self.scored:
                total, dot = train.sum_and_score(val, self.how)
                dots.append(dot)
            else:
                total = train.sum()
            totals.append(total)
        return totals + dots


class TargetTap(Tap):
    """The validation gradient is given; the training gradient is summed on the way to the inner products."""

    def backward(self, train_rows: int, x: Tensor, grad: Tensor, targets: Sequence[Tensor]) -> Grads:
        pairs = [
            gradients.sum_and_dot(target, self.how)
            for gradients, target in zip(self.sample_gradients(x, grad), targets, strict=True)
        ]
        return [total for total, _ in pairs] + [dot for _, dot in pairs] + [None] * len(targets)


class WatchTap(Tap):
    """The validation gradient is given and the layer's own backward is left alone, bit for bit."""

    def backward(self, train_rows: int, x: Tensor, grad: Tensor, targets: Sequence[Tensor]) -> Grads:
        dots: Grads = [
            gradients.dot(target)
            for gradients, target in zip(self.sample_gradients(x, grad), targets, strict=True)
        ]
        return dots + [None] * len(targets)


class TapFunction(Function):
    """The identity on a layer's output whose backward is a `Tap`'s."""

    @staticmethod
    def forward(
        ctx: Any, tap: Tap, train_rows: int, output: Tensor, x: Tensor, shape: torch.Size, targets: int,
        *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.tap, ctx.train_rows, ctx.shape = tap, train_rows, shape
        ctx.save_for_backward(x, *tensors[len(tensors) - targets :])
        ctx.mark_dirty(
            output
        )  # rather than a view, so that the model may go on in place (ReLU(inplace=True))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, *targets = ctx.saved_tensors
        found = ctx.tap.backward(ctx.train_rows, x, grad.reshape(ctx.shape), targets)
        return None, None, grad, None, None, None, *found


class TiedTableFunction(Function):
    """The tap of an embedding whose table is also the matrix of a later linear layer, the head.

    The validation gradient of a tied matrix is the sum of both uses', so each use's samples meet the other's
    validation gradient. The head comes first in the backward; what the embedding needs of it travels along
    autograd's own edges, as the gradients of phantom outputs that carry no data in the forward:

    * `columns [b, T, S]`: the head's output gradient at training positions, at the S validation tokens'
      columns;
    * `inputs [b, T, d]`: the head's input there;
    * `val_columns [S, b*T]`, `val_inputs [S, d]`: the same with the sides exchanged.
    """

    @staticmethod
    def forward(
        ctx: Any, train_rows: int, output: Tensor, ids: Tensor, padding_idx: int | None, weight: Tensor,
        probe: Tensor, head_probe: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.train_rows, ctx.padding_idx, ctx.num_rows = train_rows, padding_idx, weight.shape[0]
        ctx.save_for_backward(ids)
        ctx.mark_dirty(output)
        rows, tokens, width = output.shape
        train_tokens, val_tokens = train_rows * tokens, (rows - train_rows) * tokens
        nothing = output.new_zeros(())
        return (
            output,
            nothing.expand(train_rows, tokens, val_tokens),
            nothing.expand(train_rows, tokens, width),
            nothing.expand(val_tokens, train_tokens),
            nothing.expand(val_tokens, width),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, columns, inputs, val_columns, val_inputs = grads
        (ids,) = ctx.saved_tensors
        real = 1 if ctx.padding_idx is None else (ids != ctx.padding_idx)[:, :, None]
        train, val = RowGathers(ids, grad * real, ctx.num_rows).split(ctx.train_rows)
        head_val_grad = (val_columns.T @ val_inputs).view_as(train.grad)  # its rows at the training tokens
        dots = train.dot_compact(*val.compact()) + row_dots(head_val_grad, train.grad)
        head_dots = row_dots(columns @ val.grad.flatten(0, 1), inputs)
        return None, grad, None, None, train.sum(), dots, head_dots


class TiedHeadFunction(Function):
    """The tap of a bias-free linear layer whose matrix is an earlier embedding's table; see
    `TiedTableFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any, how: Algebra, train_rows: int, output: Tensor, x: Tensor, ids: Tensor, weight: Tensor,
        probe: Tensor, *slots: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.how, ctx.train_rows = how, train_rows
        ctx.save_for_backward(x, ids)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, ids = ctx.saved_tensors
        tied = wide(grad)
        train_ids, val_ids = ids[: ctx.train_rows].flatten(), ids[ctx.train_rows :].flatten()  # [b*T], [S]
        train, val = OuterProducts(tied, in_dtype_of(tied, x)).split(ctx.train_rows)
        total, dots = train.sum_and_score(val, ctx.how)
        columns = train.left.index_select(2, val_ids)
        val_columns = val.left.flatten(0, 1).index_select(1, train_ids)
        val_inputs = val.right.flatten(0, 1)
        return None, None, grad, None, None, total, dots, columns, train.right, val_columns, val_inputs
