"""Which sample a row is: training rows that carry their running index through shuffling, worker processes and
collators.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from ghost.errors import BatchError

SAMPLE_INDEX = "sample_index"
"""The key under which a row, and a batch of rows, has its running index."""


class IndexedRows(Dataset[Any]):
    """A map-style data set whose rows know their number in it.

    A row that is a mapping gets the key `sample_index`, unless it has one of its own; of a tuple or list the
    number becomes the last entry.

    Args:
        dataset: Any object with `__len__` and `__getitem__`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index]
        if isinstance(row, Mapping):
            return {SAMPLE_INDEX: index, **row}
        if isinstance(row, tuple | list):
            return (*row, index)
        raise BatchError(
            f"row {index} of the training data is a {type(row).__name__}: give a mapping or a tuple, which "
            "can carry the row's index."
        )


@dataclass(frozen=True)
class IndexedCollator:
    """Makes a batch of rows without their indices by another collator, and puts the indices back.

    Attributes:
        collate: From a list of mappings to a batch, a mapping that may be added to.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, rows: Sequence[Any]) -> Any:
        for row in rows:
            if not isinstance(row, Mapping) or SAMPLE_INDEX not in row:
                keys = f"only {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
                raise BatchError(
                    f"a training row has no {SAMPLE_INDEX!r} ({keys}): rows of a data set without numbers "
                    "are mappings with their running index under that key."
                )
        batch = self.collate([{k: v for k, v in row.items() if k != SAMPLE_INDEX} for row in rows])
        batch[SAMPLE_INDEX] = torch.tensor([int(row[SAMPLE_INDEX]) for row in rows])
        return batch
