"""Training steps of a Hugging Face model that benchmarks let take turns: plain ones and scored ones."""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn

from ghost import GhostEngineManager

Step = Callable[[], None]


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor) -> Step:
    """Zero_grad, forward, backward and optimizer step over `rows [b, T]`."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()

    return step


def scored_step(
    manager: GhostEngineManager, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor
) -> Step:
    """The same with the scores of `rows [b, T]`."""
    iteration = count()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with manager.step(rows, rows, batch_idx=range(len(rows)), iteration=next(iteration)) as scoring:
            scoring.backward(model(**scoring.inputs).loss)
        optimizer.step()

    return step


def attached_step(
    manager: GhostEngineManager, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor
) -> Step:
    """A `scored_step` whose manager is attached while it runs, so that several may have one model."""
    scored = scored_step(manager, model, optimizer, rows)
    manager.detach_for_evaluation()

    def step() -> None:
        manager.reattach_after_evaluation()
        scored()
        manager.detach_for_evaluation()

    return step
