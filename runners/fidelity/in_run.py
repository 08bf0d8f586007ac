"""In-run values by the library in a plain loop, as docs/library.md shows it, and the batches of a loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghost import GhostEngineManager
from ghost.batch import Inputs, take_rows
from runners.errors import DataError

LossFn = Callable[[nn.Module, Inputs, Tensor], Tensor]
"""`loss_fn(model, X, Y)`: a batch's mean loss."""


@dataclass(frozen=True)
class Rows:
    """Samples where the model is: inputs and labels with a row each."""

    X: Inputs
    Y: Tensor

    def __len__(self) -> int:
        return len(self.Y)

    def take(self, rows: Tensor) -> "Rows":
        """The rows at these positions `[b]`."""
        rows = rows.to(self.Y.device)
        return Rows(take_rows(self.X, rows), self.Y[rows])


@dataclass(frozen=True)
class InRunValues:
    """Values of all samples, summed over the steps of a run.

    Attributes:
        first_order: `[n, C]` float64 on the CPU, a column for each validation set, or each sample of one with
            `pairwise`.
        second_order: The same; None where the manager's `order` is 1.
        loss_fall: What each set's loss fell by over the run, `[C]` float64: what exact values add up to.
    """

    first_order: Tensor
    second_order: Tensor | None
    loss_fall: Tensor

    def sums(self) -> dict[str, float]:
        """The sum of all values by method, and the fall in loss that they are shares of."""
        found = {"loss_fall": float(self.loss_fall.sum())}
        found["sum_of_values/first_order"] = float(self.first_order.sum())
        if self.second_order is not None:
            found["sum_of_values/second_order"] = float(self.second_order.sum())
        return found


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, batches: Iterable[Tensor],
    loss_fn: LossFn, after: Callable[[int], None],
) -> None:  # fmt: skip
    """Train on the batches, positions `[b]` of rows each, and call `after(steps done)` after every step."""
    for step, batch in enumerate(batches):
        chosen = rows.take(batch)
        optimizer.zero_grad()
        loss_fn(model, chosen.X, chosen.Y).backward()
        optimizer.step()
        after(step + 1)


def train_scored(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, batches: Iterable[Tensor],
    loss_fn: LossFn, after: Callable[[int], None], *, val: Rows | Mapping[str, Rows],
    settings: Mapping[str, Any],
) -> InRunValues:  # fmt: skip
    """The same training with values of its samples.

    Args:
        val: What values are about: validation rows, or several sets of them by name.
        settings: The manager's.

    Raises:
        DataError: The run diverged.
    """
    sets = {name: (one.X, one.Y) for name, one in val.items()} if isinstance(val, Mapping) else (val.X, val.Y)
    before = _losses(model, val, loss_fn)
    manager = GhostEngineManager(settings, model, optimizer, val_data=sets, loss_fn=loss_fn)
    columns = len(val) if settings.get("pairwise") else len(before)
    first = torch.zeros(len(rows), columns, dtype=torch.float64)
    curved = torch.zeros_like(first)
    try:
        for step, batch in enumerate(batches):
            chosen, lr = rows.take(batch), float(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            with manager.step(chosen.X, chosen.Y, batch_idx=batch, iteration=step) as scored:
                scored.backward(loss_fn(model, scored.X, scored.Y))
            first[batch] += lr * _columns(manager.scores)
            if manager.config.order == 2:
                curved[batch] += lr**2 / 2 * _columns(manager.curvatures)
            optimizer.step()
            after(step + 1)
    finally:
        manager.cleanup()
    fall = before - _losses(model, val, loss_fn)
    if not all(found.isfinite().all() for found in (first, curved, fall)):
        raise DataError(
            "values or the loss are not finite: the run diverged, and needs a lower learning rate"
        )
    second = first - curved if manager.config.order == 2 else None
    return InRunValues(first, second, fall)


def _losses(model: nn.Module, val: Rows | Mapping[str, Rows], loss_fn: LossFn) -> Tensor:
    """Each validation set's loss, `[C]` float64."""
    sets = list(val.values()) if isinstance(val, Mapping) else [val]
    with torch.no_grad():
        return torch.tensor([float(loss_fn(model, one.X, one.Y)) for one in sets], dtype=torch.float64)


def _columns(scores: Tensor) -> Tensor:
    return scores.detach().double().cpu().reshape(len(scores), -1)  # [b, C]


def epochs(
    samples: int, batch_size: int, seed: int, together: Sequence[Sequence[int]] = (),
    key: str = "batch_size",
) -> Iterator[Tensor]:  # fmt: skip
    """Endless batches, positions `[b]` each; every epoch is a new permutation, whose rest that fills no batch
    is left out: in a short batch a sample would weigh more.

    Args:
        together: Samples that are always in one batch, each group in one of its own; no more groups than an
            epoch has batches, and none larger than a batch.
        key: What the batch's size is called in the config.

    Raises:
        DataError: There are fewer samples than fill a batch.
    """
    if samples < batch_size:
        raise DataError(f"{samples} samples do not fill a batch: lower fidelity.{key}={batch_size}")
    generator = torch.Generator().manual_seed(seed)
    grouped = [i for group in together for i in group]
    single = torch.ones(samples, dtype=torch.bool)
    single[grouped] = False
    alone = single.nonzero().flatten()
    full = samples // batch_size
    while True:
        homes = torch.randperm(full, generator=generator)[: len(together)].tolist()
        guests = dict(zip(homes, together, strict=True))
        order = alone[torch.randperm(len(alone), generator=generator)]
        taken = 0
        for number in range(full):
            group = torch.tensor(list(guests.get(number, ())), dtype=torch.int64)
            free = batch_size - len(group)
            yield torch.cat([group, order[taken : taken + free]])
            taken += free
