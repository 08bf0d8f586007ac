"""What engines share that tap a model's layers: which samples a step has, and what must hold around it."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ghost.algebra import accumulation_dtype
from ghost.batch import Inputs, check_labels, item_rows, plain, row_count, take_rows, token_count
from ghost.config import GhostConfig
from ghost.discovery import find_layers, refuse_half, refuse_mixing_layers
from ghost.distributed import ALONE, Ranks, device_of, reshard
from ghost.engines.base import Engine, LossFn
from ghost.errors import ProtocolError, UnsupportedModelError
from ghost.instrument import Instrument
from ghost.layers import Layer
from ghost.step import StepState, Unit


class TappedEngine(Engine):
    """An engine whose numbers are the gradients of probes at the layers' taps.

    Raises:
        UnsupportedModelError: A trainable parameter or layer cannot be handled exactly.

    Attributes:
        layers: Every layer with trainable parameters.
        state: What the taps read.
    """

    def __init__(
        self, model: nn.Module, config: GhostConfig, val_data: Any = None,
        loss_fn: LossFn | None = None, scaler: Any = None, ranks: Ranks = ALONE,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, config, val_data, loss_fn, scaler, ranks, optimizer)
        reshard(model)
        self.layers: list[Layer] = find_layers(model)
        if not self.layers:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no trainable parameter whose gradient could be taken."
            )
        refuse_half(model)
        self.state = StepState()
        self._parameter = next(iter(self.layers[0].params.values()))
        self._device = device_of(self._parameter)
        self._dtype = config.score_dtype or accumulation_dtype(self._parameter.dtype)
        self._trainable = _trainable(model)
        self._attached = False
        self._ask_for_units = True

    @property
    @abstractmethod
    def instrument(self) -> Instrument:
        """The taps."""

    def attach(self) -> None:
        if not self._attached:
            self.instrument.attach()
            self._attached = True

    def detach(self) -> None:
        self.abandon()
        self.instrument.detach()
        self._attached = False

    def abandon(self) -> None:
        self.state.close()

    def check_loss(self, loss: Tensor) -> None:
        self.instrument.check_parameter_uses(loss)

    def _check_batch(self, X: Inputs, Y: Tensor) -> int:
        """The number of rows, once it is known that they can be told apart."""
        if not self._attached:
            raise ProtocolError("the engine is detached: call attach() before a step.")
        reshard(self.model)
        if _trainable(self.model) != self._trainable:
            raise UnsupportedModelError(
                "the trainable parameters have changed since the manager was made (frozen, unfrozen or "
                "added), so it does not know all of them: make a new manager."
            )
        if self.state.refused is not None:
            raise UnsupportedModelError(self.state.refused)
        refuse_mixing_layers(self.model)
        rows = row_count(X, "the training batch")
        check_labels(Y, rows, "the training batch")
        return rows

    def _open(
        self, X: Inputs, rows: int, val_sizes: Sequence[int], moments: Mapping[str, Sequence[Tensor]]
    ) -> None:
        """From here on forwards are tapped: of `rows` training rows, and validation rows behind them."""
        state, sizes = self.state, tuple(val_sizes)
        state.close()
        state.units, state.tokens = (Unit(rows + sum(sizes), rows, rows, sizes),), token_count(X)
        state.probes, state.moments = self._new_probes(), moments
        self.instrument.hand_out()
        state.active = True

    @abstractmethod
    def _new_probes(self) -> dict[tuple[str, str], Tensor]:
        """Fresh zeros for the rows in `state`, by layer name and parameter name."""

    def _note_units(self, X: Inputs) -> None:
        """Note what a layer's leading entries can be for the inputs that go through the model."""
        state = self.state
        state.tokens = token_count(X)
        state.units = (state.rows, *item_units(state.rows, X))
        if self._ask_for_units and any(unit.size in (1, state.rows.size) for unit in state.units[1:]):
            self._learn_units(X, state.units[1].size)

    def _learn_units(self, X: Inputs, items: int) -> None:
        """A batch with as many items as rows leaves open which of them a layer sees; a run on a few of its
        rows that have more tells.
        """
        rows = self.state.rows.size
        row = next(row for row in item_rows(X) if len(row) == items)
        numbers = torch.bincount(row, minlength=rows)
        most, least = int(numbers.argmax()), int(numbers.argmin())
        chosen = [most, most] if items > 1 else [most, most, least]
        few = take_rows(X, torch.tensor(chosen, device=row.device))
        assert isinstance(few, Mapping)
        units = (Unit(len(chosen), 0, 0, ()), Unit(2 * int(numbers[most]), 0, 0, ()))
        self.instrument.units.learn(lambda: self.model(**plain(few)), units)
        self._ask_for_units = False

    def _check_pass(self, computed: bool) -> None:
        """After the backward: it was one of a whole forward.

        Args:
            computed: Whether any probe has a gradient.
        """
        if unchecked := self.instrument.order.unchecked:
            self.abandon()
            raise ProtocolError(
                f"the layers {sorted(unchecked)} have rows and positions in one axis, whose order is checked "
                f"when the {type(self.model).__name__} itself is called: call the model as a whole."
            )
        if waiting := next(iter(self.state.slope_uses.values()), None):
            name = waiting[0].layer.name
            self.abandon()
            raise UnsupportedModelError(
                f"layer {name!r} ran more often than the backward came by, and scores of the optimizer's own "
                "step wait for all uses of a parameter: run what is not in the loss under torch.no_grad(), "
                "or set preconditioner='none'."
            )
        if not computed:
            self.abandon()
            raise ProtocolError(
                f"engine={self.name!r} found no gradient: run forward and backward on forward_inputs before "
                "collecting."
            )

    def _loss_scale(self) -> Tensor | None:
        """The GradScaler's present factor, as a tensor."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        return self.scaler.scale(torch.ones((), device=self._device))


def _trainable(model: nn.Module) -> tuple[int, ...]:
    """Which parameters are trained, to notice a change."""
    return tuple(id(p) for p in model.parameters() if p.requires_grad)


def item_units(rows: Unit, X: Inputs) -> list[Unit]:
    """The units of items that belong to rows, but for those of which every row has exactly one."""
    found = []
    for row in item_rows(X):
        if torch.equal(row, torch.arange(rows.size, device=row.device)):
            continue
        ends = torch.tensor([rows.train, *rows.sizes]).cumsum(0).to(row.device)
        # How many items come before the end of the training rows, and of each column's rows.
        bounds = torch.searchsorted(row, ends).tolist()
        sizes = tuple(hi - lo for lo, hi in pairwise(bounds))
        found.append(Unit(len(row), bounds[0], rows.rows, sizes, row[: bounds[0]]))
    return found
