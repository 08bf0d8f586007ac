"""Values of which a row may have any number, such as the images of a text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ghost.errors import BatchError


@dataclass(frozen=True)
class Items:
    """Values of which a row may have none, one or several, such as the images of a text.

    Attributes:
        values: `[n, …]`, n items of all rows, those of a row next to each other, in the rows' order.
        row: `[n]` int64, ascending: the row that each item belongs to.
    """

    values: Tensor
    row: Tensor


def check_items(items: Items, rows: int, which: str) -> None:
    """Raise `BatchError` unless the items are of a batch's `rows` rows; `which` begins the sentence."""
    values, row = items.values, items.row
    for tensor in (values, row):
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise BatchError(f"{which} that are not tensors: give values [n, …] and row [n].")
    if row.dtype is not torch.int64 or row.shape != values.shape[:1]:
        raise BatchError(
            f"{which} with {values.shape[0]} values, but row of shape {tuple(row.shape)} and {row.dtype}: "
            "give one int64 each."
        )
    if bool((row.diff() < 0).any()):
        raise BatchError(f"{which} whose row is not ascending: a model takes items row by row.")
    if len(row) and not 0 <= int(row[0]) <= int(row[-1]) < rows:
        raise BatchError(
            f"{which} of rows {int(row[0])} to {int(row[-1])}, but the batch has {rows} rows: count from 0."
        )


def items_of(items: Items, rows: Tensor) -> Items:
    """The items of the given rows `[k]`, which become rows 0 to k - 1 in this order."""
    # [k, n] is searched along its first axis first: row by row.
    row, item = (rows[:, None] == items.row).nonzero(as_tuple=True)
    return Items(items.values[item], row)


def joined_items(train: Items | None, val: Items | None, train_rows: int) -> Items:
    """Training items, then validation items, whose rows stand behind `train_rows` others; one side may have
    none.
    """
    given = [side for side in (train, val) if side is not None]
    some = [side for side in given if len(side.row)] or given[:1]
    rows = [side.row + train_rows if side is val else side.row for side in some]
    return Items(torch.cat([side.values for side in some]), torch.cat(rows))
