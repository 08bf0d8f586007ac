"""Per-sample gradients that are kept until the end of a step, for what is known only then: inner products
with further targets, the samples' weights, and their inner products with each other.

What a tap sees in the backward is a layer's per-sample gradients as its rule gives them: mostly as factors,
its inputs and output gradients. Keeping them costs their memory and no arithmetic; once a step's whole
gradient is known, their inner products with any target are one more matrix product a layer, and once its
samples' weights are, so is the gradient of the batch so weighed. A convolution's factors are larger than its
input: the windows of it that the kernel sees, each in full. A grouped one, and a module without a formula,
have each sample's whole gradient kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from ghost.algebra import unnarrowed
from ghost.errors import ProtocolError
from ghost.gradients import SampleGradients
from ghost.layers import Layer
from ghost.step import Parts, Probes, Unit, Use, part_scores
from ghost.taps import ConcatTap, Grads, Tap, TargetTap, WatchTap, note_backward


@dataclass(frozen=True)
class KeptUse:
    """One use of a parameter: the training samples' gradients as one tap has seen them.

    Attributes:
        parts: What of the parameter is scored here, nothing maybe.
        versions: How often each factor had been edited in place by then.
    """

    layer: Layer
    key: str
    parts: Parts
    unit: Unit
    gradients: SampleGradients
    versions: tuple[int, ...]

    @classmethod
    def of(cls, layer: Layer, key: str, parts: Parts, unit: Unit, gradients: SampleGradients) -> Self:
        """The use, its factors as they are now."""
        return cls(layer, key, parts, unit, gradients, versions(gradients))

    @property
    def parameter(self) -> nn.Parameter:
        """Which parameter is used; other layers may have it too."""
        return self.layer.params[self.key]

    def check(self) -> None:
        """Raise `ProtocolError` where a batch has been edited in place since the backward."""
        if versions(self.gradients) != self.versions:
            raise ProtocolError(
                f"an input of layer {self.layer.name!r} was edited in place between its backward and the end "
                "of the step, which needs it once more: give each micro-batch tensors of its own."
            )

    def scores(self, targets: Tensor) -> Tensor:
        """`⟨targets_c, g_i⟩`, `[K, b, C]`; `targets` is `[C, *shape]`."""
        self.check()
        with unnarrowed(targets):
            return part_scores(self.gradients, list(targets), self.parts, self.unit)

    def weighted_sum(self, weights: "RowWeights | None") -> Tensor:
        """`Σ_i w_i g_i` in the parameter's shape; None for weights of one."""
        self.check()
        kept, common = self.gradients, 1.0
        if weights is not None:
            common = weights.common
            if weights.of_rows is not None or not weights.is_whole:
                kept = kept.weighed(weights.rows, weights.of_rows)
        with unnarrowed(kept.example):
            total = kept.sum()
        return total if common == 1.0 else total * common


@dataclass(frozen=True)
class RowWeights:
    """Weights of the entries of a unit, as a sum over their gradients takes them.

    Entries without weight are left out of the products. A factor that all others share is put on their sum,
    since narrow dtypes would round it on every row.

    Attributes:
        rows: The entries that have a weight, `[r]` int64.
        of_rows: Their weights over `common`, `[r]`; None for ones.
        common: The factor that they share.
        is_whole: Whether no entry is left out.
    """

    rows: Tensor
    of_rows: Tensor | None
    common: float
    is_whole: bool

    @classmethod
    def of(cls, unit: Unit, weights: Tensor) -> Self:
        """From the samples' weights `[b]`."""
        own = weights if unit.row is None else weights[unit.row]  # of each entry
        rows = own.nonzero().flatten()
        own = own[rows]
        if len(rows) and bool((own == own[0]).all()):
            return cls(rows, None, float(own[0]), len(rows) == unit.train)
        return cls(rows, own, 1.0, len(rows) == unit.train)


def versions(gradients: SampleGradients) -> tuple[int, ...]:
    """The version of each of the object's tensors, which every edit in place raises."""
    return tuple(value._version for value in vars(gradients).values() if isinstance(value, Tensor))


class Kept:
    """The per-sample gradients of a step's micro-batches, use by use.

    A parameter with several uses needs no special case: scores are linear in the target, which is the sum
    over all uses already, and so is a sum over samples.
    """

    def __init__(self) -> None:
        self._zeros: list[Probes] = []
        self._uses: list[list[KeptUse]] = []

    def open(self, zeros: Mapping[tuple[str, str], Tensor]) -> None:
        """Begin a micro-batch.

        Args:
            zeros: `[K, b, C]` by layer and parameter name, of all that is scored: what has no use in the
                micro-batch has scores of zero.
        """
        self._zeros.append({key: zero.detach() for key, zero in zeros.items()})
        self._uses.append([])

    def add(self, use: KeptUse) -> None:
        """Keep a use in the micro-batch in progress."""
        self._uses[-1].append(use)

    def clear(self) -> None:
        """Let go of everything."""
        self._zeros, self._uses = [], []

    def sizes(self) -> list[int]:
        """The number of each micro-batch's samples."""
        return [next(iter(zeros.values())).shape[1] for zeros in self._zeros]

    def uses(self) -> Iterator[tuple[int, KeptUse]]:
        """Every use with the number of its micro-batch."""
        for number, uses in enumerate(self._uses):
            for use in uses:
                yield number, use

    def scores(self, targets: Mapping[str, Tensor]) -> list[Probes]:
        """Inner products with `targets`, `[K, b, C]` by layer and parameter name, of every micro-batch in
        turn.

        Args:
            targets: `[C, *shape]` by qualified parameter name; what is not among them is zero.
        """
        found = [dict(zeros) for zeros in self._zeros]
        for number, use in self.uses():
            target = targets.get(use.layer.qualified(use.key))
            if target is not None and use.parts:
                scores, place = found[number], (use.layer.name, use.key)
                scores[place] = scores[place] + use.scores(target).to(scores[place].dtype)
        return found

    @torch.no_grad()
    def weighted_sums(self, weights: Sequence[Tensor] | None) -> dict[int, Tensor]:
        """`Σ_i w_i g_i` by the parameter's `id`, in its shape and dtype; a parameter without a use by a
        sample of any weight is not among them.

        Args:
            weights: Of each micro-batch's samples, `[b]`; None for weights of one.
        """
        known: dict[tuple[int, int], RowWeights | None] = {}  # of the entries of each unit
        found: dict[int, Tensor] = {}
        for number, use in self.uses():
            place, p = (number, id(use.unit)), use.parameter
            if place not in known:
                known[place] = None if weights is None else RowWeights.of(use.unit, weights[number])
            own = known[place]
            if own is None or len(own.rows):
                total = use.weighted_sum(own).to(p.dtype)
                found[id(p)] = found[id(p)] + total if id(p) in found else total
        return found


@dataclass(frozen=True)
class KeepingTap(Tap):
    """Keeps the per-sample gradients, and does what the tap behind it in the class's bases does.

    Attributes:
        kept: Where to.
    """

    keeps = True

    kept: Kept = field(repr=False, compare=False)

    def backward(
        self, unit: Unit, gradients: Mapping[str, SampleGradients], targets: Sequence[Tensor]
    ) -> Grads:
        for key, parts in self.scored.items():
            self.kept.add(KeptUse.of(self.layer, key, parts, unit, gradients[key]))
        return super().backward(unit, gradients, targets)  # type: ignore[safe-super]


class KeepingTargetTap(KeepingTap, TargetTap):
    """`TargetTap`, kept."""


class KeepingWatchTap(KeepingTap, WatchTap):
    """`WatchTap`, kept."""


class DeferringTargetTap(KeepingTap):
    """The validation gradient is given; every parameter's own gradient waits for the samples' weights.

    The parameters are among its tensors all the same, so that uses of them elsewhere are seen; what they are
    given is nothing.
    """

    def backward(
        self, unit: Unit, gradients: Mapping[str, SampleGradients], targets: Sequence[Tensor]
    ) -> Grads:
        for key, found in gradients.items():
            self.kept.add(KeptUse.of(self.layer, key, self.scored.get(key, ()), unit, found))
        dots: Grads = [
            part_scores(gradients[key], list(target), parts, unit)
            for (key, parts), target in zip(self.scored.items(), targets, strict=True)
        ]
        return [*(None for _ in gradients), *dots, *(None for _ in targets)]


@dataclass(frozen=True)
class DeferringConcatTap(KeepingTap, ConcatTap):
    """Training and validation rows in one batch; every parameter's own gradient waits for the samples'
    weights.
    """

    def backward(
        self, unit: Unit, gradients: Mapping[str, SampleGradients], targets: Sequence[Tensor]
    ) -> Grads:
        note_backward(self.layer, self.state, "val_mode='separate'")
        dots: Grads = []
        for key, found in gradients.items():
            train, val = found.split(unit.train)
            parts = self.scored.get(key, ())
            self.kept.add(KeptUse.of(self.layer, key, parts, unit, train))
            if self._waits(key):
                self.state.ledger.add(Use(self.layer, key, parts, unit, train, val))
            if parts:
                dots.append(None if self._waits(key) else self._dots(train, val, parts, unit))
        return [*(None for _ in gradients), *dots]

    def _dots(self, train: SampleGradients, val: SampleGradients, parts: Parts, unit: Unit) -> Tensor:
        """Inner products `[K, b, C]` of the samples with the validation columns."""
        found = []
        for part in parts:
            cut = None if part is None else (part.axis, part.index)
            mine, theirs = (train, val) if cut is None else (train.take(*cut), val.take(*cut))
            found.append(mine.scores(theirs, unit.sizes, self.how))
        return unit.to_rows(torch.stack(found))
