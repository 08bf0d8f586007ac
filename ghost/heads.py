"""Parts of parameters that belong to single attention heads; `ghost.attention` says which head owns what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from ghost.attention import Head, head_layout, is_conv1d
from ghost.errors import GhostConfigError
from ghost.layers import Layer


@dataclass(frozen=True)
class Part:
    """A slice of a parameter that is scored on its own.

    Attributes:
        block: The attention block's qualified name.
        head: The head within it.
        axis: The parameter's axis that is cut, as stored (Hugging Face's Conv1D stores `[d_in, d_out]`).
        index: Slices along it, ascending and apart from each other, with start and stop set.
    """

    block: str
    head: Head
    axis: int
    index: tuple[slice, ...]

    @property
    def label(self) -> str:
        """Such as `transformer.h.3.attn.head[0]`."""
        head = f"{self.head.kind}[{self.head.number}]"
        return f"{self.block}.{head}" if self.block else head


Heads = Mapping[tuple[str, str], Sequence[Part]]
"""Parts by layer name and parameter name. Those of one parameter cut one axis and cover it exactly once."""


@dataclass(frozen=True)
class _Cut:
    """A parameter, by its path below its block, whose axis is cut into equal pieces of these owners."""

    path: str
    axis: int
    owners: Sequence[Head]


def attention_heads(model: nn.Module, layers: Sequence[Layer]) -> dict[tuple[str, str], list[Part]]:
    """The parts of the layers' parameters, for every attention block with a known layout.

    Parameters that are not divided among heads are not in it. Where blocks are nested, the outer one's layout
    holds.

    Raises:
        GhostConfigError: A layout names a projection that is not there, or cuts one into unequal pieces.
    """
    owned = {layer.qualified(param): (layer, param) for layer in layers for param in layer.params}
    found: dict[tuple[str, str], list[Part]] = {}
    for block, module in model.named_modules():
        for cut in _cuts(block, module):
            layer, param = owned.get(f"{block}.{cut.path}" if block else cut.path, (None, ""))
            if layer is not None and (layer.name, param) not in found:
                found[layer.name, param] = _parts(block, cut, layer.params[param].shape[cut.axis])
    return found


def _parts(block: str, cut: _Cut, size: int) -> list[Part]:
    """The parts of an axis of `size` entries; neighbouring pieces of one owner are joined."""
    if not cut.owners or size % len(cut.owners):
        raise GhostConfigError(
            f"the layout of the attention block {block!r} cuts the {size} entries of {cut.path!r} into "
            f"{len(cut.owners)} pieces: the pieces should be equal."
        )
    width = size // len(cut.owners)
    slices: dict[Head, list[slice]] = {}
    for piece, head in enumerate(cut.owners):
        own = slices.setdefault(head, [])
        start = own.pop().start if own and own[-1].stop == piece * width else piece * width
        own.append(slice(start, (piece + 1) * width))
    return [Part(block, head, cut.axis, tuple(own)) for head, own in slices.items()]


def _cuts(block: str, module: nn.Module) -> list[_Cut]:
    """The cut parameters of a block; none at all where a projection is not a plain one (but an adapter around
    one, say), since its heads would be incomplete.
    """
    layout = head_layout(module)
    if layout is None:
        return []
    cuts: list[_Cut] = []
    for axes_of, owned in ((_output_axes, layout.outputs), (_input_axes, layout.inputs)):
        for path, owners in owned.items():
            axes = axes_of(path, _projection(block, module, path))
            if not axes:
                return []
            cuts += [_Cut(parameter, axis, owners) for parameter, axis in axes.items()]
    return cuts


def _projection(block: str, module: nn.Module, path: str) -> Any:
    try:
        return attrgetter(path)(module)
    except AttributeError as error:
        raise GhostConfigError(
            f"the layout of the attention block {block!r} ({type(module).__name__}) names the projection "
            f"{path!r}, which is not there."
        ) from error


def _output_axes(path: str, projection: Any) -> dict[str, int]:
    """The axes of a projection's outputs by parameter path; empty where it is not a plain one."""
    if isinstance(projection, nn.Parameter):
        return {path: 0}
    if isinstance(projection, nn.Linear) or is_conv1d(projection):
        return {f"{path}.weight": 1 if is_conv1d(projection) else 0, f"{path}.bias": 0}
    return {}


def _input_axes(path: str, projection: Any) -> dict[str, int]:
    """The axes of a projection's inputs, which its bias does not have."""
    if isinstance(projection, nn.Parameter):
        return {path: 1}
    if isinstance(projection, nn.Linear) or is_conv1d(projection):
        return {f"{path}.weight": 0 if is_conv1d(projection) else 1}
    return {}
