"""Check the engine on a model of one's own: one scored step against plain autograd, layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ghost.batch import check_labels, row_count, take_rows, to_device
from ghost.config import GhostConfig, ValMode
from ghost.coverage import selected_parts
from ghost.discovery import find_layers
from ghost.distributed import is_sharded, ranks_of, unwrap
from ghost.engines import GradDotProdEngine, LossFn, engine_class
from ghost.errors import BatchError, GhostConfigError, shown
from ghost.heads import Part
from ghost.loss import infer_reduction
from ghost.plain import PlainUse, Rows, plain_uses
from ghost.policies import All
from ghost.preconditioner import Preconditioner
from ghost.trial import ScoredStep, TrialStep
from ghost.validation import ValData, model_loss
from ghost.verification import Verification, layer_checks, score_deviation

RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.004}
"""Allowed error as a share of a layer's largest |score|, by the coarsest dtype that the model computes in."""


def verify(
    model: nn.Module, config: Any, train: Rows, val_data: ValData, loss_fn: LossFn | None = None,
    scaler: torch.amp.GradScaler | None = None, rows: int = 4, tolerance: float | None = None,
) -> Verification:  # fmt: skip
    """Hold one scored step of `model` against plain autograd: a backward for each training row, one for the
    validation rows, one for the training batch, in the same dtype, with inner products in float64.

    The step is taken as configured (validation mode, selection, algebra, accumulation, dtypes) on a few rows.
    Afterwards the model, its gradients, buffers, modes and the random state are what they were; no parameter
    is changed.

    A layer fails when a score is off by more than `tolerance` of its largest |score| and what rounding makes
    of it. That is measured on *plain* autograd: how far the layer's training gradient moves when every weight
    is off by a rounding. So no rule of the engine can widen its own tolerance, and a layer whose scores are
    too small for a wrong one to stand out is listed as `unresolved`, never passed over. The training gradient
    of every parameter is checked in the same way.

    Args:
        model: The model, compiled or not.
        config: Settings, as for `GhostEngineManager`; nothing is written to its `result_dir`, and a policy
            keeps every sample.
        train: `(X, Y)`, training rows as the loop has them; the first `rows` of them are used.
        val_data: `(X_val, Y_val)`, or named sets of them; the first rows of each are used, as many as a step
            takes (`concat`) or two micro-batches of the validation pass.
        loss_fn: `loss_fn(model, X, Y)`, the model's mean loss, under autocast where the loop's is; by default
            `model(**inputs, labels=Y).loss`.
        scaler: The loop's `torch.amp.GradScaler`; its scale is tried first, and halved in a copy until no
            gradient overflows.
        rows: Training rows, at least one for each micro-batch of the step.
        tolerance: Allowed relative error; by default 1e-8 in float64, 1e-4 in float32, 0.02 in bfloat16 and
            0.004 in float16.

    Raises:
        GhostConfigError: There is nothing to check, `loss_reduction` does not describe the loss, or the loss
            is random even in evaluation mode.
        UnsupportedModelError, BatchError: As the manager itself would.
    """
    settings = replace(GhostConfig.read(config), result_dir=None)
    if settings.defers:  # the gradients' way through the samples' factors is checked, on the whole batch
        settings = replace(settings, policy=All(), gram=False)
    if not issubclass(engine_class(settings.engine), GradDotProdEngine):
        raise GhostConfigError(
            f"engine={settings.engine!r} takes no gradient dot products, so there is nothing to verify: use "
            "engine='graddotprod'."
        )
    if settings.preconditioner is not Preconditioner.NONE:
        raise GhostConfigError(
            f"preconditioner={settings.preconditioner.value!r} is of a step that verify() does not take: it "
            "checks plain inner products, so set it to 'none'."
        )
    inner = unwrap(model)
    if is_sharded(inner) or ranks_of(model, {"ddp": False}).world_size > 1:
        raise GhostConfigError(
            "the model is spread over processes, and verify() takes a step of one: verify the plain model in "
            "one process."
        )
    reduction = settings.loss_reduction or infer_reduction(inner)
    step = TrialStep(
        model, inner, settings, reduction, loss_fn or model_loss,
        _train_rows(inner, settings, train, rows), _val_sets(inner, settings, val_data, rows),
    )  # fmt: skip
    layers = find_layers(inner)
    scored = {
        f"{layer}.{key}" if layer else key: parts
        for (layer, key), parts in selected_parts(inner, layers, settings.selection).items()
    }
    with _preserved(inner):
        notes = step.make_repeatable()
        dtype = step.coarsest_dtype()
        relative = RELATIVE[dtype] if tolerance is None else tolerance
        eps = torch.finfo(dtype).eps
        found, uses = _both_ways(step, scored, scaler, eps)
        step.check_reduction(max(relative, 4 * eps))
    if found.scale != 1:
        notes.append(f"The loss scale was {found.scale:g}.")
    modules = {layer.name: [layer.qualified(key) for key in layer.params] for layer in layers}
    kinds = {name: type(module).__name__ for name, module in inner.named_modules()}
    return Verification(
        dtype=dtype,
        rows=len(step.train[1]),
        val_rows=sum(len(Y) for _, Y in step.val.values()),
        layers=layer_checks(modules, kinds, uses, found.by_layer, found.grads, relative, eps),
        total=score_deviation(found.total, list(uses.values()), relative, eps),
        forward=replace(found.forward, tolerance=relative * found.forward.size),
        unscored=[name for name in uses if scored.get(name, []) is not None],
        notes=notes,
    )


def _both_ways(
    step: TrialStep,
    scored: Mapping[str, Sequence[Part] | None],
    scaler: torch.amp.GradScaler | None,
    eps: float,
) -> tuple[ScoredStep, dict[str, PlainUse]]:
    """The step by the engine and by plain autograd, at the largest loss scale, from the scaler's on, at which
    nothing overflows.
    """
    scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else None
    while True:
        found = step.scored(scale)
        uses = plain_uses(
            step.model, step.loss, step.train, step.weights(), step.columns(), scored, scale or 1.0, eps,
            step.config.order,
        )  # fmt: skip
        finite = found.is_finite() and all(use.is_finite() for use in uses.values())
        if finite or scale is None or scale <= 1:
            return found, uses
        scale /= 2


@contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers, modes and the random state are put back at the end; gradients are cleared."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for p, _ in grads:
        p.grad = None
    try:
        with torch.random.fork_rng(list(devices)):
            torch.manual_seed(0)  # one and the same check every time
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def _train_rows(model: nn.Module, config: GhostConfig, train: Rows, rows: int) -> Rows:
    steps = config.gradient_accumulation_steps
    found = _check_rows(train, "train")
    if found < steps:
        raise BatchError(
            f"train has {found} rows, and gradient_accumulation_steps={steps} needs one for each micro-batch."
        )
    return _first(train, max(rows, steps), model)


def _val_sets(model: nn.Module, config: GhostConfig, val_data: ValData, rows: int) -> dict[str, Rows]:
    """The first rows of each validation set; one without a name is the set ''."""
    sets = dict(val_data) if isinstance(val_data, Mapping) else {"": val_data}
    taken = rows
    if config.val_batch_size is not None:
        taken = config.val_batch_size * (1 if config.val_mode is ValMode.CONCAT else 2)
    for name, batch in sets.items():
        _check_rows(batch, f"val_data[{name!r}]" if name else "val_data")
    return {name: _first(batch, taken, model) for name, batch in sets.items()}


def _check_rows(batch: Any, what: str) -> int:
    """The number of rows of `(X, Y)`, or an error that says what is wrong with them."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise GhostConfigError(f"{what} should be inputs and labels (X, Y), not {shown(batch)}.")
    rows = row_count(batch[0], what)
    check_labels(batch[1], rows, what)
    return rows


def _first(batch: Rows, rows: int, model: nn.Module) -> Rows:
    """The first rows, on the model's device."""
    device = next(model.parameters()).device
    X, Y = batch
    return to_device(take_rows(X, slice(0, rows)), device), Y[:rows].to(device)
