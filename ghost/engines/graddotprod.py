"""The ghost dot product: every training sample's gradient against the validation gradient, in the backward
that trains the model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ghost.algebra import accumulation_dtype
from ghost.batch import Inputs, check_labels, row_count, token_count
from ghost.config import GhostConfig, ValMode
from ghost.discovery import find_layers, refuse_mixing_layers
from ghost.engines.base import Engine, LayerScores, LossFn, register_engine
from ghost.errors import ProtocolError, UnsupportedModelError
from ghost.instrument import StepState
from ghost.layers import Layer, registered_types
from ghost.validation import JointValidation, SeparateValidation, Validation


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
        scores = sum(engine.collect().values())                   # [b]

    Raises:
        UnsupportedModelError: A trainable parameter or layer cannot be handled exactly.
        GhostConfigError: Settings, selection or validation data cannot work.
    """

    name = "graddotprod"

    def __init__(
        self, model: nn.Module, config: GhostConfig, val_data: tuple[Inputs, Tensor] | None = None,
        loss_fn: LossFn | None = None, scaler: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(model, config, val_data, loss_fn, scaler)
        self.layers: list[Layer] = find_layers(model)
        if not self.layers:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no trainable layer that can be scored: there are rules for "
                f"{', '.join(registered_types())}."
            )
        config.selection.check(self.layers)
        self.validation: Validation = (
            JointValidation(model, self.layers, config, val_data)
            if config.val_mode is ValMode.CONCAT
            else SeparateValidation(model, self.layers, config, val_data, loss_fn, scaler)
        )
        self._parameter = next(iter(self.layers[0].params.values()))
        self.score_dtype = config.score_dtype or accumulation_dtype(self._parameter.dtype)
        self._trainable = _trainable(model)
        self._share: float | Tensor = 1.0
        self._scored = {layer.name for layer in self.layers if config.selection.matches(layer)}
        self._attached = False

    @property
    def state(self) -> StepState:
        """What the swapped forwards read."""
        return self.validation.instrument.state

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
        refuse_mixing_layers(self.model)
        rows = row_count(X, "the training batch")
        check_labels(Y, rows, "the training batch")
        state = self.state
        state.close()
        self._share = share
        val_rows = self.validation.begin(Y, first)
        state.rows, state.train_rows, state.tokens = rows + val_rows, rows, token_count(X)
        state.probes = self.validation.instrument.new_probes(self.score_dtype, self._parameter.device)
        state.active = True

    def forward_inputs(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        X, Y = self.validation.join(X, Y)
        self.state.tokens = token_count(X)
        return X, Y

    def loss_factor(self) -> Tensor | None:
        return self.validation.loss_factor()

    def scale_outputs(self) -> None:
        self.state.output_scale = self.loss_factor()

    def collect(self) -> LayerScores:
        state = self.state
        if not state.active:
            raise ProtocolError(
                "there is no step to collect scores from: begin() comes first, then forward and backward."
            )
        raw = {key: probe.grad for key, probe in state.probes.items()}
        if all(grad is None for grad in raw.values()):
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
        scores = {
            key: state.probes[key].detach() if grad is None else grad * factor
            for key, grad in raw.items()
            if key[0] in self._scored
        }
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
