"""What scores of Adam's own step need of the optimizer's state, micro-batch by micro-batch."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ghost.errors import ProtocolError
from ghost.preconditioner import AdamRule


class Moments:
    """Hands out the state of parameters.

    Args:
        rule: The optimizer's.
        parameters: By qualified name.
        micro_batches: How many a step has. With several, the squares of the samples' gradients are added up
            over the step, in a tensor as large as the parameter.
    """

    def __init__(self, rule: AdamRule, parameters: Mapping[str, nn.Parameter], micro_batches: int) -> None:
        self._rule, self._parameters, self._micro_batches = rule, dict(parameters), micro_batches
        self._done = 0
        self._squares: dict[int, Tensor] = {}

    def begin(self, first: bool) -> dict[str, list[Tensor]]:
        """For the next micro-batch, by qualified parameter name: the numbers `[7]` of
        `ghost.weigher`, m, v and the parameter; of a step with several micro-batches also the gradient
        so far and the sum of squares so far.

        Args:
            first: Whether it is a step's first.

        Raises:
            ProtocolError: There are more micro-batches than were said.
        """
        if first:
            self.release()
        self._done += 1
        if self._done > self._micro_batches:
            raise ProtocolError(
                "a step has more micro-batches than gradient_accumulation_steps="
                f"{self._micro_batches}, by which scores of the optimizer's own step know how much of it "
                "they have seen: set it to their number."
            )
        reach = torch.tensor([max(1.0, self._micro_batches / self._done)], dtype=torch.float64)
        found = {}
        for name, p in self._parameters.items():
            numbers, *rest = self._rule.tensors(p)
            found[name] = [torch.cat([numbers, reach]), *rest, *self._so_far(p)]
        return found

    def release(self) -> None:
        """Let go of what was added up over a step that has ended."""
        self._done, self._squares = 0, {}

    def _so_far(self, p: nn.Parameter) -> list[Tensor]:
        if self._micro_batches == 1:
            return []
        if id(p) not in self._squares:
            dtype = torch.promote_types(p.dtype, torch.float32)
            # In the order of its axes, so that views of it as a matrix are views.
            self._squares[id(p)] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        before = p.new_zeros(()).expand(p.shape) if p.grad is None or self._done == 1 else p.grad.detach()
        return [before.detach(), self._squares[id(p)]]
