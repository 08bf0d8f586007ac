"""The ghost dot product: every training sample's gradient against the validation gradient, in the backward
that trains the model.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ghost.algebra import accumulation_dtype
from ghost.batch import Inputs, check_labels, item_rows, plain, row_count, take_rows, token_count
from ghost.config import GhostConfig, Resolution, ValMode
from ghost.coverage import refuse_gaps
from ghost.discovery import find_layers, refuse_half, refuse_mixing_layers
from ghost.engines.base import Engine, LayerScores, LossFn, register_engine
from ghost.errors import GhostConfigError, ProtocolError, UnsupportedModelError
from ghost.heads import attention_heads
from ghost.layers import Layer
from ghost.selection import family
from ghost.step import Parts, StepState, Unit
from ghost.validation import JointValidation, ScoredParts, SeparateValidation, ValData, Validation


@register_engine
class GradDotProdEngine(Engine):
    """`score_i = ⟨∇L_val, g_i⟩` with `Σ_i g_i` the training gradient that the optimizer receives.

    First-order In-Run Data Shapley (Wang et al., ICLR 2025, Theorem 3) up to the learning rate, with the sign
    turned so that positive
    scores help. Usable on its own::

        engine = GradDotProdEngine(model, GhostConfig(val_batch_size=2), (X_val, Y_val))
        engine.attach()
        engine.begin(X, Y, first=True, share=1.0)
        X_fwd, Y_fwd = engine.forward_inputs(X, Y)
        engine.scale_outputs()
        model(input_ids=X_fwd, labels=Y_fwd).loss.backward()
        scores = sum(part.sum(0) for part in engine.collect().values())      # [b, C]

    Raises:
        UnsupportedModelError: A trainable parameter or layer cannot be handled exactly.
        GhostConfigError: Settings, selection or validation data cannot work.
    """

    name = "graddotprod"

    def __init__(
        self, model: nn.Module, config: GhostConfig, val_data: ValData | None = None,
        loss_fn: LossFn | None = None, scaler: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(model, config, val_data, loss_fn, scaler)
        if config.pairwise and isinstance(val_data, Mapping):
            raise GhostConfigError(
                f"pairwise=True scores single validation rows, and val_data has the sets {sorted(val_data)}: "
                "give one (X_val, Y_val), or pairwise=False."
            )
        self.layers: list[Layer] = find_layers(model)
        if not self.layers:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no trainable parameter that could be scored."
            )
        refuse_half(model)
        if config.strict:
            refuse_gaps(model, config)
        self.scored = scored_parts(model, self.layers, config)
        self._parts = {
            (layer.name, key): [(layer.name if part is None else part.label, family(layer)) for part in parts]
            for layer in self.layers
            for key, parts in self.scored[layer.name].items()
        }
        self.state = StepState()
        self.validation: Validation = (
            JointValidation(model, self.state, self.layers, self.scored, config, val_data)
            if config.val_mode is ValMode.CONCAT
            else SeparateValidation(
                model, self.state, self.layers, self.scored, config, val_data, loss_fn, scaler
            )
        )
        self._parameter = next(iter(self.layers[0].params.values()))
        self.score_dtype = config.score_dtype or accumulation_dtype(self._parameter.dtype)
        self._trainable = _trainable(model)
        self._share: float | Tensor = 1.0
        self._attached = False
        self._ask_for_units = True

    @property
    def columns(self) -> tuple[str, ...]:
        return self.validation.columns

    def parts(self) -> dict[tuple[str, str], list[tuple[str, str]]]:
        return self._parts

    def val_rows(self) -> Tensor:
        return self.validation.val_rows()

    def attach(self) -> None:
        if not self._attached:
            self.validation.instrument.attach()
            self._attached = True

    def detach(self) -> None:
        self.abandon()
        self.validation.release()
        self.validation.instrument.detach()
        self._attached = False

    def begin(self, X: Inputs, Y: Tensor, first: bool, share: float | Tensor) -> None:
        if not self._attached:
            raise ProtocolError("the engine is detached: call attach() before a step.")
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
        state = self.state
        state.close()
        self._share = share
        self.validation.begin(Y, first)
        sizes = self.validation.sizes
        state.units, state.tokens = (Unit(rows + sum(sizes), rows, rows, sizes),), token_count(X)
        state.probes = self.validation.instrument.new_probes(self.score_dtype, self._parameter.device)
        state.active = True

    def forward_inputs(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        state = self.state
        X, Y = self.validation.join(X, Y)
        state.tokens = token_count(X)
        state.units = (state.rows, *item_units(state.rows, X))
        if self._ask_for_units and any(unit.size in (1, state.rows.size) for unit in state.units[1:]):
            self._learn_units(X, state.units[1].size)
        return plain(X), Y

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
        self.validation.instrument.units.learn(lambda: self.model(**plain(few)), units)
        self._ask_for_units = False

    def check_loss(self, loss: Tensor) -> None:
        self.validation.instrument.check_parameter_uses(loss)

    def loss_factor(self) -> Tensor | None:
        return self.validation.loss_factor()

    def scale_outputs(self) -> None:
        self.state.loss_unseen, self.state.output_scale = True, self.loss_factor()

    def collect(self) -> LayerScores:
        state = self.state
        if not state.active:
            raise ProtocolError(
                "there is no step to collect scores from: begin() comes first, then forward and backward."
            )
        raw = {key: probe.grad for key, probe in state.probes.items()}
        if unchecked := self.validation.instrument.order.unchecked:
            self.abandon()
            raise ProtocolError(
                f"the layers {sorted(unchecked)} have rows and positions in one axis, whose order is checked "
                f"when the {type(self.model).__name__} itself is called: call the model as a whole."
            )
        waited = state.ledger.scores()
        if all(grad is None for grad in raw.values()) and not waited:
            self.abandon()
            raise ProtocolError(
                "no score was computed: run forward and backward on forward_inputs before collecting."
            )
        if state.output_scale is not None and not state.outputs_scaled:
            self.abandon()
            raise ProtocolError(
                f"the loss did not come from a call of the {type(self.model).__name__} itself, so the "
                "validation rows' weight is still in the gradients: call the model as a whole, or use "
                "manager.step with step.backward(loss)."
            )
        factor = self.validation.score_factor(self._share, self._loss_scale())
        scores = {}
        for key, probe in state.probes.items():
            if key[1] in self.scored[key[0]]:
                found = [part for part in (raw[key], waited.get(key)) if part is not None]
                scores[key] = torch.stack(found).sum(0) * factor if found else probe.detach()
        self.abandon()
        return scores

    def abandon(self) -> None:
        self.state.close()

    def _loss_scale(self) -> Tensor | None:
        """The GradScaler's present factor, as a tensor."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        return self.scaler.scale(torch.ones((), device=self._parameter.device))


def _trainable(model: nn.Module) -> tuple[int, ...]:
    """Which parameters are trained, to notice a change."""
    return tuple(id(p) for p in model.parameters() if p.requires_grad)


def scored_parts(model: nn.Module, layers: list[Layer], config: GhostConfig) -> ScoredParts:
    """What of each layer is scored: its parameters, whole or cut into attention heads.

    Raises:
        GhostConfigError: The selection names something that is not there, or leaves nothing.
    """
    by_head = config.resolution is Resolution.HEAD
    heads = attention_heads(model, layers) if by_head or config.selection.selects_heads else {}
    config.selection.check(layers, heads)
    found: ScoredParts = {}
    for layer in layers:
        found[layer.name] = {}
        for key in layer.params:
            parts: Parts | None = config.selection.parts(layer, key, heads)
            if parts is None:
                own = heads.get((layer.name, key), ()) if by_head else ()
                parts = own or (None,)
            if parts:
                found[layer.name][key] = tuple(parts)
    return found


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
