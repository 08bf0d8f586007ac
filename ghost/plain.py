"""The plain way, as slow as it is obvious: ordinary autograd, one backward a sample. `ghost.verify` holds the
engine against it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ghost.batch import Inputs, take_rows
from ghost.gradients import cut
from ghost.heads import Part
from ghost.second_order import twice_differentiable

Rows = tuple[Inputs, Tensor]

Weighed = tuple[float, Rows]
"""Rows, and a factor on their loss; with a factor of 0 they have no loss of their own."""

BatchLoss = Callable[[Inputs, Tensor], Tensor]
"""The model's mean loss on inputs and labels."""

_CHUNK = 1 << 22
"""Elements that are held in float64 at once."""


def dot(a: Tensor, b: Tensor) -> float:
    """`⟨a, b⟩` of two tensors of one shape, accumulated in float64."""
    chunks = zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK), strict=True)
    return float(sum(torch.dot(x.double(), y.double()) for x, y in chunks))


def trainable_uses(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trainable parameter in every module that has it, by its qualified name there."""
    return {
        f"{name}.{key}" if name else key: p
        for name, module in model.named_modules()
        for key, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if p.requires_grad
    }


@contextmanager
def leaves_with(model: nn.Module, values: Mapping[int, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """While it lasts, every use of a trainable parameter is a leaf of its own; gives the leaves.

    Args:
        values: What the leaves hold, without a copy, by the parameter's `id`.
    """
    uses = trainable_uses(model)
    leaves = {use: nn.Parameter(values[id(p)]) for use, p in uses.items()}
    try:
        for use, leaf in leaves.items():
            _set(model, use, leaf)
        yield leaves
    finally:
        for use, p in uses.items():
            _set(model, use, p)


def _set(model: nn.Module, use: str, p: nn.Parameter) -> None:
    name, _, key = use.rpartition(".")
    setattr(model.get_submodule(name), key, p)


class PlainUse:
    """What plain autograd says of one use of a parameter.

    Args:
        targets: The parameter's validation gradient of each column, summed over all its uses.
        parts: What of the parameter is scored: all of it (None), or these parts.

    Attributes:
        parameter: The parameter.
        train: This use's training gradient, by one backward over all rows.
        rounding: How far that moves, in its norm, when every weight is off by a rounding.
        scores: `⟨G_c, g_i⟩` for each row i and column c, from one backward a row.
        squares: `‖g_i‖²` of each row.
        scored_rounding, scored_squares, target_squares: The same of what is scored, and `‖G_c‖²`.
    """

    def __init__(
        self, parameter: nn.Parameter, targets: Sequence[Tensor], train: Tensor, rounded: Tensor,
        parts: Sequence[Part] | None,
    ) -> None:  # fmt: skip
        self.parameter, self.train, self._parts = parameter, train, parts
        self.rounding = _norm(rounded - train)
        self.scored_rounding = _norm(self._scored(rounded - train))
        self._targets = [self._scored(target) for target in targets]
        self.target_squares = [dot(target, target) for target in self._targets]
        self.scores: list[list[float]] = []
        self.squares: list[float] = []
        self.scored_squares: list[float] = []

    def add_row(self, grad: Tensor | None) -> None:
        """The next row's gradient; None for a row without a loss."""
        if grad is None:
            self.scores.append([0.0] * len(self._targets))
            self.squares.append(0.0)
            self.scored_squares.append(0.0)
            return
        scored = self._scored(grad)
        self.scores.append([dot(scored, target) for target in self._targets])
        self.squares.append(dot(grad, grad))
        self.scored_squares.append(dot(scored, scored))

    def is_finite(self) -> bool:
        """Whether all scores and gradients are numbers."""
        scores = (score for row in self.scores for score in row)
        return all(map(math.isfinite, (*scores, *self.squares, *self.target_squares, self.rounding)))

    def _scored(self, grad: Tensor) -> Tensor:
        if self._parts is None:
            return grad
        pieces = [cut(grad, part.axis, part.index).flatten() for part in self._parts]
        return torch.cat([grad.new_zeros(0), *pieces])


def _norm(tensor: Tensor) -> float:
    return math.sqrt(dot(tensor, tensor))


class _Backward:
    """Plain backward passes over batches, as gradients of every use.

    Args:
        leaves: The uses' leaves.
        loss: The model's mean loss on a batch.
        scale: Factor on the loss during the backward, for float16.
    """

    def __init__(self, leaves: Mapping[str, nn.Parameter], loss: BatchLoss, scale: float) -> None:
        self._leaves, self._loss, self._scale = leaves, loss, scale

    def __call__(self, weight: float, rows: Rows) -> dict[str, Tensor]:
        """The gradient of `weight` times the rows' loss, zeros where a use has no part in it."""
        if weight == 0:
            return {use: torch.zeros_like(p) for use, p in self._leaves.items()}
        loss = self._loss(*rows) * (weight * self._scale)
        grads = torch.autograd.grad(loss, list(self._leaves.values()), materialize_grads=True)
        return {use: grad / self._scale for use, grad in zip(self._leaves, grads, strict=True)}

    def hessian_product(self, weight: float, rows: Rows, along: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The Hessian of `weight` times the rows' loss, by all uses, times `along`."""
        if weight == 0:
            return {use: torch.zeros_like(p) for use, p in self._leaves.items()}
        leaves = list(self._leaves.values())
        with twice_differentiable():
            loss = self._loss(*rows) * weight
            grads = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
            pairs = zip(self._leaves, grads, strict=True)
            slope = torch.stack([(grad * along[use]).sum() for use, grad in pairs]).sum()
            if not slope.requires_grad:  # a loss that is linear in what is trained
                return {use: torch.zeros_like(p) for use, p in self._leaves.items()}
            products = torch.autograd.grad(slope, leaves, materialize_grads=True)
        return dict(zip(self._leaves, products, strict=True))


def plain_uses(
    model: nn.Module, loss: BatchLoss, train: Rows, weights: Sequence[float], columns: Sequence[Weighed],
    scored: Mapping[str, Sequence[Part] | None], scale: float, eps: float, order: int = 1,
) -> dict[str, PlainUse]:  # fmt: skip
    """Scores and training gradients of every use of every trainable parameter, by its qualified name.

    Args:
        loss: The model's mean loss on a batch.
        train: The training rows.
        weights: Each row's share of their loss; a row of weight 0 has no loss of its own.
        columns: The validation rows of each column of the scores.
        scored: What of each use is scored; None for all of it.
        scale: Factor on the loss during the backward, for float16.
        eps: Relative rounding of the coarsest dtype in the model.
        order: 2 for curvatures too, against targets `H Σ_j g_j` behind the validation gradients.
    """
    parameters = trainable_uses(model)
    values = {id(p): p.detach() for p in parameters.values()}
    with leaves_with(model, {key: _off_by_a_rounding(p, eps) for key, p in values.items()}) as leaves:
        rounded = _Backward(leaves, loss, scale)(1.0, train)
    with leaves_with(model, values) as leaves:
        backward = _Backward(leaves, loss, scale)
        grads = backward(1.0, train)
        targets = [_summed_over_uses(backward(*column), parameters) for column in columns]
        if order == 2:
            whole = _summed_over_uses(grads, parameters)
            along = {use: whole[id(p)] for use, p in parameters.items()}
            targets += [
                _summed_over_uses(backward.hessian_product(*column, along), parameters) for column in columns
            ]
        found = {
            use: PlainUse(
                parameters[use], [target[id(parameters[use])] for target in targets], grad,
                rounded.pop(use), scored.get(use, ()),
            )
            for use, grad in grads.items()
        }  # fmt: skip
        X, Y = train
        for row, weight in enumerate(weights):
            rows = slice(row, row + 1)
            own = backward(weight, (take_rows(X, rows), Y[rows])) if weight else {}
            for use, plain in found.items():
                plain.add_row(own.get(use))
    return found


def _off_by_a_rounding(p: Tensor, eps: float) -> Tensor:
    """The values with relative errors within `±eps / 2`."""
    return (p + p * (eps * (torch.rand_like(p) - 0.5))).detach()


def _summed_over_uses(
    grads: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[int, Tensor]:
    """Gradients by the parameters' `id`."""
    found: dict[int, Tensor] = {}
    for use, grad in grads.items():
        key = id(parameters[use])
        found[key] = found[key] + grad if key in found else grad
    return found
