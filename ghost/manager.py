"""The manager: what a training loop calls. It knows steps, sample ids and learning rates; the engine knows
gradients.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghost.batch import Inputs, row_count, sample_indices
from ghost.choice import Choices
from ghost.config import GhostConfig, Resolution, convert
from ghost.distributed import ALONE, ddp_wrapper, ranks_of, unwrap
from ghost.engines import Engine, GradDotProdEngine, LayerScores, LossFn, engine_class
from ghost.errors import BatchError, GhostConfigError, ProtocolError, shown
from ghost.policies import Policy, policy_of
from ghost.policies.base import WeightFunction
from ghost.policies.reweighting import Reweighting
from ghost.rows import Step, StepRows, together
from ghost.scores import ScoreLog
from ghost.second_order import refuse_gradients_left
from ghost.update import UpdateObserver

log = logging.getLogger(__name__)


class ScoredStep:
    """One micro-batch between `manager.step`'s entry and exit.

    Attributes:
        X, Y: What goes through the model: inputs and labels, with the validation rows where they join the
            batch.
        inputs: Both as keyword arguments of a Hugging Face model.
        done: Whether `backward` has run.
    """

    def __init__(self, manager: "GhostEngineManager", X: Inputs, Y: Tensor) -> None:
        self._manager, self.X, self.Y, self.done = manager, X, Y, False
        self._scores: Tensor | None = None
        self.inputs: dict[str, Any] = {**({"input_ids": X} if isinstance(X, Tensor) else X), "labels": Y}

    def backward(self, loss: Tensor) -> None:
        """Back-propagate `loss`, the model's own loss over `inputs`, weighed and scaled as it must be."""
        self._manager.backward(loss)
        self.done = True

    @property
    def scores(self) -> Tensor:
        """Scores of the step's samples up to this micro-batch, `[B]`; known after the with-block."""
        if self._scores is None:
            raise ProtocolError("no scores are known yet: they are after the with-block.")
        return self._scores

    def close(self) -> None:
        """Keep the scores, whatever the manager goes on to."""
        self._scores = self._manager.scores


class GhostEngineManager:
    """Scores the training samples of anyone's loop.

    Args:
        config: Settings, as `GhostConfig` or any mapping or object with its field names (GhostSuite's are
            accepted).
        model: The model as the loop calls it: plain, in DistributedDataParallel, under `fully_shard`,
            compiled or not.
        optimizer: Its optimizer, observed for learning rates, clipping and skipped steps; None for a loop
            that trains nothing (`engine="gradprojlora"`).
        ddp_info: GhostSuite's description of the processes, for loops that average gradients by themselves:
            a mapping or object with `ddp`. Otherwise the model tells.
        val_data: `(X_val, Y_val)`, tensors or dicts of tensors with a row per sample; or several validation
            sets by name, `{"code": (X, Y), …}`, each with a column of the scores. The same on every rank.
        loss_fn: `loss_fn(model, X, Y)`, the loss of a validation batch for `val_mode='separate'`; by default
            `model(**inputs, labels=Y).loss`. Under autocast it should enter autocast itself.
        scaler: The loop's `torch.amp.GradScaler`, if it has one.
        state: `state_dict()` of a manager of the same run, to go on behind it; score shards that were written
            later are deleted. The loop brings back model, optimizer and random state itself.
        policy: Which of a step's samples its gradient is of, in place of `config.policy`: a function from
            `ghost.policies.StepSamples` to weights `[B]`, a policy, or what `config.policy` can be.

    Raises:
        GhostConfigError, UnsupportedModelError: Before anything is changed.
    """

    def __init__(
        self, config: Any, model: nn.Module, optimizer: torch.optim.Optimizer | None, ddp_info: Any = None,
        val_data: Any = None, loss_fn: LossFn | None = None, scaler: Any = None,
        state: Mapping[str, Any] | None = None,
        policy: str | Mapping[str, Any] | Policy | WeightFunction | None = None,
    ) -> None:  # fmt: skip
        self.config = GhostConfig.read(config)
        if policy is not None:
            self.config = replace(self.config, policy=policy_of(policy))
        kind = engine_class(self.config.engine)
        idle = optimizer is None and not kind.needs_optimizer
        if not isinstance(model, nn.Module) or not (idle or isinstance(optimizer, torch.optim.Optimizer)):
            raise GhostConfigError(
                f"model and optimizer are a {type(model).__name__} and a {type(optimizer).__name__}: give an "
                "nn.Module and its torch.optim.Optimizer."
            )
        if self.config.weight_grads is False and kind.needs_optimizer:
            raise GhostConfigError(
                f"weight_grads=False has no effect with engine={self.config.engine!r}, which fills .grad in "
                "any case: leave it out."
            )
        if self.config.defers and not kind.takes_policies:
            raise GhostConfigError(
                f"engine={self.config.engine!r} has no scores by which a step's samples could be weighed: "
                "set engine='graddotprod', or leave policy and gram out."
            )
        if self.config.weight_grads is None:
            self.config = replace(self.config, weight_grads=optimizer is not None)
        in_step = kind.step_wide or bool(self.config.weight_grads)
        self._ranks = ranks_of(model, ddp_info) if in_step else ALONE
        self._ddp = ddp_wrapper(model)
        self._ddp_hooks: list[RemovableHandle] = []
        self._averaging: bool | None = None  # what the wrapper's forward would do, while a policy forbids it
        self.model = unwrap(model)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.engine: Engine = kind(
            self.model, self.config, val_data, loss_fn, self._scaler, self._ranks, optimizer
        )  # fmt: skip
        self._reweighting: Reweighting | None = None
        if self.config.defers:
            assert isinstance(self.engine, GradDotProdEngine), "it is the one kind that takes policies"
            self._reweighting = Reweighting(self.engine)
        if state is not None:
            self.engine.load_state_dict(state["engine"])
        self._log = self._score_log(None if state is None else state["shards"])
        # Where nothing is trained, an optimizer that never steps stands in.
        self._observer = UpdateObserver(
            optimizer or torch.optim.SGD(self.model.parameters(), lr=0.0),
            self.model,
            self._refuse_early_step,
        )
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._rows = StepRows(self.engine, self.config, self._parameters, self._observer)
        self._refuse_unknown_averaging()
        self._step: Step | None = None
        self._before: dict[str, Any] = {}  # the engine's state at the beginning of the step
        self._micro_batch_open = False
        self._wrapper_called = False
        self._complete = False
        self._closed = False
        self.is_active = False
        self.reattach_after_evaluation()

    def _score_log(self, written: int | None) -> ScoreLog | None:
        """Where rows go; behind so many shards of the run's."""
        if self.config.result_dir is None:
            return None
        return ScoreLog(
            Path(self.config.result_dir) / "scores", self.config.storage_dtype, written,
            self._ranks.rank, self._ranks.world_size,
        )  # fmt: skip

    def _refuse_unknown_averaging(self) -> None:
        late = "order=2" if self.config.order == 2 else "a policy" if self.config.defers else ""
        if late and self._ranks.world_size > 1 and self._ddp is None:
            raise GhostConfigError(
                f"{late} needs the averaged training gradient when the last backward is done, and "
                "ddp_info={'ddp': True} does not say when a loop averages: give the manager the model in "
                "DistributedDataParallel."
            )

    def _refuse_early_step(self) -> None:
        """Before a step's end its samples' scores are not known, nor with a policy what `.grad` is."""
        if self._step is not None and not self._complete:
            known = (
                "scores are known" if self._reweighting is None else f"{self.config.deferred_by} fills .grad"
            )
            raise ProtocolError(
                f"optimizer.step() came before the end of step {self._step.iteration}, where {known}: call "
                "it after the with-block of the last micro-batch, or after prepare_gradients()."
            )

    def attach_train_batch(
        self, X: Inputs, Y: Tensor, iteration: int, batch_idx: Sequence[int] | Tensor,
        share: float | Tensor | None = None,
    ) -> None:  # fmt: skip
        """Before a training micro-batch's forward.

        Args:
            X, Y: Inputs and labels of the training rows.
            iteration: The optimizer step; micro-batches of one step have the same.
            batch_idx: Running indices of the rows, `[b]` integers.
            share: The factor on this micro-batch's loss in the step's loss, that of all ranks' micro-batches;
                by default `1 / (gradient_accumulation_steps * world_size)`.
        """
        if not self.is_active:
            raise ProtocolError("the manager is detached: call reattach_after_evaluation() before a step.")
        if self._complete:
            self._finish_step()
        elif self._micro_batch_open:
            self._close_micro_batch()
        if self._step is None:
            self._before = self.engine.state_dict()
            if self.engine.reads_gradients:
                groups = self._observer.groups()
                refuse_gradients_left({n: p for n, p in self._parameters.items() if id(p) in groups})
        if self._step is not None and self._step.iteration != iteration:
            raise ProtocolError(
                f"step {self._step.iteration} is still open at iteration {iteration}: call "
                "prepare_gradients() after its last backward, or drop_step() where that failed."
            )
        if type(iteration) is not int:
            raise BatchError(f"iteration={shown(iteration)} should be a whole number, the optimizer step.")
        if share is not None and not _is_number(share):
            raise BatchError(
                f"share={shown(share)} should be a number, this micro-batch's share of the step's loss."
            )
        sample = sample_indices(batch_idx, row_count(X, "the training batch"))
        steps = self.config.gradient_accumulation_steps
        if share is None and self._step is not None and len(self._step.samples) == steps:
            raise ProtocolError(
                f"step {iteration} has more micro-batches than gradient_accumulation_steps={steps}: set it "
                "to their number, or give each micro-batch its share."
            )
        self._share = 1.0 / (steps * self._ranks.world_size) if share is None else share
        self.engine.begin(X, Y, self._step is None, self._share)
        self._wrapper_called = False
        self._step = self._step or Step(iteration)
        self._step.samples.append(sample)
        self._micro_batch_open = True

    def prepare_forward_input(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        """What goes through the model in place of `(X, Y)`; the loop calls `loss.backward()` on the model's
        loss over it.
        """
        self._need_open_micro_batch("prepare_forward_input")
        self.engine.scale_outputs()
        return self.engine.forward_inputs(X, Y)

    def prepare_gradients(self) -> None:
        """After the step's last backward: `.grad` is the training gradient alone, and `scores` are known."""
        if self._micro_batch_open:
            self._close_micro_batch()
        if self._step is None:
            raise ProtocolError("there is no step to prepare gradients for: call attach_train_batch() first.")
        scale = None
        if self._scaler is not None:
            scale = self._scaler.scale(torch.ones((), device=next(self.model.parameters()).device))
        if not self._complete:
            self._finish_scores()
        self._observer.expect(scale)
        self._complete = True

    @contextmanager
    def step(
        self, X: Inputs, Y: Tensor, *, batch_idx: Sequence[int] | Tensor, iteration: int,
        share: float | Tensor | None = None, last: bool = True,
    ) -> Iterator[ScoredStep]:  # fmt: skip
        """One micro-batch: forward and `step.backward(loss)` go inside, `optimizer.step()` comes after.

        Args:
            X, Y, batch_idx, iteration, share: As for `attach_train_batch`.
            last: Whether this is the step's last micro-batch.
        """
        with self._dropped_where_it_fails():
            self.attach_train_batch(X, Y, iteration, batch_idx, share)
            scored = ScoredStep(self, *self.engine.forward_inputs(X, Y))
            yield scored
            if not scored.done:
                raise ProtocolError(
                    "the step ended without step.backward(loss): loss.backward() alone would leave the "
                    "validation rows' weight in the gradient."
                )
            self._close_micro_batch()
        scored.close()
        if last:
            self.prepare_gradients()

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the model's own loss over the forward inputs, weighed and scaled as the step needs
        it.
        """
        self._need_open_micro_batch("backward")
        if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.requires_grad:
            raise ProtocolError(
                "step.backward(loss) needs the model's own loss, a tensor of one number with a gradient, not "
                f"{type(loss).__name__}{list(loss.shape) if isinstance(loss, Tensor) else ''}."
            )
        self.engine.check_loss(loss)
        factor = self.engine.loss_factor()
        share = self._share * self._ranks.world_size
        weight = share if factor is None else factor * share
        if isinstance(weight, Tensor) or weight != 1.0:
            loss = loss * weight
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        loss.backward()

    @property
    def scores(self) -> Tensor:
        """Scores of the latest step's samples in the order in which they were attached: `[B]`, or with a
        column for each validation sample (`pairwise`) or validation set, `[B, C]`; empty without scoring.
        """
        return self._total(self._by_parameter())

    @property
    def curvatures(self) -> Tensor:
        """`⟨g_i, H Σ_j g_j⟩` of the latest step's samples, `[B]` or `[B, C]` as `scores`: with `order=2`,
        after `prepare_gradients`. A sample's value is `η c · score − (η c)²/2 · curvature`.
        """
        return self._total(self._curvatures_by_parameter())

    @property
    def weights(self) -> Tensor:
        """How often each of the latest step's samples is in `.grad`, `Σ_i w_i g_i`, `[B]` float64: 1 for all
        in an ordinary step, 0 for what a policy has dropped (`ghost.policies`) and for rows that have no part
        in the loss.
        """
        if self._step is None or self._step.weights is None:
            raise ProtocolError(
                "no weights are known: they need a policy, and are there after prepare_gradients()."
            )
        return self._step.weights

    @property
    def gram(self) -> Tensor:
        """`⟨g_i, g_j⟩` of the latest step's samples over all that is scored, `[B, B]`: with `gram=True`, or a
        policy that reads it, after `prepare_gradients`. `g_i` is sample i's part of the step's gradient as in
        `scores`, whatever its weight.
        """
        if self._step is None or self._step.gram is None:
            raise ProtocolError(
                "no Gram matrix is known: it needs gram=True, and is there after prepare_gradients()."
            )
        return self._step.gram

    def _total(self, by_parameter: LayerScores) -> Tensor:
        parts = list(by_parameter.values())
        return self._plain(torch.cat(parts).sum(0)) if parts else torch.zeros(0)

    @property
    def algebra(self) -> Choices:
        """Which algebra the latest backward took for each matrix, by qualified parameter name in `found`; as
        text, in one line.
        """
        return self.engine.choices

    @property
    def scores_by_layer(self) -> dict[str, Tensor]:
        """`scores` by layer name; they sum to `scores`."""
        return self.scores_by(Resolution.LAYER)

    def scores_by(self, resolution: Resolution | str) -> dict[str, Tensor]:
        """`scores` by layer, by family or by attention head (what belongs to no head stands under its layer's
        name); whatever the resolution, they sum to `scores`.

        Raises:
            GhostConfigError: Heads were not told apart in the backward, since the manager's `resolution` is
                another.
        """
        return self._by(self._by_parameter(), resolution)

    def curvatures_by(self, resolution: Resolution | str) -> dict[str, Tensor]:
        """`curvatures` in the same way."""
        return self._by(self._curvatures_by_parameter(), resolution)

    def _by(self, by_parameter: LayerScores, resolution: Resolution | str) -> dict[str, Tensor]:
        wanted: Resolution = convert("resolution", resolution)
        if wanted is Resolution.HEAD and self.config.resolution is not Resolution.HEAD:
            raise GhostConfigError(
                f"resolution={self.config.resolution.value!r} does not tell heads apart: set it to 'head'."
            )
        found: dict[str, Tensor] = {}
        for label, _, part in self._rows.labelled(by_parameter, wanted):
            found[label] = found[label] + part if label in found else part
        return {label: self._plain(part) for label, part in found.items()}

    def _plain(self, scores: Tensor) -> Tensor:
        """`[B, C]`, or `[B]` where there is one column that nobody asked to be a column."""
        return scores if self.config.pairwise or self.engine.columns != ("",) else scores[:, 0]

    def drop_step(self) -> None:
        """Forget the step, in place of `optimizer.step()` or where it failed, as if it had not begun.

        Raises:
            ProtocolError: No step has begun, or the optimizer has taken it.
        """
        if self._step is not None and not self._complete:
            self._abandon_step()
            return
        if not self._complete or self._observer.take() is not None:
            raise ProtocolError(
                "drop_step() comes in place of optimizer.step(), and there is no step to drop: none has "
                "begun, or the optimizer has taken it."
            )
        self._step, self._complete = None, False
        self.engine.load_state_dict(self._before)

    def aggregate_and_log(self) -> None:
        """After `optimizer.step()`: the step's rows are ready to be written."""
        if not self._complete:
            raise ProtocolError("aggregate_and_log() comes after prepare_gradients() and optimizer.step().")

    def clear_gradients(self) -> None:
        """For GhostSuite's loops: nothing is kept on parameters."""

    def should_save_metrics(self, iteration: int) -> bool:
        """Whether a score shard is due after this step."""
        return (iteration + 1) % self.config.save_interval == 0

    def save_metrics(self, iteration: int) -> None:
        """Write a score shard with all steps that are done; a step whose `optimizer.step()` is still to come
        is not.
        """
        del iteration
        if self._complete and self._observer.take() is not None:
            self._write_rows()
        if self._log is not None:
            self._log.flush()

    def state_dict(self) -> dict[str, Any]:
        """What a manager that goes on with this run needs, as plain values and tensors: the place in the
        validation rows or the validation gradient in use, and the number of score shards.

        To be taken between two steps, after `optimizer.step()`: the rows of all steps are written first, and
        a step that the optimizer has not taken by now counts as skipped.

        Raises:
            ProtocolError: A step is in progress.
        """
        if self._step is not None and not self._complete:
            raise ProtocolError(
                f"state_dict() is taken between two steps, and step {self._step.iteration} is open: call "
                "prepare_gradients() and optimizer.step() first."
            )
        self._write_rows()
        if self._log is not None:
            self._log.flush()
        return {"engine": self.engine.state_dict(), "shards": 0 if self._log is None else self._log.written}

    def _finish_step(self) -> None:
        """Log the step, with what the optimizer made of it, and make way for the next."""
        self._write_rows()
        if (
            self._step is not None
            and self._log is not None
            and self.should_save_metrics(self._step.iteration)
        ):
            self._log.flush()
        self._step, self._complete = None, False

    def _write_rows(self) -> None:
        """Hand the step's rows to the log, once."""
        step = self._step
        if step is None or not step.samples:
            return
        update = self._observer.take()
        if update is not None:
            self.engine.note_update(update)
        try:
            if self._log is not None and step.scores[0]:
                self._rows.append(self._log, step)
        finally:
            step.samples = []  # a step that is refused is refused once

    def detach_for_evaluation(self) -> None:
        """Leave the model as it was before the manager came; a micro-batch in progress is dropped."""
        if self._micro_batch_open:
            self._abandon_step()
        elif self._step is not None and self._step.samples and not self._complete:
            log.warning(
                "step %d is left unfinished: its %d samples are not scored.",
                self._step.iteration, len(self._step.sample()),
            )  # fmt: skip
            self._step = None
        self.engine.detach()
        for hook in self._ddp_hooks:
            hook.remove()
        if not self._complete or self._observer.take() is not None:
            self._before = {}  # there is no step that could be taken again
        self.is_active = False

    def reattach_after_evaluation(self) -> None:
        """Make the model ready for scoring again."""
        if self._closed:
            raise ProtocolError("the manager has been cleaned up: make a new one.")
        self.engine.attach()
        if self._ddp is not None and not self.is_active:
            self._ddp_hooks = [
                self._ddp.register_forward_pre_hook(self._note_wrapper),
                self._ddp.register_forward_hook(self._leave_wrapper, always_call=True),
            ]
        self.is_active = True

    def cleanup(self) -> None:
        """Write what is pending and detach; a second call writes what the first could not."""
        try:
            if self._complete:
                self._write_rows()
            if self._log is not None:
                self._log.flush()
        finally:
            if not self._closed:
                self._closed = True
                self._observer.close()
                self.detach_for_evaluation()
                self.engine.close()
                self._before = {}

    def _note_wrapper(self, *_: Any) -> None:
        self._wrapper_called = True
        if self._reweighting is not None and self._micro_batch_open and self._ddp is not None:
            # The forward arms the averaging in the backward, which the weights are not known in.
            self._averaging = self._ddp.require_backward_grad_sync
            self._ddp.require_backward_grad_sync = False

    def _leave_wrapper(self, *_: Any) -> None:
        if self._averaging is not None and self._ddp is not None:
            self._ddp.require_backward_grad_sync, self._averaging = self._averaging, None

    def _by_parameter(self) -> LayerScores:
        if self._step is None or not self._step.scores:
            raise ProtocolError(
                "no scores are known yet: they are after the backward and prepare_gradients()."
            )
        return together(self._step.scores)

    def _curvatures_by_parameter(self) -> LayerScores:
        if self._step is None or not self._step.curvatures:
            raise ProtocolError(
                "no curvatures are known: they need order=2, and are there after prepare_gradients()."
            )
        return together(self._step.curvatures)

    def _close_micro_batch(self) -> None:
        assert self._step is not None
        step, self._step, self._micro_batch_open = self._step, None, False
        with self._dropped_where_it_fails():
            if self._ddp is not None and not self._wrapper_called:
                raise ProtocolError(
                    "the forward went past DistributedDataParallel, so gradients are of one rank alone: call "
                    "the wrapped model."
                )
            step.scores.append(self.engine.collect())
            self.engine.keep(step.samples[-1])
        self._step = step

    def _finish_scores(self) -> None:
        """What the engine scores once the step's whole gradient is known."""
        assert self._step is not None
        step, self._step = self._step, None
        with self._dropped_where_it_fails():
            step.rates = self._observer.rates()
            lr = step.rates.tolist()
            by_parameter = {key: lr[group] for key, group in self._observer.groups().items()}
            if self._reweighting is not None:
                decision = self._reweighting(step, by_parameter)
                step.weights, step.gram = decision.weights, decision.gram
            step.curvatures = self.engine.finish(by_parameter)
        self._step = step

    @contextmanager
    def _dropped_where_it_fails(self) -> Iterator[None]:
        """Forget the step in progress where the block raises."""
        finished = False
        try:
            yield
            finished = True
        finally:
            if not finished:
                self._abandon_step()

    def _abandon_step(self) -> None:
        """Forget the step in progress; one that is complete stays, to be logged."""
        self.engine.abandon()
        self._micro_batch_open = False
        if not self._complete:
            self._step = None
            if self._before:  # it leaves no trace: the step can be taken again
                self.engine.load_state_dict(self._before)

    def _need_open_micro_batch(self, call: str) -> None:
        if not self._micro_batch_open:
            raise ProtocolError(f"{call}() needs a training batch: call attach_train_batch() first.")


def _is_number(share: Any) -> bool:
    if isinstance(share, Tensor):
        return share.numel() == 1
    return isinstance(share, int | float) and math.isfinite(share)
