"""What the optimizer makes of a step: its learning rates, and the one factor by which clipping has scaled the
gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghost.distributed import local, sum_over_shards

_WITNESS_NUMEL = 4096
_WITNESS_COUNT = 64  # even


@dataclass(frozen=True)
class Update:
    """A step that the optimizer is about to take.

    Attributes:
        lr: Learning rates `[R]`, one a parameter group, float64.
        clip: The clipping coefficient, 0-dim.
    """

    lr: Tensor
    clip: Tensor


class UpdateObserver:
    """Watches `optimizer.step()`.

    Gradients are clipped and unscaled between the backward and the step, in the user's own code. Both
    multiply every gradient by one number, so parts of a few gradients, kept after the backward and compared
    when the step begins, tell the number. A step that is skipped (an overflow under a GradScaler) is never
    observed.

    Args:
        optimizer: The loop's optimizer.
        model: The model, whose smallest and largest parameters bear witness: the one kind alone may have
            gradients of zero, as an adapter's first matrices do while its second are zero.
        check: Called when the gradients of a step are as the optimizer takes them; it raises where they
            cannot be.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, check: Callable[[], None] = lambda: None
    ) -> None:
        self._optimizer, self._check = optimizer, check
        trained = sorted((p for p in model.parameters() if p.requires_grad), key=nn.Parameter.numel)
        few = len(trained) <= _WITNESS_COUNT
        half = _WITNESS_COUNT // 2
        self._witnesses = trained if few else trained[:half] + trained[-half:]
        self._before: list[Tensor | None] = []
        self._scale: Tensor | None = None
        self._seen: Update | None = None
        self._hook = optimizer.register_step_pre_hook(self._on_step)

    def expect(self, scale: Tensor | None) -> None:
        """Note the gradients as the backward left them, `scale` being the loss scale in them."""
        parts = [_part(p.grad) for p in self._witnesses]
        self._before = [None if part is None else part.clone() for part in parts]
        self._scale, self._seen = scale, None

    def take(self) -> Update | None:
        """The update seen since `expect`, or None."""
        return self._seen

    def close(self) -> None:
        """Stop watching."""
        self._hook.remove()

    def groups(self) -> dict[int, int]:
        """The parameter group of each parameter, by `id`."""
        return {id(p): i for i, group in enumerate(self._optimizer.param_groups) for p in group["params"]}

    def rates(self) -> Tensor:
        """The groups' learning rates as they are now, `[R]` float64."""
        groups = self._optimizer.param_groups
        return torch.stack([torch.as_tensor(group["lr"], dtype=torch.float64).cpu() for group in groups])

    def skipped(self) -> Update:
        """What a step is that the optimizer never took: it credits nothing."""
        return Update(torch.zeros_like(self.rates()), torch.zeros((), dtype=torch.float64))

    def _on_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Observe the step now, or where it has a closure that computes the gradients first, behind that."""
        itself, *given = args
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self._observe()
            return None

        def observed() -> Any:
            loss = closure()
            self._observe()
            return loss

        return (itself, observed, *given[1:]), {k: v for k, v in kwargs.items() if k != "closure"}

    def _observe(self) -> None:
        self._check()
        if not self._before:
            return
        now = [_part(p.grad) for p in self._witnesses]
        pairs = [
            (before.double(), after.double())
            for before, after in zip(self._before, now, strict=True)
            if before is not None and after is not None
        ]
        clip = torch.ones((), dtype=torch.float64)
        if pairs:
            before, after = (torch.cat(side) for side in zip(*pairs, strict=True))
            # Of shards every rank sees its own part, which may be zero or empty.
            products = sum_over_shards(torch.stack([before @ after, before @ before]), self._witnesses)
            clip = torch.where(products[1] > 0, products[0] / products[1], torch.ones_like(products[0]))
            if self._scale is not None:
                clip = clip * self._scale
        # Fused optimizers unscale by themselves, and step on an overflow as well, doing nothing.
        still_scaled = getattr(self._optimizer, "grad_scale", None)
        overflow = getattr(self._optimizer, "found_inf", None)
        if still_scaled is not None:
            clip = clip / still_scaled.to(clip)
        if overflow is not None:
            clip = torch.where(overflow.to(clip) > 0, torch.zeros_like(clip), clip)
        self._seen, self._before = Update(self.rates(), clip), []


def _part(grad: Tensor | None) -> Tensor | None:
    """Numbers of a gradient, `_WITNESS_NUMEL` at most, from its first rows; of a shard its own, of a sparse
    one none.
    """
    if grad is None or grad.layout is not torch.strided:
        return None
    own = local(grad.detach())
    rows = own if own.dim() > 0 else own[None]
    number = max(1, _WITNESS_NUMEL // max(1, rows.shape[1:].numel()))
    return rows[:number].flatten()[:_WITNESS_NUMEL]
