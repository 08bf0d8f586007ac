"""A policy in a step: asks it for weights, and puts the gradient of the batch so weighed into `.grad`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghost.discovery import uncovered_parameters
from ghost.distributed import is_sharded
from ghost.engines.graddotprod import GradDotProdEngine
from ghost.errors import GhostConfigError, ProtocolError, UnsupportedModelError, shown
from ghost.loss import LossReduction
from ghost.policies.base import Policy, StepSamples
from ghost.rows import Step, together

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What has become of a step.

    Attributes:
        weights: w of this rank's samples, `[B]` float64: how often each one's part of the step's gradient is
            in `.grad`; None without a policy.
        gram: `⟨g_i, g_j⟩`, `[B, B]`, where it was asked for.
    """

    weights: Tensor | None
    gram: Tensor | None


class Reweighting:
    """Weighs the steps of an engine that has kept their samples' factors.

    Args:
        engine: Whose taps give parameters no gradients (`config.defers`).

    Raises:
        GhostConfigError, UnsupportedModelError: The gradient of a reweighted batch cannot be had exactly.
    """

    def __init__(self, engine: GradDotProdEngine) -> None:
        self._engine, self._config, self._ranks = engine, engine.config, engine.ranks
        self._policy = engine.config.policy
        self._wants_gram = self._config.gram or (self._policy is not None and self._policy.needs_gram)
        self._trained = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
        self._has_skipped = False
        self._refuse()

    def _refuse(self) -> None:
        what = self._config.deferred_by
        if is_sharded(self._engine.model):
            raise GhostConfigError(
                f"{what} forms each parameter's gradient at the end of the step, where fully_shard (FSDP2) "
                "has no whole parameters: use DistributedDataParallel."
            )
        if self._wants_gram and self._ranks.world_size > 1:
            raise GhostConfigError(
                f"{what} needs the inner products of all samples of a step, whose factors are on "
                f"{self._ranks.world_size} ranks: train in one process, or choose a policy that reads scores "
                "alone."
            )
        if missing := uncovered_parameters(self._engine.model, self._engine.layers):
            raise UnsupportedModelError(
                f"{what} cannot weigh the samples' parts of {missing[0]}, which no layer accounts for: "
                "freeze it, or register a rule with ghost.register_layer."
            )
        for name, p in self._trained.items():
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise UnsupportedModelError(
                    f"{name} has a hook on its gradient, which {what} would pass by: read .grad after the "
                    "step's last backward instead."
                )

    def __call__(self, step: Step, rates: Mapping[int, float]) -> Decision:
        """Decide on a step whose last backward is done, and fill `.grad`.

        Args:
            rates: Learning rates of the parameters that the optimizer has, by `id`.
        """
        gram = self._engine.gram() if self._wants_gram else None
        if self._policy is None:
            self._add_gradients(None, step)
            return Decision(None, gram)
        samples, masses, mine = self._samples(self._policy, step, rates, gram)
        if not bool(samples.scores.isfinite().all()):
            log.warning(
                "step %d has scores that are not finite, so policy %s is not asked: it is an ordinary step.",
                samples.iteration, self._policy.name,
            )  # fmt: skip
            self._add_gradients(None, step)
            return Decision(torch.ones_like(masses[mine]), gram)
        weights = self._weights(self._policy, samples, masses)
        if weights is None:
            self._skip(self._policy, step.iteration)
            return Decision(torch.zeros_like(masses[mine]), gram)
        self._add_gradients(weights[mine], step)
        return Decision(weights[mine], gram)

    def _samples(
        self, policy: Policy, step: Step, rates: Mapping[int, float], gram: Tensor | None
    ) -> tuple[StepSamples, Tensor, slice]:
        """What is known of all samples, their shares of the loss `[B]`, and which are this rank's."""
        own = {
            "scores": _totals(step.scores), "indices": step.sample(), "masses": torch.cat(self._engine.masses)
        }  # fmt: skip
        if policy.needs_curvatures and self._config.order == 2:
            own["curvatures"] = self._curvatures(step, rates)
        whole, mine = self._ranks.all_rows(own)
        samples = StepSamples(
            _plain(whole["scores"]), whole["indices"], step.iteration, max(rates.values(), default=0.0), gram,
            _plain(whole["curvatures"]) if "curvatures" in whole else None,
        )  # fmt: skip
        return samples, whole["masses"], mine

    def _curvatures(self, step: Step, rates: Mapping[int, float]) -> Tensor:
        """Of the whole batch: those of the step that is taken are not known before it is decided on."""
        before = [p.grad for p in self._trained.values()]
        for p in self._trained.values():
            p.grad = None
        self._add_gradients(None, step)
        found = self._engine.curvatures(rates)
        for p, grad in zip(self._trained.values(), before, strict=True):
            p.grad = grad
        return _totals(found)

    def _weights(self, policy: Policy, samples: StepSamples, masses: Tensor) -> Tensor | None:
        """w of all samples, `[B]` float64; None where nothing is left of the batch.

        The policy is told of those alone that have a part in the loss: a row without a label that counts has
        a score of zero, which would take the place of a sample with less.
        """
        counted = masses != 0
        weights = torch.zeros_like(masses)
        if bool(counted.any()):
            given = policy.weigh(_only(samples, counted))
            _check(policy, given, int(counted.sum()))
            weights[counted] = given.detach().to(masses)
        self._ranks.refuse_other_weights(weights)
        left = (weights * masses).sum()
        if not bool(left > 0):
            return None
        if self._engine.reduction is LossReduction.SUM:
            return weights
        return weights * (masses.sum() / left)

    def _skip(self, policy: Policy, iteration: int) -> None:
        if self._engine.scaler is not None:
            raise ProtocolError(
                f"policy {policy.name!r} kept no sample of step {iteration}, and a GradScaler takes no "
                "step without gradients: train in bfloat16 or float32, or use a policy that keeps one."
            )
        level = logging.INFO if self._has_skipped else logging.WARNING
        self._has_skipped = True
        log.log(
            level,
            "step %d: policy %s kept no sample, so the batch adds nothing to .grad and is credited nothing.",
            iteration, policy.name,
        )  # fmt: skip

    def _add_gradients(self, weights: Tensor | None, step: Step) -> None:
        """Add `Σ_i w_i g_i` over all ranks' samples to `.grad`, with this rank's w `[B]`; None for ones."""
        parts = None
        if weights is not None:
            device = next(iter(self._trained.values())).device
            parts = weights.to(device).split([len(samples) for samples in step.samples])
        sums = self._engine.kept.weighted_sums(parts)
        params = list(self._trained.values())
        for p, total in zip(params, self._averaged(params, sums), strict=True):
            if total is not None:
                p.grad = _laid_out_as(p, total) if p.grad is None else p.grad.add_(total)  # where it is kept

    def _averaged(self, params: Sequence[nn.Parameter], sums: Mapping[int, Tensor]) -> list[Tensor | None]:
        """The sums, averaged over ranks as DistributedDataParallel averages gradients: in one go for each
        dtype.
        """
        if self._ranks.world_size == 1:
            return [sums.get(id(p)) for p in params]
        group = self._ranks.group
        used = torch.tensor([id(p) in sums for p in params], device=params[0].device, dtype=torch.int32)
        dist.all_reduce(used, group=group)
        found: dict[int, Tensor] = {}
        for dtype in {p.dtype: None for p in params}:
            own = [p for p, n in zip(params, used.tolist(), strict=True) if n and p.dtype == dtype]
            if not own:
                continue
            flat = torch.cat([sums.get(id(p), torch.zeros_like(p)).flatten() for p in own])
            dist.all_reduce(flat, group=group)
            flat /= self._ranks.world_size
            pieces = flat.split([p.numel() for p in own])
            found |= {id(p): piece.view_as(p) for p, piece in zip(own, pieces, strict=True)}
        return [found.get(id(p)) for p in params]


def _laid_out_as(p: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the parameter's strides, as autograd leaves it: fused optimizers walk through both by
    their place in memory.
    """
    return gradient if gradient.stride() == p.stride() else torch.empty_like(p).copy_(gradient)


def _check(policy: Policy, weights: object, samples: int) -> None:
    """Raise `ProtocolError` unless a policy gave weights `[samples]`, finite and not negative."""
    if not isinstance(weights, Tensor) or weights.shape != (samples,):
        found = list(weights.shape) if isinstance(weights, Tensor) else shown(weights)
        raise ProtocolError(
            f"policy {policy.name!r} gave {found} for a step of {samples} samples: it should give a tensor "
            f"of weights [{samples}]."
        )
    wrong = weights[~(weights.isfinite() & (weights >= 0))]
    if len(wrong):
        raise ProtocolError(
            f"policy {policy.name!r} gave the weight {float(wrong[0])}: weights should be finite and not "
            "negative."
        )


def _only(samples: StepSamples, counted: Tensor) -> StepSamples:
    """What is known of the samples in a mask `[B]`."""
    if bool(counted.all()):
        return samples
    counted = counted.cpu()  # indices are in the host's memory, and a mask from there selects anywhere
    gram, curvatures = samples.gram, samples.curvatures
    return replace(
        samples,
        scores=samples.scores[counted],
        indices=samples.indices[counted],
        gram=None if gram is None else gram[counted][:, counted],
        curvatures=None if curvatures is None else curvatures[counted],
    )


def _totals(micro_batches: Sequence[Mapping[tuple[str, str], Tensor]]) -> Tensor:
    """Scores `[B, C]` over all parts of the model."""
    return torch.cat(list(together([dict(part) for part in micro_batches]).values())).sum(0)


def _plain(scores: Tensor) -> Tensor:
    """`[B]` where there is one column."""
    return scores[:, 0] if scores.shape[1] == 1 else scores
