"""Per-sample gradients that are kept until the end of a step, for inner products with targets that are known
only then.

What a tap sees in the backward is a layer's per-sample gradients as factors, its inputs and output gradients.
Keeping them costs their memory and no arithmetic; once a step's whole gradient is known, their inner products
with any target are one more matrix product a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.amp import autocast

from ghost.errors import ProtocolError
from ghost.gradients import SampleGradients
from ghost.layers import Layer
from ghost.step import Parts, Probes, Unit, part_scores
from ghost.taps import Grads, Tap, TargetTap, WatchTap


@dataclass(frozen=True)
class KeptUse:
    """One use of a parameter: the samples' gradients as one tap has seen them.

    Attributes:
        versions: How often each factor had been edited in place by then.
    """

    layer: Layer
    key: str
    parts: Parts
    unit: Unit
    gradients: SampleGradients
    versions: tuple[int, ...]

    def scores(self, targets: Tensor) -> Tensor:
        """`⟨targets_c, g_i⟩`, `[K, b, C]`; `targets` is `[C, *shape]`.

        Raises:
            ProtocolError: A batch has been edited in place since the backward.
        """
        if versions(self.gradients) != self.versions:
            raise ProtocolError(
                f"an input of layer {self.layer.name!r} was edited in place between its backward and the end "
                "of the step, which needs it once more: give each micro-batch tensors of its own."
            )
        with autocast(targets.device.type, enabled=False):  # a step may end inside of an autocast block
            return part_scores(self.gradients, list(targets), self.parts, self.unit)


def versions(gradients: SampleGradients) -> tuple[int, ...]:
    """The version of each of the object's tensors, which every edit in place raises."""
    return tuple(value._version for value in vars(gradients).values() if isinstance(value, Tensor))


class Kept:
    """The per-sample gradients of a step's micro-batches, use by use.

    A parameter with several uses needs no special case: scores are linear in the target, which is the sum
    over all uses already.
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

    def add(
        self, layer: Layer, scored: Mapping[str, Parts], unit: Unit, gradients: Mapping[str, SampleGradients]
    ) -> None:
        """Keep a use of each of the layer's scored parameters for the micro-batch in progress."""
        for key, parts in scored.items():
            found = gradients[key]
            self._uses[-1].append(KeptUse(layer, key, parts, unit, found, versions(found)))

    def clear(self) -> None:
        """Let go of everything."""
        self._zeros, self._uses = [], []

    def scores(self, targets: Mapping[str, Tensor]) -> list[Probes]:
        """Inner products with `targets`, `[K, b, C]` by layer and parameter name, of every micro-batch in
        turn. What was kept is let go of on the way.

        Args:
            targets: `[C, *shape]` by qualified parameter name; what is not among them is zero.
        """
        found = []
        while self._uses:
            scores, uses = self._zeros.pop(0), self._uses.pop(0)
            while uses:
                use = uses.pop()
                target = targets.get(use.layer.qualified(use.key))
                if target is not None:
                    place = use.layer.name, use.key
                    scores[place] = scores[place] + use.scores(target).to(scores[place].dtype)
            found.append(scores)
        return found


@dataclass(frozen=True)
class KeepingTap(Tap):
    """Keeps the per-sample gradients, and does what the tap behind it in the class's bases does.

    Attributes:
        kept: Where to.
    """

    kept: Kept = field(repr=False, compare=False)

    def backward(
        self, unit: Unit, gradients: Mapping[str, SampleGradients], targets: Sequence[Tensor]
    ) -> Grads:
        self.kept.add(self.layer, self.scored, unit, gradients)
        return super().backward(unit, gradients, targets)  # type: ignore[safe-super]


class KeepingTargetTap(KeepingTap, TargetTap):
    """`TargetTap`, kept."""


class KeepingWatchTap(KeepingTap, WatchTap):
    """`WatchTap`, kept."""
