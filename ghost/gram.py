"""Exact inner products of samples' gradients with each other, without ever holding a gradient."""

import re
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from ghost.batch import Inputs, check_labels, plain, row_count, take_rows
from ghost.config import GhostConfig, Resolution, ValGradDevice, ValMode
from ghost.discovery import find_layers
from ghost.engines.base import LayerScores, LossFn
from ghost.engines.graddotprod import GradDotProdEngine
from ghost.errors import BatchError, GhostConfigError
from ghost.layers import Layer
from ghost.loss import LossReduction, infer_reduction, row_counts
from ghost.preconditioner import Credit, Preconditioner
from ghost.selection import Selection
from ghost.validation import model_loss

Gram = dict[str, Tensor]
"""`⟨g_i, g_j⟩` of every pair of samples, `[n, n]` float64, by parameter name."""


def exact_gram(
    model: nn.Module, config: GhostConfig, X: Inputs, Y: Tensor, loss_fn: LossFn | None = None, *,
    parameters: Collection[str] | None = None, block: int = 8,
) -> Gram:  # fmt: skip
    """Inner products of the gradients of the samples' own mean losses, parameter by parameter.

    Each pass takes two blocks of rows through one forward and one backward of the ghost dot product, so
    memory is that of a step over `2 · block` rows; `m` blocks take `m (m + 1) / 2` passes. A shared parameter
    has the products of its whole gradient, with all uses and cross terms. No `.grad` is touched.

    Args:
        model: The model itself, not a wrapper of it, in the mode in which its gradients are meant.
        config: Of the settings `loss_reduction` and `algebra` are read.
        X, Y: Inputs and labels with a row per sample, on the model's device.
        loss_fn: `loss_fn(model, X, Y)`, the mean loss of a batch; by default a Hugging Face model's own.
        parameters: Names as in `model.named_parameters()`, such as a layout's; None for all that are trained.
        block: Rows of a block.

    Returns:
        By parameter name, in the model's order. A row without a label that the loss counts has a gradient of
        zero.

    Raises:
        GhostConfigError: A parameter is unknown or not trained, the reduction cannot be inferred, or the loss
            is random (dropout).
        UnsupportedModelError: A layer's gradients cannot be told apart by sample.
    """
    samples = row_count(X, "the batch")
    check_labels(Y, samples, "the batch")
    if block < 1:
        raise BatchError(f"block={block} should be a whole number of at least 1.")
    loss_fn = loss_fn or model_loss
    reduction = config.loss_reduction or infer_reduction(model)
    uses = _uses(find_layers(model), _chosen(model, parameters))
    _refuse_random_loss(model, take_rows(X, slice(0, block)), Y[:block], loss_fn)
    counts = row_counts(Y, reduction)  # [n]
    settings = _settings(config, reduction, uses)
    gram = {name: torch.zeros(samples, samples, dtype=torch.float64) for name in uses.values()}
    blocks = [rows for rows in counts.nonzero().flatten().split(block) if len(rows)]
    for last, columns in enumerate(blocks):
        engine = GradDotProdEngine(model, settings, (take_rows(X, columns), Y[columns]))
        with engine.attached():
            for others in blocks[: last + 1]:
                found = _block_products(engine, model, take_rows(X, others), Y[others], loss_fn)
                # The engine's gradients are parts of a mean over the block, not the samples' own.
                weights = torch.outer(
                    _weights(counts[others], reduction), _weights(counts[columns], reduction)
                )
                for use, name in uses.items():
                    gram[name][others[:, None].cpu(), columns.cpu()] += (found[use].sum(0) / weights).cpu()
    return {name: _mirrored(upper) for name, upper in gram.items()}


def _chosen(model: nn.Module, parameters: Collection[str] | None) -> dict[int, str]:
    """The parameters' names by their `id`, in the model's order."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = trained.keys() if parameters is None else parameters
    if unknown := sorted(set(wanted) - trained.keys()):
        raise GhostConfigError(
            f"{unknown[0]!r} is not a trained parameter of the {type(model).__name__}: take names of its "
            "named_parameters()."
        )
    return {id(p): name for name, p in trained.items() if name in wanted}


def _uses(layers: list[Layer], chosen: dict[int, str]) -> dict[tuple[str, str], str]:
    """The parameter's name of every layer and parameter name in it that has one of the chosen."""
    return {
        (layer.name, key): chosen[id(p)]
        for name in chosen.values()
        for layer in layers
        for key, p in layer.params.items()
        if chosen.get(id(p)) == name
    }


def _settings(config: GhostConfig, reduction: LossReduction, uses: dict[tuple[str, str], str]) -> GhostConfig:
    names = dict.fromkeys(layer for layer, _ in uses)
    return replace(
        config, engine=GradDotProdEngine.name, val_mode=ValMode.CONCAT, val_batch_size=None, val_every=1,
        val_grad_device=ValGradDevice.MODEL, order=1, preconditioner=Preconditioner.NONE,
        credit=Credit.TRAJECTORY, bitwise=False, loss_reduction=reduction, policy=None, gram=False,
        pairwise=True, resolution=Resolution.TOTAL, strict=False,
        selection=Selection(include=tuple(f"re:{re.escape(name)}" for name in names)),
        score_dtype=torch.float64, storage_dtype=None, gradient_accumulation_steps=1, result_dir=None,
    )  # fmt: skip


def _weights(counts: Tensor, reduction: LossReduction) -> Tensor:
    """Each row's share of the mean over all rows, `[rows]` float64; a sum has no shares."""
    if reduction is LossReduction.SUM:
        return torch.ones(len(counts), dtype=torch.float64, device=counts.device)
    return counts.double() / counts.sum()


def _block_products(
    engine: GradDotProdEngine, model: nn.Module, X: Inputs, Y: Tensor, loss_fn: LossFn
) -> LayerScores:
    """Scores `[1, b, C]` of the rows against the engine's validation rows."""
    engine.begin(X, Y, first=True, share=1.0)
    loss = loss_fn(model, *engine.forward_inputs(X, Y))
    engine.check_loss(loss)
    factor = engine.loss_factor()
    weighed = loss if factor is None else loss * factor
    # The parameters' own gradients are not wanted.
    weighed.backward(inputs=list(engine.state.probes.values()))
    engine.instrument.refuse_hidden_layers()
    return engine.collect()


def _refuse_random_loss(model: nn.Module, X: Inputs, Y: Tensor, loss_fn: LossFn) -> None:
    """No two blocks would see the same network."""
    devices = {Y.device} if Y.device.type == "cuda" else set()
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
        once, again = (loss_fn(model, plain(X), Y).nan_to_num() for _ in range(2))
    if not torch.equal(once, again):
        raise GhostConfigError(
            f"the loss of the {type(model).__name__} differs from pass to pass on the same rows (dropout): "
            "put the model in evaluation mode (model.eval()), or each inner product is of another network."
        )


def _mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix of which the upper triangle is given."""
    return upper.triu() + upper.triu(1).T
