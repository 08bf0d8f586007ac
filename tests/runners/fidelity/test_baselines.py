"""Baselines against their definitions."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runners.fidelity.baselines import at_last_weights, knn_shapley


def shapley_by_definition(X: Tensor, Y: Tensor, x: Tensor, y: int, k: int) -> list[float]:
    """Of one validation sample: the mean over all orders of what each sample adds."""

    def worth(subset: tuple[int, ...]) -> float:
        nearest = sorted(subset, key=lambda i: float((X[i] - x).norm()))[:k]
        return sum(int(Y[i]) == y for i in nearest) / k

    values = [0.0] * len(X)
    orders = list(permutations(range(len(X))))
    for order in orders:
        for place, i in enumerate(order):
            values[i] += (worth(order[: place + 1]) - worth(order[:place])) / len(orders)
    return values


@pytest.mark.parametrize("k", [1, 2, 5])
def test_knn_shapley_is_exact(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    X, X_val = torch.randn(5, 3, generator=generator), torch.randn(3, 3, generator=generator)
    Y, Y_val = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([0, 1, 1])
    pairs = zip(X_val, Y_val.tolist(), strict=True)
    wanted = torch.tensor([shapley_by_definition(X, Y, x, y, k) for x, y in pairs], dtype=torch.float64)
    for block in (2, 64):
        found = knn_shapley(X, Y, X_val, Y_val, k, block)
        torch.testing.assert_close(found, wanted.mean(0), rtol=1e-12, atol=1e-14)


def test_gradients_at_the_last_weights_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    X = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    X_val = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    Y, Y_val = torch.randint(0, 3, (9,), generator=generator), torch.randint(0, 3, (5,), generator=generator)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        parts = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    target = gradient(X_val, Y_val)
    own = torch.stack([gradient(X[i : i + 1], Y[i : i + 1]) for i in range(9)])
    found = at_last_weights(model, X, Y, X_val, Y_val, block=4)
    torch.testing.assert_close(found.product, own @ target, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.gradient_norm, own.norm(dim=1), rtol=1e-10, atol=1e-13)
    losses = F.cross_entropy(model(X), Y, reduction="none")
    torch.testing.assert_close(found.loss, losses, rtol=1e-10, atol=1e-13)
    assert all(weight.grad is None for weight in model.parameters())
