"""Which of a step's units, rows or items of rows, a layer sees."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ghost.errors import BatchError
from ghost.layers import Layer
from ghost.step import StepState, Unit, Watch


@contextmanager
def watched(model: nn.Module, state: StepState, watch: Watch) -> Iterator[None]:
    """Layers report their calls to `watch`, and compute what they always did without gradients."""
    device = next(model.parameters()).device
    state.watch = watch
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        state.watch = None


class Units:
    """Tells a layer's unit by the size of what it gets, and remembers it for batches that leave it open."""

    def __init__(self, model: nn.Module, state: StepState) -> None:
        self._model, self._state = model, state
        self._known: dict[str, int] = {}

    def of(self, layer: Layer, size: int) -> Unit:
        """What the layer's `size` leading entries are; a single one may stand for all.

        Raises:
            BatchError: They fit several units.
        """
        state, units = self._state, self._state.units
        if len(units) == 1:
            return units[0]
        known = self._known.get(layer.name)
        fits = [i for i, unit in enumerate(units) if unit.size == size]
        if known is None or not (known in fits or size == 1):
            if len(fits) > 1 or (size == 1 and fits):
                raise BatchError(
                    f"layer {layer.name!r} got {size} entries, which may be rows or items of rows: give a "
                    "batch in which their numbers differ first."
                )
            flat = size == units[0].size * (state.tokens or 0)
            known = fits[0] if fits else 0 if flat else state.latest
            self._known[layer.name] = known
        state.latest = known
        return units[known]

    def of_call(self, layer: Layer, inputs: Any) -> Unit:
        """The unit of a call with any number of inputs: that of the first whose size fits one."""
        sizes = [leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        there = {unit.size for unit in self._state.units}
        return self.of(layer, next((size for size in sizes if size in there), 1))

    def learn(self, run: Callable[[], object], units: tuple[Unit, ...]) -> None:
        """Note every layer's unit, by a run of the model on a batch whose units differ in size."""
        state = self._state
        kept, state.units = state.units, units
        try:
            with watched(self._model, state, lambda layer, args, kwargs: self.of_call(layer, (args, kwargs))):
                run()
        finally:
            state.units, state.latest = kept, 0
