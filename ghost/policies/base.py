"""What a policy is, and the register of policies.

A policy weighs the samples of a step by their scores, in the step itself: it is asked when the last backward
is done, and the optimizer gets the gradient of the batch so weighed. With `l_i` sample i's own mean loss and
`a_i` its share of the step's loss (`Σ_i a_i l_i`; for a token mean `a_i` is the sample's share of the
tokens), weights `u` make it the weighted mean

    L_u = Σ_i u_i a_i l_i · (Σ_j a_j) / (Σ_j u_j a_j)

so that samples of weight one among samples of weight zero give the mean over themselves, by tokens where the
loss is a mean over tokens, and a common factor of all weights changes nothing. In terms of the samples' parts
`g_i` of the step's gradient

    ∇L_u = Σ_i w_i g_i,    w_i = u_i · (Σ_j a_j) / (Σ_j u_j a_j)

and `manager.weights` are these `w`. Where the loss is a sum, nothing is divided: `w = u`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from torch import Tensor

from ghost.errors import GhostConfigError, shown


@dataclass(frozen=True)
class StepSamples:
    """What is known of a step's B samples: those of all its micro-batches, and of all ranks, rank by rank.

    Rows that have no part in the step's loss, all of whose labels are -100, are not among them: no policy
    chooses them, and their weight is zero.

    Attributes:
        scores: `⟨∇L_val, g_i⟩`, `[B]`, or `[B, C]` where there are several validation sets or pairs; all
            finite, in the dtype of `manager.scores`.
        indices: Running indices, `[B]` int64.
        iteration: The optimizer step.
        lr: The largest learning rate of the optimizer's groups when the last backward was done.
        gram: `⟨g_i, g_j⟩`, `[B, B]`, where the policy needs it or `gram=True` asks for it; else None.
        curvatures: `⟨g_i, H Σ_j g_j⟩` of the whole batch, shaped as `scores`, where the policy needs them and
            `order=2`; else None.
    """

    scores: Tensor
    indices: Tensor
    iteration: int
    lr: float
    gram: Tensor | None = None
    curvatures: Tensor | None = None

    @property
    def totals(self) -> Tensor:
        """One score a sample, the columns added up, `[B]`."""
        return self.scores.flatten(1).sum(1) if self.scores.dim() > 1 else self.scores


class Policy(ABC):
    """A rule by which a step's samples are weighed.

    Attributes:
        name: What `config.policy` says, and errors call it.
    """

    name: ClassVar[str] = "own"

    @property
    def needs_gram(self) -> bool:
        """Whether it reads `StepSamples.gram`."""
        return False

    @property
    def needs_curvatures(self) -> bool:
        """Whether it reads `StepSamples.curvatures`, for which `order=2` takes a Hessian product more."""
        return False

    @abstractmethod
    def weigh(self, samples: StepSamples) -> Tensor:
        """Weights `[B]`, finite and not negative; zero drops a sample. Only their ratios matter, but for a
        loss that is a sum. Every rank asks, and must get the same.
        """


WeightFunction = Callable[[StepSamples], Tensor]
"""A policy of one's own: from what is known of the samples to weights `[B]`."""


@dataclass(frozen=True)
class Function(Policy):
    """A user's own function. It has the Gram matrix with `gram=True`, and curvatures with `order=2`."""

    name = "function"

    function: WeightFunction

    @property
    def needs_curvatures(self) -> bool:
        return True

    def weigh(self, samples: StepSamples) -> Tensor:
        return self.function(samples)


NO_POLICY = "none"
"""What `config.policy` says for the ordinary step, besides None."""

_POLICIES: dict[str, type[Policy]] = {}


def register_policy(policy: type[Policy]) -> type[Policy]:
    """Class decorator: `config.policy` finds the policy by its `name`.

    Raises:
        GhostConfigError: It has no name of its own, or that of no policy.
    """
    if policy.name in (Policy.name, NO_POLICY):
        raise GhostConfigError(
            f"name={policy.name!r} of {policy.__name__} stands for no policy in particular: give the class a "
            "name that config.policy can say."
        )
    _POLICIES[policy.name] = policy
    return policy


def policy_of(given: Any) -> Policy | None:
    """The policy that a setting means: a registered name, a mapping `{"name": …, **settings}`, a policy, or a
    function; None for the name `none`.

    Raises:
        GhostConfigError: There is no such policy, it has no such setting, or it is a class.
    """
    if isinstance(given, type):
        raise GhostConfigError(f"policy={given.__name__} is a class: give an instance, such as TopK(k=0.5).")
    if isinstance(given, Policy):
        return given
    if isinstance(given, str):
        return _named(given, {})
    if isinstance(given, Mapping):
        settings = {str(key): value for key, value in given.items()}
        return _named(settings.pop("name", None), settings)
    if callable(given):
        return Function(given)
    raise GhostConfigError(
        f"policy={shown(given)} should be a name, a mapping with a name, a Policy or a function."
    )


def _named(name: Any, settings: Mapping[str, Any]) -> Policy | None:
    kind = None if name == NO_POLICY else _POLICIES.get(name)
    if kind is None and name != NO_POLICY:
        names = ", ".join(sorted({*_POLICIES, NO_POLICY}))
        raise GhostConfigError(f"policy={shown(name)} should be one of {names}.")
    known: list[str] = [f.name for f in fields(kind)] if is_dataclass(kind) else []
    if unknown := sorted(set(settings) - set(known)):
        raise GhostConfigError(
            f"policy={name!r} has no setting {unknown[0]!r}: it has {', '.join(known) or 'none'}."
        )
    return None if kind is None else kind(**settings)


def check_count(policy: str, k: Any) -> None:
    """Raise `GhostConfigError` unless `k` is a count, or a fraction in (0, 1]."""
    is_count = type(k) is int and k >= 1
    if not is_count and not (type(k) is float and 0 < k <= 1):
        raise GhostConfigError(
            f"policy={policy!r} has k={shown(k)}, which should be a whole number of samples of at least 1, "
            "or a fraction of the step's samples above 0 and at most 1.0."
        )


def number_of(k: int | float, samples: int) -> int:
    """How many of the samples `k` means: itself, or its share of them rounded half up; at least one, at most
    all.
    """
    wanted = k if isinstance(k, int) else math.floor(k * samples + 0.5)
    return min(samples, max(1, wanted))


def check_number(policy: str, key: str, value: Any, *, above: float = -math.inf) -> None:
    """Raise `GhostConfigError` unless `value` is a finite number greater than `above`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not value > above:
        bound = "" if above == -math.inf else f" greater than {above:g}"
        raise GhostConfigError(
            f"policy={policy!r} has {key}={shown(value)}, which should be a number{bound}."
        )
