"""Monte-Carlo Shapley values against their definition."""

from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from torch import Tensor

from runners.fidelity.shapley import monte_carlo

PLAYERS = 4
GAMES = torch.randn(2**PLAYERS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def walk(order: Sequence[int]) -> Tensor:
    """Two games without any structure."""
    beginnings = [sum(1 << player for player in order[:size]) for size in range(len(order) + 1)]
    return GAMES[beginnings]


def exact_values() -> Tensor:
    """By the definition, over all orders."""
    total = torch.zeros(PLAYERS, 2, dtype=torch.float64)
    orders = list(permutations(range(PLAYERS)))
    for order in orders:
        for player, gained in zip(order, walk(order).diff(dim=0), strict=True):
            total[player] += gained / len(orders)
    return total


def test_values_are_within_their_standard_errors_of_the_exact_ones() -> None:
    found = monte_carlo(walk, PLAYERS, 4000, seed=1)
    off = (found.values - exact_values()).abs() / found.standard_error
    assert off.max() < 4
    assert found.standard_error.max() < 0.05


def test_every_order_shares_out_the_whole_worth() -> None:
    found = monte_carlo(walk, PLAYERS, 20, seed=1)
    whole = (GAMES[-1] - GAMES[0]).expand(20, 2)
    torch.testing.assert_close(found.marginals.sum(1), whole, rtol=0, atol=1e-12)


def test_a_game_that_adds_up_has_no_error() -> None:
    worth = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)

    def added_up(order: Sequence[int]) -> Tensor:
        return torch.cat([torch.zeros(1), worth[list(order)].cumsum(0)])[:, None]

    found = monte_carlo(added_up, len(worth), 7, seed=0)
    torch.testing.assert_close(found.values[:, 0], worth, rtol=0, atol=1e-12)
    assert found.standard_error.max() < 1e-12


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_draws_the_orders(seed: int) -> None:
    one, other = (monte_carlo(walk, PLAYERS, 5, seed) for _ in range(2))
    assert torch.equal(one.marginals, other.marginals)
    assert not torch.equal(one.marginals, monte_carlo(walk, PLAYERS, 5, seed + 1).marginals)


def test_the_halves_average_to_the_values() -> None:
    found = monte_carlo(walk, PLAYERS, 10, seed=3)
    torch.testing.assert_close(sum(found.halves()) / 2, found.values, rtol=0, atol=1e-12)
