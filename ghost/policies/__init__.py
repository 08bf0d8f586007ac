"""Which of a step's samples its gradient is of, once their scores are known; importing this package registers
all rules.
"""

from ghost.policies.base import Function, Policy, StepSamples, policy_of, register_policy
from ghost.policies.greedy import Greedy
from ghost.policies.rules import All, BottomK, Curriculum, Softmax, Threshold, TopK

__all__ = [
    "All",
    "BottomK",
    "Curriculum",
    "Function",
    "Greedy",
    "Policy",
    "Softmax",
    "StepSamples",
    "Threshold",
    "TopK",
    "policy_of",
    "register_policy",
]
