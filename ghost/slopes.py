"""Taps whose scores are about the step that Adam takes: the validation gradient is weighted, element by
element, by what the optimizer makes of the batch's gradient (`ghost.preconditioner`).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghost.choice import Algebra, Choices, write
from ghost.discovery import shared_parameters
from ghost.distributed import fetched
from ghost.errors import UnsupportedModelError
from ghost.gradients import OuterProducts, SampleGradients, sum_of_uses
from ghost.layers import Layer
from ghost.step import Parts, StepState, Unit, part_scores
from ghost.taps import Grads, Tap, note_backward
from ghost.weigher import NUMBERS, Weigher
from ghost.weighted import Piece, adam_sum_and_dots, parts_of, sum_and_dots, sum_and_weights


@dataclass(frozen=True)
class SlopeUse:
    """One use of a parameter that waits for the others: its slopes depend on the gradient of all.

    Attributes:
        val: The validation samples' gradients, column by column; None where the validation gradient of all
            uses is given.
    """

    layer: Layer
    key: str
    parts: Parts
    unit: Unit
    train: SampleGradients
    val: Sequence[SampleGradients] | None


@dataclass(frozen=True)
class SlopeTap(Tap):
    """What taps of both validation modes share.

    The tensors behind the probes are, for each scored parameter: the validation gradient where it is given,
    and what `StepState.moments` has.

    Attributes:
        state: Where uses of shared parameters wait.
        shared: Parameters that other layers have as well.
        sharers: For each of these, all layers that have it.
    """

    state: StepState = field(repr=False, compare=False)
    shared: frozenset[str]
    sharers: Mapping[str, tuple[str, ...]]

    def _by_key(self, tensors: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
        """The tensors behind the probes by scored parameter."""
        each = len(tensors) // max(1, len(self.scored))
        return {key: tensors[i * each : (i + 1) * each] for i, key in enumerate(self.scored)}

    @abstractmethod
    def _sides(
        self, gradients: SampleGradients, unit: Unit
    ) -> tuple[SampleGradients, Sequence[SampleGradients] | None]:
        """The training samples' gradients, and the validation samples', column by column; None where the
        validation gradient of all uses is given.
        """

    def fetch(self, targets: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """All but the step's numbers, which are read on the CPU."""
        return [t if _are_numbers(t) else fetched(t, device) for t in targets]

    def backward(
        self, unit: Unit, gradients: Mapping[str, SampleGradients], targets: Sequence[Tensor]
    ) -> Grads:
        note_backward(self.layer, self.state, "preconditioner='none'")
        behind = self._by_key(targets)
        totals: Grads = []
        dots: Grads = []
        for key, both in gradients.items():
            train, val = self._sides(both, unit)
            if key not in self.scored:
                totals.append(train.sum())
                continue
            given, moments = None, behind[key]
            if val is None:
                given, *moments = moments
            total, dot = self._settle(key, train, val, given, moments, unit)
            totals.append(total)
            dots.append(dot)
        return totals + dots + [None] * len(targets)

    def _settle(
        self, key: str, train: SampleGradients, val: Sequence[SampleGradients] | None, given: Tensor | None,
        moments: Sequence[Tensor], unit: Unit,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of a scored parameter and of its probe; both None while other uses are to come.

        Args:
            train, val: As `_sides` gives them.
            given: The validation gradient of all uses `[C, *shape]`, or None.
            moments: The step's numbers, then what `Weigher` reads.
        """
        shape = self.layer.params[key].shape
        uses = self._uses(key, SlopeUse(self.layer, key, self.scored[key], unit, train, val))
        if uses is None:
            return None, None
        whole = given if given is not None else _val_grad(uses)
        targets = whole.reshape(len(whole), *_matrix(shape))
        numbers, *rest = moments
        m, v, p, *earlier = (moment.reshape(_matrix(shape)) for moment in rest)
        before, squares = earlier or (None, None)
        plan = self.plans[key]
        if len(uses) == 1 and tuple(uses[0].parts) == (None,):
            total, dots = adam_sum_and_dots(
                *parts_of(train), unit.row, unit.rows, targets, numbers, m, v, p, before, squares, *plan
            )
            return total.view(shape), dots[None]
        weigher = Weigher(numbers, m, v, p, before, squares)
        for use in uses:
            if isinstance(use.train, OuterProducts):
                write(use.train.plan.note, Algebra.FUSED)
        total, scores = _settle_together(uses, targets, weigher, plan.chunk)
        for use, score in zip(uses[:-1], scores, strict=False):
            if score is not None:
                self.state.add_late(use.layer.name, use.key, score)
        return total.view(shape), scores[-1]

    def _uses(self, key: str, use: SlopeUse) -> list[SlopeUse] | None:
        """All uses of the parameter in this micro-batch, or None while there are more to come."""
        if torch.compiler.is_compiling():
            return [use]
        p, calls = id(self.layer.params[key]), self.state.ledger.calls
        waiting = [*self.state.slope_uses.pop(p, ()), use]
        expected = sum(calls[name] for name in self.sharers.get(key, (self.layer.name,)))
        if expected < len(waiting) and key in self.shared:
            raise UnsupportedModelError(
                f"layer {self.layer.name!r} shares its {key} and runs under re-entrant activation "
                "checkpointing, which hides its uses from each other: checkpoint with use_reentrant=False, "
                "or set preconditioner='none'."
            )
        if len(waiting) < expected:
            self.state.slope_uses[p] = waiting
            return None
        return waiting


def _are_numbers(tensor: Tensor) -> bool:
    """Whether these are a step's numbers and not a tensor of the parameter's size."""
    return tensor.dtype is torch.float64 and tensor.shape == (NUMBERS,) and tensor.device.type == "cpu"


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """A parameter as a matrix: its first axis, and all others as one."""
    return (1, 1) if not shape else (shape[0], shape[1:].numel())


def _val_grad(uses: Sequence[SlopeUse]) -> Tensor:
    """The validation gradient of all uses, `[C, *shape]`."""
    columns = [
        sum_of_uses(column) for column in zip(*(use.val for use in uses if use.val is not None), strict=True)
    ]
    return columns[0][None] if len(columns) == 1 else torch.stack(columns)


def _settle_together(
    uses: Sequence[SlopeUse], targets: Tensor, weigher: Weigher, chunk: int
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient `[m, n]` of several uses, or of one whose parts are told apart, and each use's scores
    `[K, b, C]`; None where it is not scored.
    """
    pieces = [Piece.of(use.train, use.unit) for use in uses]
    if all(tuple(use.parts) in ((), (None,)) for use in uses):
        total, dots = sum_and_dots(pieces, targets, weigher, chunk)
        return total, [dot[None] if use.parts else None for use, dot in zip(uses, dots, strict=True)]
    total, weighted = sum_and_weights(pieces, targets, weigher, chunk)
    columns = list(weighted.view(len(targets), *uses[0].layer.params[uses[0].key].shape))
    return total, [
        part_scores(use.train, columns, use.parts, use.unit) if use.parts else None for use in uses
    ]


class ConcatSlopeTap(SlopeTap):
    """Training and validation rows in one batch."""

    def _sides(
        self, gradients: SampleGradients, unit: Unit
    ) -> tuple[SampleGradients, Sequence[SampleGradients] | None]:
        train, val = gradients.split(unit.train)
        return train, list(val.columns(unit.sizes))


class TargetSlopeTap(SlopeTap):
    """The validation gradient is given."""

    def _sides(
        self, gradients: SampleGradients, unit: Unit
    ) -> tuple[SampleGradients, Sequence[SampleGradients] | None]:
        return gradients, None


def slope_taps(
    kind: type[SlopeTap], layers: Sequence[Layer], scored: Mapping[str, Mapping[str, Parts]],
    state: StepState, choices: Choices,
) -> list[SlopeTap]:  # fmt: skip
    """One tap a layer, for layers with scored parameters or such that share one: the slopes of a shared
    parameter depend on the gradient of all its uses.
    """
    shared = shared_parameters(list(layers))
    wanted = {key for key, uses in shared.items() if any(name in scored[layer.name] for layer, name in uses)}
    taps = []
    for layer in layers:
        own = {
            key: scored[layer.name].get(key, ())
            for key, p in layer.params.items()
            if key in scored[layer.name] or id(p) in wanted
        }
        sharers = {
            key: tuple(other.name for other, _ in shared[id(p)])
            for key, p in layer.params.items()
            if id(p) in wanted
        }
        if own or kind is ConcatSlopeTap:  # in a joint batch every layer's gradient is of both sides
            taps.append(kind(layer, own, Algebra.FUSED, state, frozenset(sharers), sharers, choices=choices))
    return taps
