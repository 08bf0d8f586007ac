"""What is known of the step in progress: its samples, its probes, and what shared parameters wait for."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ghost.algebra import unnarrowed
from ghost.gradients import SampleGradients, cut, sum_of_uses
from ghost.heads import Part
from ghost.layers import Layer

Probes = dict[tuple[str, str], Tensor]
"""Zero tensors `[K, b, C]` by layer name and parameter name: K parts, b training samples, C columns."""

Watch = Callable[[Layer, tuple[Any, ...], dict[str, Any]], object]
"""`watch(layer, args, kwargs)` is told of a layer's call."""

Parts = Sequence[Part | None]
"""The parts of a parameter that are scored; `(None,)` for the whole of it."""


@dataclass(frozen=True)
class Unit:
    """How the leading entries of a layer's tensors belong to the samples of a step.

    Mostly an entry is a row of the batch. Images of which a row may have several are a unit of their own.

    Attributes:
        size: Number of entries, training samples' first.
        train: How many of them are training samples'.
        rows: b, the number of training samples.
        sizes: Validation entries of each column of the scores.
        row: The training sample `[train]` of each entry; None where entry i is sample i's.
    """

    size: int
    train: int
    rows: int
    sizes: tuple[int, ...]
    row: Tensor | None = None

    def to_rows(self, dots: Tensor) -> Tensor:
        """`[…, train, C]` added up over each sample's entries, `[…, b, C]`."""
        if self.row is None:
            return dots
        summed = dots.new_zeros(*dots.shape[:-2], self.rows, dots.shape[-1])
        return summed.index_add_(-2, self.row, dots)


def part_scores(train: SampleGradients, val_sums: Sequence[Tensor], parts: Parts, unit: Unit) -> Tensor:
    """Inner products `[K, b, C]` of the samples' gradients with one summed gradient a column."""
    dots = []
    for part in parts:
        mine, sums = train, list(val_sums)
        if part is not None:
            mine = train.take(part.axis, part.index)
            sums = [cut(total, part.axis, part.index) for total in sums]
        dots.append(torch.stack([mine.dot(total) for total in sums], dim=1))
    return unit.to_rows(torch.stack(dots))


@dataclass(frozen=True)
class Use:
    """One use of a parameter in a joint pass, as its tap has seen it."""

    layer: Layer
    key: str
    parts: Parts
    unit: Unit
    train: SampleGradients
    val: SampleGradients


class Ledger:
    """Uses of parameters that are used more than once.

    The validation gradient of such a parameter is the sum over all its uses, so each use's samples meet every
    use's validation gradient. They are kept here until the backward has seen them all.

    Attributes:
        calls: Forwards of each layer.
        recomputed: Forwards inside a backward of layers that had none before it.
        settled: Backwards of each layer.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.recomputed: Counter[str] = Counter()
        self.settled: Counter[str] = Counter()
        self._uses: dict[int, list[Use]] = defaultdict(list)

    def add(self, use: Use) -> None:
        """Keep a use until `scores`."""
        self._uses[id(use.layer.params[use.key])].append(use)

    def scores(self) -> Probes:
        """Inner products `[K, b, C]` by layer and parameter name, all cross terms included."""
        found: Probes = {}
        for uses in self._uses.values():
            with unnarrowed(uses[0].train.example):
                columns = zip(*(use.val.columns(use.unit.sizes) for use in uses), strict=True)
                sums = [sum_of_uses(column) for column in columns]
                for use in uses:
                    if use.parts:
                        key = use.layer.name, use.key
                        dots = part_scores(use.train, sums, use.parts, use.unit)
                        found[key] = found[key] + dots if key in found else dots
        return found


@dataclass
class Hand:
    """What one layer's swapped forward reads of the step.

    It goes by no name: a compiled block then stands for all blocks that are like it.

    Attributes:
        probes: Of the layer's scored parameters, in their order.
        given: What its tap's backward is given of them.
        traced: Whether the layer has run in compiled code, which keeps no ledger.
    """

    probes: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    traced: bool = False


@dataclass
class StepState:
    """What the swapped forwards read. Only active between the start of a step and the end of its backward.

    Attributes:
        active: Whether forwards are tapped; when not, every module computes what it always did.
        units: What a layer's leading entries can be: rows of the batch first, then items of rows.
        latest: Index of the unit of the layer that ran last.
        tokens: T where inputs are `[rows, T, …]`.
        probes: By layer and parameter name, zeros that receive inner products.
        targets: Validation gradients `[C, *shape]` by qualified parameter name, where they are known before
            the forward.
        moments: What scores of the optimizer's own step need of its state, by qualified parameter name.
        slope_uses: Uses of a parameter, by its `id`, that wait for the others before their scores are known.
        late_scores: Scores `[K, b, C]` that were known only in another layer's backward.
        output_scale: Factor on the gradient at the model's outputs, or None.
        loss_unseen: Whether the loop calls `loss.backward()` itself, and only the outputs are seen.
        outputs_scaled: Whether the model's outputs have been seen and scaled.
        tied: By a tied table's name, its ids and the phantom tensors on their way to its head.
        ledger: Uses of shared parameters.
        watch: What layers only report their calls to, or None.
        refused: Why compiled code cannot be scored: it would not say so again.
        hands: By layer name, what its swapped forward reads.
        without_grad: Layers that have run under `no_grad`, outside of compiled code.
    """

    active: bool = False
    units: tuple[Unit, ...] = ()
    latest: int = 0
    tokens: int | None = None
    probes: Probes = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    slope_uses: dict[int, list[Any]] = field(default_factory=dict)
    late_scores: Probes = field(default_factory=dict)
    output_scale: Tensor | None = None
    loss_unseen: bool = False
    outputs_scaled: bool = False
    tied: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    watch: Watch | None = None
    refused: str | None = None
    hands: dict[str, Hand] = field(default_factory=dict)
    without_grad: set[str] = field(default_factory=set)

    @property
    def rows(self) -> Unit:
        """The rows of the batch."""
        return self.units[0]

    def given(self, name: str) -> list[Tensor]:
        """What a tap's backward is given of a parameter, by its qualified name."""
        return [*([self.targets[name]] if self.targets else []), *self.moments.get(name, ())]

    def add_late(self, layer: str, key: str, scores: Tensor) -> None:
        """Add scores `[K, b, C]` of a parameter that its own probe does not receive."""
        late = self.late_scores
        late[layer, key] = late[layer, key] + scores if (layer, key) in late else scores

    def close(self) -> None:
        """Forwards are plain again, and nothing of the step is kept."""
        self.active, self.output_scale, self.outputs_scaled, self.latest = False, None, False, 0
        self.loss_unseen = False
        self.probes, self.tied, self.ledger = {}, {}, Ledger()
        for hand in self.hands.values():
            hand.probes, hand.given, hand.traced = [], [], False
        self.without_grad = set()
        self.moments, self.slope_uses, self.late_scores = {}, {}, {}
