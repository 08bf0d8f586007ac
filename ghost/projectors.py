"""Which parameters are projected, and with which matrices."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ghost.algebra import accumulation_dtype
from ghost.config import GhostConfig
from ghost.errors import GhostConfigError
from ghost.layers import Layer, WholeRule
from ghost.layout import Layout
from ghost.projection import kept_sizes, matrix
from ghost.selection import Selection
from ghost.taps import Projector


def chosen_parameters(model: nn.Module, layers: Sequence[Layer], config: GhostConfig) -> dict[int, str]:
    """Names of the parameters that are projected, by `id`: all of a selected layer's, with all their uses.

    Raises:
        GhostConfigError: The selection names something that is not there or cannot be projected, or leaves
            nothing.
    """
    selection = config.selection
    if config.proj_layers is not None:
        if selection != Selection():
            raise GhostConfigError(
                f"proj_layers={','.join(config.proj_layers)!r} and a layer selection are both given: give "
                "one."
            )
        selection = Selection(include=[_pattern(name) for name in config.proj_layers])
    if selection.selects_heads:
        raise GhostConfigError(
            f"layer selection: include={list(selection.include)} names attention heads, and whole layers are "
            "projected: name layers."
        )
    selection.check(layers)
    wanted = {id(p) for layer in layers if selection.matches(layer) for p in layer.params.values()}
    if not config.include_embeddings:
        tables = [layer for layer in layers if isinstance(layer.module, nn.Embedding)]
        wanted -= {id(p) for layer in tables for p in layer.params.values()}
        if not wanted:
            raise GhostConfigError("include_embeddings=False leaves nothing to project: set it to True.")
    return {id(p): name for name, p in model.named_parameters() if id(p) in wanted}


def _pattern(name: str) -> str:
    """A part of a layer's name as a pattern; patterns stay as they are."""
    return name if name.startswith("re:") or set(name) & set("*?[") else f"*{name}*"


def plan(
    model: nn.Module, layers: Sequence[Layer], chosen: Mapping[int, str], config: GhostConfig
) -> tuple[Layout, dict[str, Projector]]:
    """The layout of a row, and how each parameter is projected, by its name.

    Args:
        chosen: Names of the parameters by `id`, as `chosen_parameters` gives them.
    """
    owners: dict[str, Layer] = {}
    # A parameter with several uses is projected as in its first, and rather as in a layer with a formula,
    # whose factors have the parameter's own shape alone.
    for layer in sorted(layers, key=lambda layer: isinstance(layer.rule, WholeRule)):
        for p in layer.params.values():
            if id(p) in chosen:
                owners.setdefault(chosen[id(p)], layer)
    sizes, projectors = [], {}
    for name, p in model.named_parameters():
        if name not in owners:
            continue
        rule = owners[name].rule
        shape, turned = rule.as_matrix(p.shape), rule.inputs_first and p.dim() > 1
        size_out, size_in = shape[::-1] if turned else shape
        k = kept_sizes(size_out, size_in, config.proj_rank_total, config.proj_rank_min)
        sizes.append((name, (size_out, size_in), k))
        out = _matrix(config, name, "out", k[0], size_out, p)
        inputs = _matrix(config, name, "in", k[1], size_in, p)
        rows, columns = (inputs, out) if turned else (out, inputs)
        projectors[name] = Projector(shape, rows, columns, turned)
    return Layout.of(sizes), projectors


def _matrix(config: GhostConfig, name: str, side: str, k: int, size: int, p: Tensor) -> Tensor | None:
    """The matrix of one side where its parameter is, in the dtype in which gradients are projected."""
    made = matrix(config.proj_kind, config.proj_seed, name, side, k, size)
    return None if made is None else made.to(p.device, accumulation_dtype(p.dtype))
