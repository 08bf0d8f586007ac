"""The plain way, as slow as it is obvious: one backward a sample, everything in float64."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghost.batch import Inputs, row_count, take_rows
from ghost.loss import LossReduction, count

LossFn = Callable[[nn.Module, Inputs, Tensor], Tensor]
Gradient = dict[str, Tensor]
Rows = tuple[Inputs, Tensor]


def gradient(model: nn.Module, loss: Tensor) -> Gradient:
    """The gradient of `loss` by parameter name, each tensor once; zeros where a parameter takes no part."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), grads, strict=True)
    }


def sample_gradients(
    model: nn.Module, loss_fn: LossFn, X: Inputs, Y: Tensor, reduction: LossReduction
) -> list[Gradient]:
    """`g_i`: every sample's part of the gradient of the batch's own loss, by a batch-size-1 loop."""
    total = count(Y, reduction).double()
    parts = []
    for i in range(row_count(X, "batch")):
        row = slice(i, i + 1)
        n = count(Y[row], reduction).double()
        if n == 0:  # the mean over nothing is not a number, the sample's part of the sum is zero
            parts.append({k: torch.zeros_like(p) for k, p in model.named_parameters() if p.requires_grad})
            continue
        weight = n / total if reduction is not LossReduction.SUM else 1.0
        parts.append(gradient(model, loss_fn(model, take_rows(X, row), Y[row]) * weight))
    return parts


def dot(a: Gradient, b: Gradient) -> Tensor:
    """`⟨a, b⟩` over all parameters, accumulated in float64."""
    return torch.stack([(a[k].double() * b[k].double()).sum() for k in a]).sum()


def scores(model: nn.Module, loss_fn: LossFn, train: Rows, val: Rows, reduction: LossReduction) -> Tensor:
    """`⟨∇L_val, g_i⟩` for every training sample."""
    val_grad = gradient(model, loss_fn(model, *val))
    return torch.stack([dot(val_grad, g) for g in sample_gradients(model, loss_fn, *train, reduction)])


def scores_by_parameter(
    model: nn.Module, loss_fn: LossFn, train: Rows, val: Rows, reduction: LossReduction
) -> dict[str, Tensor]:
    """The same, one parameter at a time."""
    val_grad = gradient(model, loss_fn(model, *val))
    grads = sample_gradients(model, loss_fn, *train, reduction)
    return {k: torch.stack([dot({k: val_grad[k]}, {k: g[k]}) for g in grads]) for k in val_grad}


def hessian_product(model: nn.Module, loss_fn: LossFn, rows: Rows, vector: Gradient) -> Gradient:
    """The Hessian of the rows' loss times `vector`, by autograd's double backward."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = loss_fn(model, *rows)
        grads = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        along = [vector[name] for name in named]
        products = torch.autograd.grad(grads, list(named.values()), along, materialize_grads=True)
    return dict(zip(named, products, strict=True))


def curvatures(model: nn.Module, loss_fn: LossFn, train: Rows, val: Rows, reduction: LossReduction) -> Tensor:
    """`⟨g_i, H_val Σ_j g_j⟩` for every training sample."""
    product = hessian_product(model, loss_fn, val, gradient(model, loss_fn(model, *train)))
    return torch.stack([dot(product, g) for g in sample_gradients(model, loss_fn, *train, reduction)])


# --- losses, as functions of model, inputs and labels -------------------------------------------------------


def class_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Cross-entropy of class labels `[b]`, a mean over rows; what lies between is averaged."""
    return F.cross_entropy(_pooled(model(X)), Y)


def class_loss_sum(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """The same as a sum over rows."""
    return F.cross_entropy(_pooled(model(X)), Y, reduction="sum")


def token_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Cross-entropy of labels `[b, T]`, a mean over those that are not -100."""
    return F.cross_entropy(model(X).flatten(0, 1), Y.flatten())


def causal_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Next-token cross-entropy of a Hugging Face model in its logits' own precision."""
    logits = model(**({"input_ids": X} if isinstance(X, Tensor) else X)).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), Y[:, 1:].flatten())


def own_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """A Hugging Face model's own loss; it is taken in float32."""
    return model(**({"input_ids": X} if isinstance(X, Tensor) else X), labels=Y).loss


def _pooled(output: Tensor) -> Tensor:
    return output.flatten(1, -2).mean(1) if output.dim() > 2 else output
