"""Validation gradients, weighted by the slopes of Adam's update, block by block of a parameter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from ghost.algebra import accumulation_dtype
from ghost.compiled import CompiledWhereItWorks
from ghost.preconditioner import AdamStep, slope

NUMBERS = 7
"""Of a step: those of `AdamStep`, and how many times as many samples the step has as the micro-batches so
far."""

COMPILED_FROM = 1 << 18
"""Entries of a parameter from which on compiling its arithmetic pays."""


@dataclass(frozen=True)
class Weigher:
    """The slopes of one parameter in one micro-batch.

    A step of k micro-batches has its whole gradient only at its end. What the micro-batches so far have given
    is taken for the whole, scaled up.

    Attributes:
        numbers: `[7]` float64 on the CPU, see `NUMBERS`.
        m, v, p: Moments and parameter, `[m, n]`.
        before: The gradient of the step's earlier micro-batches, `[m, n]`; None where there is one.
        squares: The sum of the squares of their samples' gradients, `[m, n]`; this one's are added to it.
    """

    numbers: Tensor
    m: Tensor
    v: Tensor
    p: Tensor
    before: Tensor | None = None
    squares: Tensor | None = None

    def at(self, rows: Tensor) -> Self:
        """The slopes of some rows of the parameter; `squares` is a copy."""
        before, squares = (None if part is None else part[rows] for part in (self.before, self.squares))
        return type(self)(self.numbers, self.m[rows], self.v[rows], self.p[rows], before, squares)

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """m, v, the parameter where its decay is a part of the gradient, before and squares."""
        decays = self.numbers[5].item() != 0
        return self.m, self.v, self.p if decays else None, self.before, self.squares

    @property
    def compiles(self) -> bool:
        """Whether the arithmetic is compiled, which takes any number of rows in one pass over memory."""
        # A rehearsed step's tensors have no memory, and nothing can be compiled for them.
        real = type(self.m) is Tensor and self.m.device.type == "cpu"
        return real and self.m.numel() >= COMPILED_FROM and _weigh_compiled.works

    def weighted(self, rows: slice, samples: Tensor, targets: Tensor, total: Tensor) -> Tensor:
        """The validation gradients of a block of rows, weighted, `[C, r, n]`.

        Args:
            samples: The samples' gradients there, `[b, r, n]`.
            targets: `[C, m, n]`.
            total: `[m, n]`; the sum of the samples' gradients goes to the rows of it.
        """
        numbers = self.numbers.to(accumulation_dtype(samples.dtype))
        blocks = [None if part is None else _flat(part[rows]) for part in (*self.state, total)]
        weigh = _weigh_compiled if self.compiles else _weigh
        columns = targets[:, rows].flatten(1)
        found = weigh(samples.flatten(1), columns, numbers, blocks)
        return found.view(len(targets), *samples.shape[1:])


def _flat(block: Tensor) -> Tensor:
    """`[r, n]` as `[r * n]`: a view, but of a first step's state, which is one zero for all entries."""
    return block.reshape(-1).contiguous()


def _weigh(samples: Tensor, targets: Tensor, numbers: Tensor, blocks: Sequence[Tensor | None]) -> Tensor:
    """`Weigher.weighted` of k entries: `samples [b, k]`, `targets [C, k]`; m, v, p, before, squares and total
    are the `blocks`, `[k]`.
    """
    *step, reach = numbers.unbind()
    m, v, p, before, squares, total = blocks
    assert m is not None
    assert v is not None
    assert total is not None
    wide = samples.to(accumulation_dtype(samples.dtype))
    grad, square = wide.sum(0), (wide * wide).sum(0)
    total.copy_(grad)
    if before is not None and squares is not None:
        square = squares.add_(square) * reach
        grad = (grad + before) * reach
    dtype = grad.dtype
    return targets * slope(
        AdamStep(*step), grad, square, m.to(dtype), v.to(dtype), p if p is None else p.to(dtype)
    )


_weigh_compiled = CompiledWhereItWorks(_weigh, "the slopes of Adam's update")
