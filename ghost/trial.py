"""A scored step that is taken to be checked: what it is taken on, and what the engine makes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ghost.batch import Inputs, plain, take_rows
from ghost.config import GhostConfig, Resolution
from ghost.engines import LossFn
from ghost.errors import BatchError, GhostConfigError
from ghost.loss import LossReduction, count
from ghost.manager import GhostEngineManager
from ghost.plain import Rows, Weighed
from ghost.verification import Deviation

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ScoredStep:
    """What a scored step gives.

    Attributes:
        total, by_layer: Scores `[B, C]`, and with `order=2` the curvatures in C more columns.
        grads: Training gradients by the parameter's `id`, without the loss scale.
        forward: The scored forward's loss against the plain one's, without a tolerance.
        scale: The loss scale.
    """

    total: Tensor
    by_layer: Mapping[str, Tensor]
    grads: Mapping[int, Tensor]
    forward: Deviation
    scale: float

    def is_finite(self) -> bool:
        """Whether all scores and gradients are numbers."""
        return all(bool(t.isfinite().all()) for t in (self.total, *self.grads.values()))


@dataclass(frozen=True)
class TrialStep:
    """The step to be checked.

    Attributes:
        called: The model as the loop calls it, compiled maybe.
        model: The model itself.
        reduction: What the loss is a mean of, which says how much each row's own loss weighs in it.
        train: Training rows.
        val: Validation rows of each set, by its name; '' for one without.
    """

    called: nn.Module
    model: nn.Module
    config: GhostConfig
    reduction: LossReduction
    loss_fn: LossFn
    train: Rows
    val: Mapping[str, Rows]

    def loss(self, X: Inputs, Y: Tensor) -> Tensor:
        """The mean loss of the model itself."""
        return self.loss_fn(self.model, plain(X), Y)

    def weights(self) -> list[float]:
        """Each training row's share of the step's loss."""
        return _shares(self.train[1].split(1), self.reduction)

    def columns(self) -> list[Weighed]:
        """What each column of the scores is about: a validation set, or a row of it (`pairwise`)."""
        if not self.config.pairwise:
            return [(1.0, rows) for rows in self.val.values()]
        ((X, Y),) = self.val.values()
        rows = [(take_rows(X, slice(i, i + 1)), Y[i : i + 1]) for i in range(len(Y))]
        return list(zip(_shares(Y.split(1), self.reduction), rows, strict=True))

    def make_repeatable(self) -> list[str]:
        """Put the model in evaluation mode if it draws random numbers in training mode; says so."""
        if self._repeats():
            return []
        self.model.eval()
        if self._repeats():
            return ["The loss is random in training mode (dropout), so evaluation mode was checked."]
        raise GhostConfigError(
            "the loss is random even in evaluation mode, so no two passes agree: take the randomness out of "
            "the model or of loss_fn for the check."
        )

    @torch.no_grad()
    def _repeats(self) -> bool:
        once, again = (self.loss(*self.train).nan_to_num() for _ in range(2))
        return torch.equal(once, again)

    def coarsest_dtype(self) -> torch.dtype:
        """The dtype with the fewest digits that the loss passes through."""
        weights = {p.dtype for p in self.model.parameters() if p.requires_grad}
        with _Dtypes() as dtypes:
            self.loss(*self.train)
        return max(weights | dtypes.seen, key=lambda dtype: torch.finfo(dtype).eps)

    @torch.no_grad()
    def check_reduction(self, relative: float) -> None:
        """Raise `GhostConfigError` unless the rows' own losses add up to the batch's, as they should."""
        X, Y = self.train
        weights = self.weights()
        parts = [
            weight * float(self.loss(take_rows(X, slice(i, i + 1)), Y[i : i + 1]))
            for i, weight in enumerate(weights)
            if weight
        ]
        if not parts:
            raise BatchError(f"none of the {len(weights)} training rows has a label that the loss counts.")
        whole = float(self.loss(X, Y))
        if abs(sum(parts) - whole) > relative * sum(map(abs, parts)):
            raise GhostConfigError(
                f"loss_reduction={self.reduction.value!r} does not describe the loss: the rows' own losses "
                f"add up to {sum(parts):.6g} by it, and all rows together have {whole:.6g}; set it to what "
                f"the loss is a mean of ({', '.join(r.value for r in LossReduction)})."
            )

    def scored(self, scale: float | None) -> ScoredStep:
        """The step by the engine, under a gradient scaler where a loss scale is given."""
        device = next(self.model.parameters()).device.type
        manager = GhostEngineManager(
            self.config, self.called, torch.optim.SGD(self.model.parameters(), lr=0.0),
            val_data=self.val.get("", self.val), loss_fn=self.loss_fn,
            scaler=None if scale is None else torch.amp.GradScaler(device, init_scale=scale),
        )  # fmt: skip
        try:
            forward = self._backward(manager)
            total, by_layer = _columns(manager.scores), manager.scores_by_layer
            by_layer = {layer: _columns(scores) for layer, scores in by_layer.items()}
            if self.config.order == 2:
                total = torch.cat([total, _columns(manager.curvatures)], 1)
                for layer, curvatures in manager.curvatures_by(Resolution.LAYER).items():
                    by_layer[layer] = torch.cat([by_layer[layer], _columns(curvatures)], 1)
            return ScoredStep(total, by_layer, self._take_grads(scale or 1.0), forward, scale or 1.0)
        finally:
            manager.cleanup()

    def _backward(self, manager: GhostEngineManager) -> Deviation:
        """All micro-batches; returns how far the scored forward's loss was from the plain one's at most."""
        parts = self._micro_batches()
        shares = _shares([Y for _, Y in parts], self.reduction)
        worst = Deviation(0.0, 0.0, 0.0)
        for number, ((X, Y), share) in enumerate(zip(parts, shares, strict=True), start=1):
            rows, last = range(len(Y)), number == len(parts)
            with manager.step(X, Y, batch_idx=rows, iteration=0, share=share, last=last) as step:
                loss = self.loss_fn(self.called, step.X, step.Y)
                with torch.no_grad():  # the taps let this pass go by
                    own = self.loss(step.X, step.Y)
                step.backward(loss)
            error = float((loss.detach() - own).abs())
            worst = max(worst, Deviation(float(own.abs()), error, 0.0), key=lambda d: d.relative)
        return worst

    def _micro_batches(self) -> list[Rows]:
        X, Y = self.train
        k = self.config.gradient_accumulation_steps
        bounds = [len(Y) * i // k for i in range(k + 1)]
        return [(take_rows(X, slice(lo, hi)), Y[lo:hi]) for lo, hi in pairwise(bounds)]

    def _take_grads(self, scale: float) -> dict[int, Tensor]:
        grads = {}
        for p in self.model.parameters():
            if p.requires_grad:
                grads[id(p)] = torch.zeros_like(p) if p.grad is None else p.grad / scale
            p.grad = None
        return grads


def _columns(scores: Tensor) -> Tensor:
    """`[B]` or `[B, C]` as `[B, C]`."""
    return scores.reshape(len(scores), -1)


class _Dtypes(TorchFunctionMode):
    """Notes the dtypes that a differentiable computation passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {
            leaf.dtype
            for leaf in torch.utils._pytree.tree_leaves(result)
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dtype in _DTYPES
        }
        return result


def _shares(labels: Sequence[Tensor], reduction: LossReduction) -> list[float]:
    """The factors on the losses of parts of a batch that make their sum the batch's loss."""
    if reduction is LossReduction.SUM:
        return [1.0] * len(labels)
    counts = [int(count(part, reduction)) for part in labels]
    return [counted / max(1, sum(counts)) for counted in counts]
