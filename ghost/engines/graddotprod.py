"""The ghost dot product: every training sample's gradient against the validation gradient, in the backward
that trains the model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghost.batch import Inputs, plain
from ghost.choice import Choices
from ghost.config import GhostConfig, Resolution, ValMode
from ghost.coverage import refuse_gaps
from ghost.distributed import ALONE, Ranks, is_sharded
from ghost.engines.base import LayerScores, LossFn, register_engine
from ghost.engines.tapped import TappedEngine
from ghost.errors import GhostConfigError, ProtocolError, UnsupportedModelError
from ghost.gradients import Algebra
from ghost.heads import attention_heads
from ghost.instrument import Instrument
from ghost.kept import Kept
from ghost.kept_gram import gram_of
from ghost.layers import Layer
from ghost.loss import LossReduction, infer_reduction, row_counts
from ghost.moments import Moments
from ghost.preconditioner import AdamRule, Preconditioner, UpdateRule, update_rule
from ghost.second_order import SecondOrderValidation
from ghost.selection import family
from ghost.step import Parts, Probes
from ghost.update import Update
from ghost.validation import JointValidation, ScoredParts, SeparateValidation, ValData, Validation


@register_engine
class GradDotProdEngine(TappedEngine):
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

    Attributes:
        kept: What is kept of the step's samples until `finish`: with a policy or the Gram matrix the factors
            of all parameters' gradients, which then are in no `.grad`; with `order=2` those that are scored.
        reduction: With a policy, what the loss is a mean of.
        masses: With a policy, each micro-batch's rows' shares of the step's loss, that of all ranks, `[b]`
            float64; ones where the loss is a sum.
    """

    name = "graddotprod"
    takes_policies = True

    def __init__(
        self, model: nn.Module, config: GhostConfig, val_data: ValData | None = None,
        loss_fn: LossFn | None = None, scaler: Any = None, ranks: Ranks = ALONE,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, config, val_data, loss_fn, scaler, ranks, optimizer)
        if config.pairwise and isinstance(val_data, Mapping):
            raise GhostConfigError(
                f"pairwise=True scores single validation rows, and val_data has the sets {sorted(val_data)}: "
                "give one (X_val, Y_val), or pairwise=False."
            )
        if config.strict:
            refuse_gaps(model, config)
        self.scored = scored_parts(model, self.layers, config)
        self._layers = {layer.name: layer for layer in self.layers}
        self._parts = {
            (layer.name, key): [(layer.name if part is None else part.label, family(layer)) for part in parts]
            for layer in self.layers
            for key, parts in self.scored[layer.name].items()
        }
        self._rule = self._update_rule(optimizer)
        self.kept = Kept()
        self.masses: list[Tensor] = []
        self.reduction = self._weighed_reduction()
        self.validation = self._validation(val_data, loss_fn)
        self._moments = self._read_moments()
        self._share: float | Tensor = 1.0
        ranks.refuse_different(self.validation.digest(), "val_data")

    def _weighed_reduction(self) -> LossReduction | None:
        """What the loss is a mean of, where rows are weighed by it."""
        if self.config.policy is None:
            return None
        return self.config.loss_reduction or infer_reduction(self.model, "leave policy out")

    def _update_rule(self, optimizer: torch.optim.Optimizer | None) -> UpdateRule | None:
        """What the optimizer makes of a gradient, where scores are about that."""
        wanted = self.config.preconditioner
        if wanted is Preconditioner.NONE:
            return None
        if optimizer is None:
            raise GhostConfigError(
                f"preconditioner={wanted.value!r} reads an optimizer's state, and there is none: give one, "
                "or set it to 'none'."
            )
        for found, what in (
            (self.ranks.world_size > 1 or is_sharded(self.model), "several ranks or fully_shard"),
            (self.scaler, "a GradScaler"),
        ):
            if found:
                raise GhostConfigError(
                    f"preconditioner={wanted.value!r} does not work with {what}, since the gradient that the "
                    "optimizer will get is not known in the backward: set it to 'none'."
                )
        rule = update_rule(optimizer, wanted, self.config.credit)
        if isinstance(rule, AdamRule) and self.config.algebra is not Algebra.AUTO:
            raise GhostConfigError(
                f"algebra={self.config.algebra.value!r} has no effect with preconditioner={wanted.value!r} "
                "and Adam, whose weights need the samples' gradients tile by tile: leave it at 'auto'."
            )
        return rule

    def _read_moments(self) -> Moments | None:
        if not isinstance(self._rule, AdamRule):
            return None
        taps = self.instrument.taps
        names = {tap.layer.qualified(key): tap.layer.params[key] for tap in taps for key in tap.scored}
        return Moments(self._rule, names, self.config.gradient_accumulation_steps)

    def _validation(self, val_data: ValData | None, loss_fn: LossFn | None) -> Validation:
        what = self.model, self.state, self.layers, self.scored, self.config, val_data
        if self.config.val_mode is ValMode.CONCAT:
            return JointValidation(*what, self.kept, self._rule)
        if self.config.order == 2:
            return SecondOrderValidation(*what, loss_fn, self.scaler, self.kept)
        return SeparateValidation(*what, loss_fn, self.scaler, self.kept, self._rule)

    @property
    def reads_gradients(self) -> bool:
        return self.config.order == 2 or isinstance(self._rule, AdamRule)

    @property
    def instrument(self) -> Instrument:
        return self.validation.instrument

    @property
    def choices(self) -> Choices:
        return self.validation.choices

    @property
    def columns(self) -> tuple[str, ...]:
        return self.validation.columns

    def parts(self) -> dict[tuple[str, str], list[tuple[str, str]]]:
        return self._parts

    def val_rows(self) -> Tensor:
        return self.validation.val_rows()

    def detach(self) -> None:
        self.validation.release()
        super().detach()

    def begin(self, X: Inputs, Y: Tensor, first: bool, share: float | Tensor) -> None:
        rows = self._check_batch(X, Y)
        self.state.close()
        self._share = share
        if first and self._rule is not None:
            self._rule.read_groups()
        self.validation.begin(Y, first)
        moments = {} if self._moments is None else self._moments.begin(first)
        self._open(X, rows, self.validation.sizes, moments)
        if first:
            self._release()
        self.kept.open(self.state.probes)
        if self.reduction is not None:
            self.masses.append(_masses(Y, self.reduction, share))

    def state_dict(self) -> dict[str, Any]:
        own = {} if self._rule is None else {"clip": self._rule.clip}
        return self.validation.state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if ("clip" in state) is not (self._rule is not None):
            raise GhostConfigError(
                f"state is of a manager {'without' if self._rule else 'with'} a preconditioner: go on with "
                "the settings that it was taken from."
            )
        self.validation.load_state_dict(state)
        if self._rule is not None:
            self._rule.clip = state["clip"]

    def note_update(self, update: Update) -> None:
        if self._rule is not None:
            self._rule.note_clip(float(update.clip))

    def _new_probes(self) -> Probes:
        return self.instrument.new_probes(self._dtype, self._device)

    def forward_inputs(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        X, Y = self.validation.join(X, Y)
        self._note_units(X)
        return plain(X), Y

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
        waited = state.ledger.scores() | state.late_scores
        self._check_pass(bool(waited) or any(grad is not None for grad in raw.values()))
        if state.output_scale is not None and not state.outputs_scaled:
            self.abandon()
            raise ProtocolError(
                f"the loss did not come from a call of the {type(self.model).__name__} itself, so the "
                "validation rows' weight is still in the gradients: call the model as a whole, or use "
                "manager.step with step.backward(loss)."
            )
        if state.slope_uses:
            (use, *_), *_ = state.slope_uses.values()
            self.abandon()
            raise UnsupportedModelError(
                f"layer {use.layer.name!r} shares its {use.key} with a use that the backward did not reach, "
                "so the gradient that the optimizer gets is incomplete: set preconditioner='none'."
            )
        factor = self.validation.score_factor(self._share, self.ranks.world_size, self._loss_scale())
        scores = {}
        for key, probe in state.probes.items():
            if key[1] in self.scored[key[0]]:
                found = [part for part in (raw[key], waited.get(key)) if part is not None]
                scores[key] = sum(found[1:], start=found[0]) * factor if found else probe.detach()
                if self._rule is not None:
                    scores[key] = scores[key] * self._rule.factor(self._layers[key[0]].params[key[1]])
        self.state.close()
        return scores

    def gram(self) -> Tensor:
        """`⟨g_i, g_j⟩` of the step's samples so far, `[B, B]`, over all that is scored; before `finish`.

        With factors kept for a policy or `gram=True` alone, and of one process.
        """
        scale = self._loss_scale()
        found = gram_of(self.kept, self.config.chunk_mb << 20)
        return found if scale is None else found / (scale * scale)

    def curvatures(self, rates: Mapping[int, float]) -> list[LayerScores]:
        """What `finish` returns, of the gradient that is in `.grad` now."""
        if not isinstance(self.validation, SecondOrderValidation):
            return []
        factor = self.validation.score_factor(1.0, self.ranks.world_size, None)
        curvatures = self.kept.scores(self.validation.hessian_product(rates))
        return [{key: found * factor for key, found in part.items()} for part in curvatures]

    def finish(self, rates: Mapping[int, float]) -> list[LayerScores]:
        found = self.curvatures(rates)
        self._release()
        self._release_moments()
        return found

    def abandon(self) -> None:
        super().abandon()
        self._release()
        self._release_moments()

    def _release(self) -> None:
        self.kept.clear()
        self.masses = []

    def _release_moments(self) -> None:
        if self._moments is not None:
            self._moments.release()


def _masses(Y: Tensor, reduction: LossReduction, share: float | Tensor) -> Tensor:
    """The rows' shares of the step's loss, `[b]` float64."""
    counts = row_counts(Y, reduction).double()
    if reduction is LossReduction.SUM:
        return counts  # ones
    return counts * share / counts.sum().clamp(min=1.0)


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
