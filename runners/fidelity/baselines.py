"""What else tells wrong labels: losses, gradients and neighbours at a model's last weights."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap


@dataclass(frozen=True)
class AtLastWeights:
    """Of every sample, `[n]` each: its loss, its gradient's norm, and the gradient's product with that of the
    mean validation loss.
    """

    loss: Tensor
    gradient_norm: Tensor
    product: Tensor


def at_last_weights(
    model: nn.Module, X: Tensor, Y: Tensor, X_val: Tensor, Y_val: Tensor, block: int = 64
) -> AtLastWeights:
    """By autograd alone, `block` samples at a time.

    Args:
        X, Y: Inputs `[n, d]` and labels `[n]` of a model that returns logits; of validation the same.
    """
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    target, _ = grad_and_value(loss)(weights, X_val, Y_val)
    of_each = vmap(grad_and_value(loss), in_dims=(None, 0, 0))
    losses, squares, products = [], [], []
    for x, y in zip(X.split(block), Y.split(block), strict=True):
        gradients, values = of_each(weights, x[:, None], y[:, None])  # [b, ...] by name, [b]
        losses.append(values)
        squares.append(torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0))
        dots = [gradients[name].flatten(1) @ target[name].flatten() for name in weights]
        products.append(torch.stack(dots).sum(0))
    return AtLastWeights(torch.cat(losses), torch.cat(squares).sqrt(), torch.cat(products))


def knn_shapley(X: Tensor, Y: Tensor, X_val: Tensor, Y_val: Tensor, k: int, block: int = 64) -> Tensor:
    """Exact Shapley values `[n]` float64 of a k-nearest-neighbour classifier's mean validation accuracy.

    Jia et al., *Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms* (VLDB 2019),
    Theorem 1: a subset is worth the share of a validation sample's k nearest members that have its label,
    counting missing members as wrong.

    Args:
        X, Y: Features `[n, d]` and labels `[n]`, with n at least k; of validation the same.
    """
    n = len(X)
    rank = torch.arange(1, n, dtype=torch.float64, device=X.device)  # 1 to n − 1
    share = rank.clamp(max=k) / (k * rank)  # [n − 1]
    total = torch.zeros(n, dtype=torch.float64, device=X.device)
    for x, y in zip(X_val.split(block), Y_val.split(block), strict=True):
        order = torch.cdist(x, X).argsort(dim=1, stable=True)  # [b, n], nearest first
        hit = (Y[order] == y[:, None]).double()  # [b, n]
        step = (hit[:, :-1] - hit[:, 1:]) * share  # [b, n − 1]
        farthest = hit[:, -1:] / n  # [b, 1]
        value = torch.cat([step, farthest], dim=1).flip(1).cumsum(1).flip(1)  # [b, n]
        total.index_add_(0, order.flatten(), value.flatten())
    return total / len(X_val)
