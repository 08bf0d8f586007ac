"""Which samples each policy keeps, and how it weighs them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ghost import GhostConfig, GhostConfigError
from ghost.policies import Greedy, Policy, StepSamples, Threshold, TopK, policy_of, register_policy

SCORES = (0.3, -0.5, 0.3, 2.0, -1.0)


def samples(
    scores: Any = SCORES, iteration: int = 0, lr: float = 0.1, gram: Tensor | None = None
) -> StepSamples:
    found = torch.tensor(scores, dtype=torch.float64)
    return StepSamples(found, torch.arange(len(found)), iteration, lr, gram)


def weights(policy: Any, of: StepSamples | None = None) -> list[float]:
    return policy_of(policy).weigh(samples() if of is None else of).tolist()


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("all", [1, 1, 1, 1, 1]),
        ({"name": "top_k", "k": 1}, [0, 0, 0, 1, 0]),
        ({"name": "top_k", "k": 2}, [1, 0, 0, 1, 0]),  # of a tie the earlier
        ({"name": "top_k", "k": 0.5}, [1, 0, 1, 1, 0]),  # 2.5 of five are three
        ({"name": "top_k", "k": 0.01}, [0, 0, 0, 1, 0]),
        ({"name": "top_k", "k": 1.0}, [1, 1, 1, 1, 1]),
        ({"name": "top_k", "k": 9}, [1, 1, 1, 1, 1]),
        ({"name": "bottom_k", "k": 2}, [0, 1, 0, 0, 1]),
        ({"name": "bottom_k", "k": 3}, [0, 1, 1, 0, 1]),  # of a tie the later
        ("threshold", [1, 0, 1, 1, 0]),
        ({"name": "threshold", "above": 0.3}, [0, 0, 0, 1, 0]),
        ({"name": "threshold", "above": 5}, [0, 0, 0, 0, 0]),
        ({"name": "greedy", "order": 1, "k": 2}, [1, 0, 0, 1, 0]),
    ],
)
def test_what_is_kept(policy: Any, kept: list[float]) -> None:
    assert weights(policy) == kept


def test_columns_are_added_up() -> None:
    assert weights({"name": "top_k", "k": 1}, samples([[3.0, -4.0], [1.0, 0.5], [0.0, 1.0]])) == [0, 1, 0]


def test_softmax_of_standardised_scores() -> None:
    found = weights({"name": "softmax", "temperature": 2.0})
    mean = sum(SCORES) / 5
    spread = math.sqrt(sum((s - mean) ** 2 for s in SCORES) / 5)
    raised = [math.exp((s - mean) / spread / 2.0) for s in SCORES]
    assert found == pytest.approx([r / sum(raised) for r in raised], rel=1e-12)
    assert weights({"name": "softmax"}, samples([s * 1e-9 for s in SCORES])) == pytest.approx(
        weights({"name": "softmax"}), rel=1e-6
    )
    assert weights("softmax", samples([2.0] * 4)) == [0.25] * 4


@pytest.mark.parametrize(
    ("iteration", "kept"),
    [
        (0, [1, 0, 0, 1, 0]),  # quantiles .7 .3 .5 .9 .1 and the window [.6, 1]
        (5, [1, 1, 1, 1, 0]),  # [.3, 1]
        (10, [1, 1, 1, 1, 1]),
        (99, [1, 1, 1, 1, 1]),
    ],
)
def test_the_window_moves_over_the_steps(iteration: int, kept: list[float]) -> None:
    policy = {"name": "curriculum", "start": [0.6, 1], "end": [0, 1], "steps": 10}
    assert weights(policy, samples(iteration=iteration)) == kept


@pytest.mark.parametrize(
    ("window", "kept"),
    [
        ([0.75, 0.8], [1, 0, 0, 0, 0]),  # between .7 and .9
        ([0.85, 0.89], [0, 0, 0, 1, 0]),
        ([0.0, 0.05], [0, 0, 0, 0, 1]),
        ([0.95, 1.0], [0, 0, 0, 1, 0]),
    ],
)
def test_a_narrow_window_keeps_what_is_nearest(window: list[float], kept: list[float]) -> None:
    assert weights({"name": "curriculum", "start": window, "end": window}) == kept


def test_greedy_takes_what_adds_to_what_is_chosen() -> None:
    """Two copies of one sample: the second is passed over for a worse one that is orthogonal to it."""
    scores = [1.0, 1.0, 0.6]
    gram = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    policy = {"name": "greedy", "k": 2}
    # The copy's gain is 1 - lr (3 / 2) 4, which is less than 0.6 from lr = 1/15 on.
    assert weights(policy, samples(scores, lr=0.06, gram=gram)) == [1, 1, 0]
    assert weights(policy, samples(scores, lr=0.07, gram=gram)) == [1, 0, 1]


@given(
    st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=1, max_size=6),
    st.floats(0.0, 2.0), st.integers(1, 6),
)  # fmt: skip
def test_greedy_is_the_plain_loop_over_gains(gradients: list[list[float]], lr: float, k: int) -> None:
    """`gain_i(S) = η ⟨G, ĝ_i⟩ − η² Σ_{j ∈ S} ⟨ĝ_i, ĝ_j⟩` with `ĝ = (B / k) g`, written out."""
    g = torch.tensor(gradients, dtype=torch.float64)
    target = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    count = min(k, len(g))
    own = (len(g) / count) * g
    chosen: list[int] = []
    for _ in range(count):
        moved = lr * own[chosen].sum(0)
        gains = {i: float(own[i] @ target - own[i] @ moved) for i in range(len(g)) if i not in chosen}
        best = max(gains.values())
        near = [i for i, gain in gains.items() if gain > best - 1e-9]
        if len(near) > 1:
            return  # rounding decides
        chosen.append(near[0])
    found = Greedy(k).weigh(StepSamples(g @ target, torch.arange(len(g)), 0, lr, g @ g.T))
    assert sorted(found.nonzero().flatten().tolist()) == sorted(chosen)


def test_what_each_asks_for() -> None:
    assert Greedy().needs_gram
    assert not Greedy(order=1).needs_gram
    assert not TopK().needs_gram
    assert policy_of(lambda step: step.scores).needs_curvatures
    assert not TopK().needs_curvatures


def test_a_policy_is_given_in_several_ways() -> None:
    mine = Threshold(0.5)
    assert policy_of(mine) is mine
    assert policy_of({"name": "threshold", "above": 0.5}) == mine
    config = GhostConfig.read({"policy": {"name": "threshold", "above": 0.5}})
    assert config.policy == mine
    assert isinstance(GhostConfig.read({"policy": "all"}).policy, Policy)


@pytest.mark.parametrize("policy", ["none", {"name": "none"}, None])
def test_none_is_no_policy(policy: Any) -> None:
    assert GhostConfig.read({"policy": policy}).policy is None
    assert GhostConfig(policy=policy) == GhostConfig()


def test_names_that_policies_cannot_have() -> None:
    class Nameless(Policy):
        def weigh(self, samples: StepSamples) -> Tensor:
            return samples.totals

    class Nothing(Nameless):
        name = "none"

    for policy, name in ((Nameless, "own"), (Nothing, "none")):
        with pytest.raises(
            GhostConfigError, match=f"name='{name}' of {policy.__name__} stands for no policy"
        ):
            register_policy(policy)


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        ("best", "policy='best' should be one of all, bottom_k, curriculum, greedy, none,"),
        ({"k": 3}, "policy=None should be one of"),
        (3, "policy=3 should be a name"),
        (TopK, r"policy=TopK is a class: give an instance, such as TopK\(k=0.5\)"),
        ({"name": "none", "k": 3}, "policy='none' has no setting 'k': it has none"),
        ({"name": "top_k", "n": 3}, "policy='top_k' has no setting 'n': it has k"),
        ({"name": "all", "k": 3}, "policy='all' has no setting 'k': it has none"),
        ({"name": "top_k", "k": 0}, "policy='top_k' has k=0"),
        ({"name": "bottom_k", "k": 1.5}, "policy='bottom_k' has k=1.5"),
        ({"name": "greedy", "k": True}, "policy='greedy' has k=True"),
        ({"name": "greedy", "order": 3}, "policy='greedy' has order=3"),
        ({"name": "threshold", "above": math.nan}, "has above=nan, which should be a number"),
        ({"name": "softmax", "temperature": 0}, "has temperature=0, which should be a number greater than 0"),
        ({"name": "curriculum", "start": [0.5]}, r"has start=\[0.5\], which should be two quantiles"),
        ({"name": "curriculum", "end": [0.6, 0.2]}, r"has end=\[0.6, 0.2\]"),
        ({"name": "curriculum", "end": 3}, r"has end=3, which should be two quantiles"),
        ({"name": "curriculum", "steps": 0}, "has steps=0, which should be a whole number"),
    ],
)
def test_policies_that_cannot_be(policy: Any, match: str) -> None:
    with pytest.raises(GhostConfigError, match=match):
        policy_of(policy)
