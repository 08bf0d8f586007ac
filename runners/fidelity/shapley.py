"""Shapley values by Monte Carlo: mean marginal contributions over random orders of the players."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Walk = Callable[[Sequence[int]], Tensor]
"""`walk(order)`: what the empty set and each longer beginning of the order are worth, `[n + 1, K]` for K
games of the same n players."""


@dataclass(frozen=True)
class MonteCarlo:
    """Marginal contributions.

    Attributes:
        marginals: `[permutations, n, K]` float64, by player.
    """

    marginals: Tensor

    @property
    def values(self) -> Tensor:
        """`[n, K]` float64."""
        return self.marginals.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """Of each value, `[n, K]` float64."""
        return self.marginals.std(0) / math.sqrt(len(self.marginals))

    def halves(self) -> tuple[Tensor, Tensor]:
        """The values by the first and by the second half of the permutations, `[n, K]` each."""
        middle = len(self.marginals) // 2
        return self.marginals[:middle].mean(0), self.marginals[middle:].mean(0)


def monte_carlo(walk: Walk, players: int, permutations: int, seed: int) -> MonteCarlo:
    """Marginal contributions in random orders, which the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(permutations):
        order = torch.randperm(players, generator=generator)
        steps = walk(order.tolist()).double().diff(dim=0)  # [n, K], in the order's order
        found.append(torch.empty_like(steps).index_copy_(0, order, steps))
    return MonteCarlo(torch.stack(found))
