"""Greedy selection of samples that help together.

Wang et al., *GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration* (NeurIPS
2024), add one sample after the other to the chosen set S, each time the one with the largest gain

    gain_i(S) = η ⟨G, ĝ_i⟩ − η² ⟨ĝ_i, H Σ_{j ∈ S} ĝ_j⟩

in the validation loss, with H approximated by the identity, so that the interaction is the samples' Gram
matrix. Here `ĝ_i = (B / k) g_i`, since a step over k of B samples is the mean over the k. First order leaves
the interaction out, and is the k largest scores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ghost.errors import GhostConfigError, shown
from ghost.policies.base import Policy, StepSamples, check_count, number_of, register_policy
from ghost.policies.rules import only


@register_policy
@dataclass(frozen=True)
class Greedy(Policy):
    """k samples, chosen one after the other by what each adds to those before it.

    Attributes:
        k: A count, or a fraction of the step's samples. A step with fewer than k samples keeps them all.
        order: 1 for the scores alone; 2 for the interaction with what has been chosen, which takes the Gram
            matrix.
    """

    name = "greedy"

    k: int | float = 0.5
    order: int = 2

    def __post_init__(self) -> None:
        check_count(self.name, self.k)
        if type(self.order) is not int or self.order not in (1, 2):
            raise GhostConfigError(
                f"policy={self.name!r} has order={shown(self.order)}, which should be 1 or 2."
            )

    @property
    def needs_gram(self) -> bool:
        return self.order == 2

    def weigh(self, samples: StepSamples) -> Tensor:
        gains = samples.totals.double().cpu()  # over η B / k, which changes no order
        k = number_of(self.k, len(gains))
        interaction = torch.zeros(len(gains), len(gains), dtype=torch.float64)
        if self.order == 2:
            assert samples.gram is not None, "it is asked for"
            interaction = samples.lr * len(gains) / k * samples.gram.double().cpu()
        chosen = []
        left = torch.zeros_like(gains)  # -inf where chosen
        for _ in range(k):
            best = int((gains + left).argmax())  # of equal gains the first
            chosen.append(best)
            left[best] = -torch.inf
            gains = gains - interaction[best]
        return only(torch.tensor(chosen, device=samples.scores.device), samples.totals)
