"""Rows and positions in one axis `[b * T, …]`, as in OPT's MLPs: samples can be told apart if the axis goes
row after row, which a run of the first row alone shows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ghost.errors import UnsupportedModelError
from ghost.layers import Layer, LayerRule
from ghost.step import StepState, Unit
from ghost.units import watched


class RowOrder:
    """Knows which layers have rows and positions in one axis, and whether in the order that it takes."""

    def __init__(self, model: nn.Module, state: StepState) -> None:
        self._model, self._state = model, state
        self._flattened: set[str] = set()
        self._row_major: set[str] = set()

    @property
    def unchecked(self) -> set[str]:
        """Layers whose order no run of the model has shown."""
        return self._flattened - self._row_major

    def is_flattened(self, layer: Layer, x: Tensor, unit: Unit) -> bool:
        """Whether the layer's input has rows and positions in one axis."""
        assert isinstance(layer.rule, LayerRule)
        if x.dim() < 2 or not layer.rule.any_rank:
            return False
        if torch.compiler.is_compiling():  # T would be a constant, and every length a reason to compile again
            flat = x.shape[0] not in (1, unit.size) and unit.size > 0 and x.shape[0] % unit.size == 0
        else:
            positions = self._state.tokens or 0
            flat = x.shape[0] == unit.size * positions and positions > 1
        if not flat:
            return False
        if not torch.compiler.is_compiling():
            self._flattened.add(layer.name)
        elif layer.name not in self._row_major:
            raise UnsupportedModelError(
                f"layer {layer.name!r} has rows and positions in one axis, whose order is checked in eager "
                "code: take one step of the model uncompiled first."
            )
        return True

    def check(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse an axis that does not begin with what the first row has on its own.

        Args:
            forward, args, kwargs: The model's call.
        """
        rows = self._state.rows.size

        def first(leaf: Any) -> Any:
            return leaf[:1] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows else leaf

        together = self._inputs(forward, args, kwargs)
        alone = self._inputs(forward, *tree_map(first, (args, kwargs)))
        for name in sorted(self.unchecked):
            begin, expected = together[name][: len(alone[name])].double(), alone[name].double()
            if not torch.allclose(begin, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())):
                raise UnsupportedModelError(
                    f"layer {name!r} has rows and positions in one axis, but not row after row: hand it an "
                    "input whose first axis is the rows, or flatten that row by row."
                )
            self._row_major.add(name)

    def _inputs(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """What the layers get in a run without dropout, by name."""
        inputs: dict[str, Tensor] = {}

        def keep(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer.name in self._flattened:
                inputs[layer.name] = (*args, *kwargs.values())[0]

        modes = {module: module.training for module in self._model.modules()}
        self._model.eval()
        try:
            with watched(self._model, self._state, keep):
                forward(*args, **kwargs)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return inputs
