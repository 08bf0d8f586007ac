"""What an optimizer makes of a gradient, so that scores are about the step that it really takes.

A score `⟨∇L_val, g_i⟩` takes the step to be the gradient itself. An optimizer that works element by element
moves a weight by `−η U(h)`, where `h` is the batch's gradient there, and a sample's part of it is worth
`⟨P ∘ ∇L_val, g_i⟩` with a slope `P` of `U`. For SGD with momentum `U` is a line and `P` a number. Adam's `U`
bends within a batch, above all at weights that few samples move, so that its slope at a point tells little.
Shapley values average over all subsets of the batch; their gradients cover, about, the range

    h/2 ± w,    w = max(|Σ_i g_i|, sqrt(Σ_i g_i²)) / 2,

and `P` is the slope of the chord of `U` over it (docs/optimizers.md has what was tried). A single sample's
`P g` is then the update that it makes, exactly; and since `|g_i| ≤ 2 w`, no sample is ever credited more than
the difference of two updates.
"""

from abc import ABC, abstractmethod
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghost.errors import GhostConfigError


class Preconditioner(Enum):
    """Which optimizer's step the scores are about: `NONE` takes the gradient for the step, `AUTO` asks the
    optimizer.
    """

    NONE = "none"
    ADAM = "adam"
    AUTO = "auto"


class Credit(Enum):
    """What of a gradient's effect through momentum is credited: this step's (`STEP`), or also that on all
    steps to come, were they like this one (`TRAJECTORY`).
    """

    STEP = "step"
    TRAJECTORY = "trajectory"


class UpdateRule(ABC):
    """How an optimizer turns gradients into steps.

    Args:
        optimizer: The loop's optimizer; its state is read, never changed.
        credit: What is credited.

    Attributes:
        clip: The last step's clipping coefficient, which is taken for the coming step's: that is known only
            when the whole gradient is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, credit: Credit) -> None:
        self._optimizer, self._credit, self.clip = optimizer, credit, 1.0
        self.read_groups()

    def read_groups(self) -> None:
        """Take up what the optimizer is as a step begins: `load_state_dict` gives it new groups.

        Raises:
            GhostConfigError: A setting is not handled.
        """
        self._refuse(self._optimizer)
        self._groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}

    def note_clip(self, clip: float) -> None:
        """Note a step's clipping coefficient; that of a skipped step says nothing."""
        if clip > 0:
            self.clip = clip

    def _group(self, p: nn.Parameter) -> dict[str, Any]:
        # A parameter that no group has is credited nothing, whatever its slope.
        return self._groups.get(id(p), self._optimizer.param_groups[0])

    @abstractmethod
    def _refuse(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise `GhostConfigError` where a setting of the optimizer is not handled."""

    @abstractmethod
    def factor(self, p: nn.Parameter) -> float:
        """What the scores of a parameter are multiplied by at the coming step."""


class SGDRule(UpdateRule):
    """`torch.optim.SGD`: with momentum μ and dampening τ a gradient counts `1 − τ` in the coming step (1 in
    the very first, `1 + μ` with Nesterov's), and `(1 − τ) / (1 − μ)` over all steps.
    """

    def _refuse(self, optimizer: torch.optim.Optimizer) -> None:
        refuse_settings(optimizer, maximize=False)
        if self._credit is Credit.STEP and not any(group["momentum"] for group in optimizer.param_groups):
            raise GhostConfigError(
                "credit='step' has no effect with SGD without momentum, whose step is a gradient's whole "
                "effect: leave it out."
            )

    def factor(self, p: nn.Parameter) -> float:
        group = self._group(p)
        momentum, first = group["momentum"], self._optimizer.state.get(p, {}).get("momentum_buffer") is None
        if momentum == 0:
            return 1.0
        fresh = 1.0 if first else 1.0 - group["dampening"]
        if self._credit is Credit.TRAJECTORY:
            return float(fresh / (1.0 - momentum))
        return float(1.0 + momentum * fresh if group["nesterov"] else fresh)


class AdamStep(NamedTuple):
    """One step of Adam, `U(h) = (carried · m + slope · h) / (sqrt(kept · v + fresh · h²) + eps)`, of the
    moments `m` and `v` before it; `h` is the gradient before it is clipped, plus `decay` times the parameter.

    Numbers, or tensors `[]` of them where a compiler is to take them for what changes from step to step.
    """

    carried: float | Tensor
    slope: float | Tensor
    kept: float | Tensor
    fresh: float | Tensor
    eps: float | Tensor
    decay: float | Tensor


class AdamRule(UpdateRule):
    """`torch.optim.Adam` and `AdamW`."""

    def read_groups(self) -> None:
        super().read_groups()
        self._counts = _step_counts(self._optimizer)

    def _refuse(self, optimizer: torch.optim.Optimizer) -> None:
        refuse_settings(optimizer, amsgrad=False, maximize=False)

    def factor(self, p: nn.Parameter) -> float:
        # Scores are of the gradient before clipping, and a value multiplies them by the step's coefficient.
        if self._credit is Credit.STEP:
            return 1.0 / self.clip
        beta = float(self._group(p)["betas"][0])
        return (1.0 - beta ** (self._steps(p) + 1)) / (1.0 - beta) / self.clip

    def _steps(self, p: nn.Parameter) -> int:
        """Steps that the parameter has behind it."""
        return self._counts.get(id(p), 0)

    def step(self, p: nn.Parameter) -> AdamStep:
        """The coming step."""
        group, number = self._group(p), self._steps(p) + 1
        first, second = (float(beta) for beta in group["betas"])
        unbiased, unbiased_square = 1.0 - first**number, 1.0 - second**number
        decoupled = isinstance(self._optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")
        return AdamStep(
            carried=first / unbiased, slope=self.clip * (1.0 - first) / unbiased,
            kept=second / unbiased_square, fresh=self.clip**2 * (1.0 - second) / unbiased_square,
            eps=float(group["eps"]),
            decay=0.0 if decoupled else float(group["weight_decay"]) / self.clip,
        )  # fmt: skip

    def tensors(self, p: nn.Parameter) -> list[Tensor]:
        """What `slope` reads: the step's numbers `[6]` float64 on the CPU, then m, v and the parameter."""
        state = self._optimizer.state.get(p, {})
        # A zero for each: compiled code takes no tensor twice.
        moments = [
            state[name] if name in state else p.detach().new_zeros(()).expand(p.shape)
            for name in ("exp_avg", "exp_avg_sq")
        ]
        numbers = torch.tensor(self.step(p), dtype=torch.float64)
        return [numbers, *moments, p.detach()]


def _step_counts(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Steps that each parameter has behind it, by `id`. Fused and capturable optimizers count on the GPU, and
    their counts come in one transfer.
    """
    counts = {id(p): state["step"] for p, state in optimizer.state.items() if "step" in state}
    remote: dict[torch.device, list[int]] = {}
    for key, count in counts.items():
        if isinstance(count, Tensor) and count.device.type != "cpu":
            remote.setdefault(count.device, []).append(key)
    for keys in remote.values():
        counts |= zip(keys, torch.stack([counts[key] for key in keys]).tolist(), strict=True)
    return {key: int(count) for key, count in counts.items()}


def slope(step: AdamStep, grad: Tensor, squares: Tensor, m: Tensor, v: Tensor, p: Tensor | None) -> Tensor:
    """The chord's slope of Adam's update over the range that a batch covers, element by element.

    With numerators `M` and denominators `D = R + eps`, at the end `n` of the range that is nearer to zero and
    at the other, `f`, the slope is `(M_f D_n − M_n D_f) / ((f − n) D_n D_f)`. Since
    `D_f − D_n = fresh (f² − n²) / (R_f + R_n)`, that is

        (slope · D_n − fresh · M_n (f + n) / (R_f + R_n)) / (D_n D_f),

    in which nothing is lost where `n` and the second moment are zero, or the range is short.

    Args:
        grad: `Σ_i g_i`.
        squares: `Σ_i g_i²`.
        m, v: The moments before the step.
        p: The parameter, where its decay is a part of the gradient; None where it is not.
    """
    ends = grad if p is None else grad + 2 * step.decay * p  # f + n
    width = torch.maximum(grad * grad, squares).sqrt().copysign(ends)  # f − n
    near, far, kept = (ends - width) / 2, (ends + width) / 2, step.kept * v
    root_near = (kept + step.fresh * (near * near)).sqrt()
    root_far = (kept + step.fresh * (far * far)).sqrt()
    tiny = torch.finfo(grad.dtype).tiny  # both are zero only where the range is a point
    bend = (step.carried * m + step.slope * near) * ends / (root_near + root_far + tiny)
    denominator = root_near + step.eps
    return (step.slope * denominator - step.fresh * bend) / (denominator * (root_far + step.eps))


_RULES: dict[type[torch.optim.Optimizer], type[UpdateRule]] = {
    torch.optim.SGD: SGDRule,
    torch.optim.Adam: AdamRule,
    torch.optim.AdamW: AdamRule,
}


def refuse_settings(optimizer: torch.optim.Optimizer, **needed: bool) -> None:
    """Raise `GhostConfigError` where a group of the optimizer has another setting than is needed."""
    for name, value in needed.items():
        for group in optimizer.param_groups:
            if group.get(name, value) != value:
                raise GhostConfigError(
                    f"preconditioner does not know {type(optimizer).__name__} with {name}={group[name]}: it "
                    f"should be {value}, or set preconditioner='none'."
                )


def update_rule(
    optimizer: torch.optim.Optimizer, preconditioner: Preconditioner, credit: Credit
) -> UpdateRule:
    """The rule for an optimizer.

    Raises:
        GhostConfigError: There is none, or the preconditioner is another optimizer's.
    """
    kind = _RULES.get(type(optimizer))
    name = type(optimizer).__name__
    if kind is None:
        known = ", ".join(sorted(known.__name__ for known in _RULES))
        raise GhostConfigError(
            f"preconditioner={preconditioner.value!r} does not know the optimizer {name}: it should be one "
            f"of {known}, or set preconditioner='none'."
        )
    if preconditioner is Preconditioner.ADAM and kind is not AdamRule:
        raise GhostConfigError(
            f"preconditioner='adam' is for Adam and AdamW, and the optimizer is {name}: set it to 'auto' or "
            "'none'."
        )
    return kind(optimizer, credit)
