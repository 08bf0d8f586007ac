"""Taps: identities on a layer's output whose backward defines the gradients of the layer's parameters and of
its probes.

A tapped layer runs on detached parameters, so autograd itself finds only the gradient of its input. The tap
on its output receives the output's gradient, takes the layer's per-sample gradients from it, and returns

* for the parameters: the gradient of the *training* rows alone, which lands in `.grad` like any other
  (clipping and optimizers see an ordinary step);
* for the probes (zero tensors with one entry per training sample, which take no part in the forward): the
  inner products `⟨∇L_val, g_i⟩`. Autograd adds them up over uses and micro-batches.

A tap uses no hooks, and is traced by `torch.compile` like any autograd function. It keeps no state; only uses
of shared parameters wait in the step's ledger for each other.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from ghost.algebra import row_dots, unnarrowed
from ghost.choice import Algebra, Choices, Plan
from ghost.distributed import fetched
from ghost.errors import UnsupportedModelError
from ghost.gradients import OuterProducts, RowGathers, SampleGradients
from ghost.layers import Layer, LayerRule
from ghost.step import Parts, StepState, Unit, Use, part_scores

Grads = list[Tensor | None]


def in_dtype_of(grad: Tensor, x: Tensor) -> Tensor:
    """The input as the layer computed with it: autocast runs a layer in another dtype than its input's."""
    return x.to(grad.dtype) if x.is_floating_point() else x


def wide(grad: Tensor) -> Tensor:
    """The gradient in a dtype that can hold products of two: float16 under a loss scale overflows."""
    return grad.float() if grad.dtype is torch.float16 else grad


@dataclass(frozen=True)
class Tap(ABC):
    """What a layer's tap computes. Its tensors are, in this order: parameters (if it gives gradients for
    them), probes, targets.

    Attributes:
        gives_gradients: Whether it defines the gradients of the layer's parameters.
        keeps: Whether what its backward sees is kept for the end of the step.
        scored: The parts of each parameter that are scored, by its name in the layer.
        how: The algebra for matrices.
        choices: Where it is written down which one was taken.
        plans: How the inner products of each parameter are taken, by its name in the layer.
    """

    gives_gradients: ClassVar[bool] = True
    keeps: ClassVar[bool] = False

    layer: Layer
    scored: Mapping[str, Parts]
    how: Algebra
    choices: Choices = field(default_factory=Choices, repr=False, compare=False, kw_only=True)
    plans: Mapping[str, Plan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        plans = {key: self.choices.plan(self.layer.qualified(key)) for key in self.layer.params}
        object.__setattr__(self, "plans", plans)

    def is_asked(self, edges: Sequence[tuple[Any, int]]) -> bool:
        """Whether the backward in progress is about the tap's tensors. `autograd.grad(loss, x)`, for the
        gradient at an input, passes by, and nothing of it belongs to the step.

        Args:
            edges: Autograd's, to the tap's parameters and probes.

        Raises:
            UnsupportedModelError: It is to be differentiated again.
        """
        if torch.compiler.is_compiling():
            return True
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"layer {self.layer.name!r} is differentiated with create_graph=True, and a second "
                "derivative does not pass its tap: take such a term of the loss in a backward of its own, "
                "outside of the scored step."
            )
        # Gradients of weights alone, for something else than `.grad`, are not the step's either.
        own = edges[-len(self.scored) :] if self.keeps and self.scored else edges
        return any(_is_reached(node) for node, _ in own if node is not None)

    def sample_gradients(self, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        """Per-sample gradients of the layer's trainable parameters, in their order."""
        rule = self.layer.rule
        assert isinstance(rule, LayerRule)
        grad = wide(grad)
        found = rule.gradients(self.layer.module, in_dtype_of(grad, x), grad)
        missing = set(self.layer.params) - set(found)
        if missing:
            raise UnsupportedModelError(
                f"the rule {type(rule).__name__} gives no gradients for {sorted(missing)} of layer "
                f"{self.layer.name!r}."
            )
        return {name: found[name].under(plan) for name, plan in self.plans.items()}

    def fetch(self, targets: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """What the backward is given, whole and where the layer computes."""
        return [fetched(target, device) for target in targets]

    @abstractmethod
    def backward(
        self, unit: Unit, gradients: Mapping[str, SampleGradients], targets: Sequence[Tensor]
    ) -> Grads:
        """Gradients for the tap's tensors.

        Args:
            unit: Which samples the gradients are of.
            gradients: Per-sample gradients of every trainable parameter.
            targets: Validation gradients `[C, *shape]` of the scored parameters, where the tap has any.
        """


def _is_reached(node: Any) -> bool:
    """Whether the backward in progress gets to a node of autograd's graph."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf whose gradient `autograd.grad` returns
        return True


def note_backward(layer: Layer, state: StepState, otherwise: str) -> None:
    """Refuse a second backward through a use whose scores were settled by the first.

    Args:
        otherwise: What does without the refusal.
    """
    if torch.compiler.is_compiling():
        return
    ledger, name = state.ledger, layer.name
    ledger.settled[name] += 1
    if ledger.settled[name] > max(1, ledger.calls[name]):
        raise UnsupportedModelError(
            f"layer {name!r} is differentiated more often than it ran (several backwards through one "
            "forward, or re-entrant activation checkpointing of a layer that has another use): use "
            f"{otherwise}, or one backward over the sum of the losses."
        )


@dataclass(frozen=True)
class ConcatTap(Tap):
    """Training and validation rows in one batch: the validation gradient is found in the same backward.

    Attributes:
        state: Where the ledger of shared parameters is.
        shared: Parameters that other layers have as well.
    """

    state: StepState = field(repr=False, compare=False)
    shared: frozenset[str]

    def backward(
        self, unit: Unit, gradients: Mapping[str, SampleGradients], targets: Sequence[Tensor]
    ) -> Grads:
        note_backward(self.layer, self.state, "val_mode='separate'")
        totals: Grads = []
        dots: Grads = []
        for key, found in gradients.items():
            train, val = found.split(unit.train)
            parts = self.scored.get(key, ())
            if self._waits(key):
                self.state.ledger.add(Use(self.layer, key, parts, unit, train, val))
                total, dot = train.sum(), None
            else:
                total, dot = self._sum_and_scores(train, val, parts, unit)
            totals.append(total)
            if parts:
                dots.append(dot)
        return totals + dots

    def _waits(self, key: str) -> bool:
        """Whether other uses of the parameter have a say in its validation gradient."""
        if torch.compiler.is_compiling():
            return False
        return key in self.shared or self.state.ledger.calls[self.layer.name] > 1

    def _sum_and_scores(
        self, train: SampleGradients, val: SampleGradients, parts: Parts, unit: Unit
    ) -> tuple[Tensor, Tensor | None]:
        if not parts:
            return train.sum(), None
        if tuple(parts) == (None,):
            total, dots = train.sum_and_scores(val, unit.sizes, self.how)
            return total, unit.to_rows(dots)[None]
        found = []
        for part in parts:
            cut = (part.axis, part.index) if part is not None else None
            mine, theirs = (train.take(*cut), val.take(*cut)) if cut else (train, val)
            found.append(mine.scores(theirs, unit.sizes, self.how))
        return train.sum(), unit.to_rows(torch.stack(found))


class TargetTap(Tap):
    """The validation gradient is given; the training gradient is summed on the way to the inner products."""

    def backward(
        self, unit: Unit, gradients: Mapping[str, SampleGradients], targets: Sequence[Tensor]
    ) -> Grads:
        by_key = dict(zip(self.scored, targets, strict=True))
        totals: Grads = []
        dots: Grads = []
        for key, found in gradients.items():
            parts = self.scored.get(key, ())
            if tuple(parts) == (None,):
                total, dot = found.sum_and_dots(by_key[key], self.how)
                dots.append(unit.to_rows(dot)[None])
            else:
                total = found.sum()
                if parts:
                    dots.append(part_scores(found, list(by_key[key]), parts, unit))
            totals.append(total)
        return totals + dots + [None] * len(targets)


class WatchTap(Tap):
    """The validation gradient is given and the layer's own backward is left alone, bit for bit."""

    gives_gradients = False

    def backward(
        self, unit: Unit, gradients: Mapping[str, SampleGradients], targets: Sequence[Tensor]
    ) -> Grads:
        dots: Grads = [
            part_scores(gradients[key], list(target), parts, unit)
            for (key, parts), target in zip(self.scored.items(), targets, strict=True)
        ]
        return dots + [None] * len(targets)


@dataclass(frozen=True)
class Projector:
    """How one parameter's gradients are projected.

    Attributes:
        shape: The parameter as a matrix.
        rows, columns: What its gradient is multiplied by from the left and, transposed, from the right; None
            for the identity.
        inputs_first: Whether its rows belong to the layer's inputs: the product is then transposed.
    """

    shape: tuple[int, int]
    rows: Tensor | None
    columns: Tensor | None
    inputs_first: bool

    def __call__(self, gradients: SampleGradients) -> Tensor:
        """Every sample's `P_out g_i P_inᵀ`, flattened, `[b, k_out * k_in]`."""
        found = gradients.project(self.shape, self.rows, self.columns)
        return (found.transpose(1, 2) if self.inputs_first else found).flatten(1)


@dataclass(frozen=True)
class ProjectTap(Tap):
    """Probes receive every sample's projected gradient; the parameters' own gradients are left to others.

    A probe `Γ_i` is what a LoRA branch beside the layer, `P_outᵀ Γ_i P_in x_i`, would have as its weight, at
    zero: the gradient of `Γ_i` is `P_out g_i P_inᵀ`.

    Attributes:
        projectors: By the parameter's name in the layer.
    """

    gives_gradients = False

    projectors: Mapping[str, Projector] = field(repr=False, compare=False)

    def backward(
        self, unit: Unit, gradients: Mapping[str, SampleGradients], targets: Sequence[Tensor]
    ) -> Grads:
        del targets  # it has none
        return [unit.to_rows(self.projectors[key](gradients[key])) for key in self.scored]


class TapFunction(Function):
    """The identity on a layer's output whose backward is a `Tap`'s."""

    @staticmethod
    def forward(
        ctx: Any, tap: Tap, unit: Unit, output: Tensor, x: Tensor, shape: torch.Size, targets: int,
        *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.tap, ctx.unit, ctx.shape = tap, unit, shape
        ctx.save_for_backward(x, *tensors[len(tensors) - targets :])
        ctx.mark_dirty(
            output
        )  # rather than a view, so that the model may go on in place (ReLU(inplace=True))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, *targets = ctx.saved_tensors
        edges = ctx.next_functions[2 : len(ctx.next_functions) - len(targets)]
        if not ctx.tap.is_asked(edges):
            return None, None, grad, None, None, None, *(None for _ in (*edges, *targets))
        with unnarrowed(grad):
            gradients = ctx.tap.sample_gradients(x, grad.reshape(ctx.shape))
            found = ctx.tap.backward(ctx.unit, gradients, ctx.tap.fetch(targets, grad.device))
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
        ctx: Any, tap: Tap, unit: Unit, output: Tensor, ids: Tensor, padding_idx: int | None,
        weight: Tensor, probe: Tensor, head_probe: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.tap, ctx.unit, ctx.padding_idx, ctx.num_rows = tap, unit, padding_idx, weight.shape[0]
        ctx.save_for_backward(ids)
        ctx.mark_dirty(output)
        rows, tokens, width = output.shape
        train_tokens, val_tokens = unit.train * tokens, (rows - unit.train) * tokens
        nothing = output.new_zeros(())
        return (
            output,
            nothing.expand(unit.train, tokens, val_tokens),
            nothing.expand(unit.train, tokens, width),
            nothing.expand(val_tokens, train_tokens),
            nothing.expand(val_tokens, width),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, columns, inputs, val_columns, val_inputs = grads
        (ids,) = ctx.saved_tensors
        if not ctx.tap.is_asked(ctx.next_functions[2:]):
            return None, None, grad, None, None, None, None, None
        real = 1 if ctx.padding_idx is None else (ids != ctx.padding_idx)[:, :, None]
        train, val = RowGathers(ids, grad * real, ctx.num_rows).split(ctx.unit.train)
        tokens = [size * ids.shape[1] for size in ctx.unit.sizes]  # validation tokens of each column
        dots, head_dots = [], []
        with unnarrowed(grad):
            for part, at_val, val_at_train, val_x in zip(
                val.columns(ctx.unit.sizes), columns.split(tokens, 2), val_columns.split(tokens),
                val_inputs.split(tokens), strict=True,
            ):  # fmt: skip
                head_val_grad = (val_at_train.T @ val_x).view_as(train.grad)  # at the training tokens
                dots.append(train.dot_compact(*part.compact()) + row_dots(head_val_grad, train.grad))
                head_dots.append(row_dots(at_val @ part.grad.flatten(0, 1), inputs))
        found = torch.stack(dots, 1)[None], torch.stack(head_dots, 1)[None]  # [1, b, C] each
        return None, None, grad, None, None, train.sum(), *found


class TiedHeadFunction(Function):
    """The tap of a bias-free linear layer whose matrix is an earlier embedding's table; see
    `TiedTableFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any, tap: Tap, unit: Unit, output: Tensor, x: Tensor, ids: Tensor, weight: Tensor,
        probe: Tensor, *slots: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.tap, ctx.unit = tap, unit
        ctx.save_for_backward(x, ids)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, ids = ctx.saved_tensors
        if not ctx.tap.is_asked(ctx.next_functions[3:5]):
            return None, None, grad, *(None for _ in range(8))
        tied = wide(grad)
        b = ctx.unit.train
        train_ids, val_ids = ids[:b].flatten(), ids[b:].flatten()  # [b*T], [S]
        products = OuterProducts(tied, in_dtype_of(tied, x), plan=ctx.tap.plans["weight"])
        train, val = products.split(b)
        with unnarrowed(grad):
            total, dots = train.sum_and_scores(val, ctx.unit.sizes, ctx.tap.how)
        columns = train.left.index_select(2, val_ids)
        val_columns = val.left.flatten(0, 1).index_select(1, train_ids)
        val_inputs = val.right.flatten(0, 1)
        return None, None, grad, None, None, total, dots[None], columns, train.right, val_columns, val_inputs
