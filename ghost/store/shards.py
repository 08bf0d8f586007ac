"""All shards of a store as one sequence of rows, mapped as they are needed."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ghost.store.codec import codec
from ghost.store.files import check_size
from ghost.store.manifest import Contents, Facts
from ghost.store.shard import map_ids, map_norms, map_scales, map_values, read_only_tensor

_MAPS = 512  # each holds a file open, of which a process may commonly have 1,024


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one shard.

    Attributes:
        start: Number of the first in the store.
        values: `[n, K]` as stored, memory-mapped.
        scales: `[n]` float32 factors of int8 rows; None for other formats.
    """

    start: int
    values: Tensor
    scales: Tensor | None

    @property
    def stop(self) -> int:
        """One more than the number of the last."""
        return self.start + len(self.values)


class Shards:
    """The rows of all shards, numbered from 0 in stored order.

    Args:
        directory: The store's folder.
        facts: What the rows are.
        contents: The files.

    Raises:
        StoreError: A file is missing, or has another length or header than was written.
    """

    def __init__(self, directory: Path, facts: Facts, contents: Contents) -> None:
        self.directory, self.facts, self.codec = directory, facts, codec(facts.dtype)
        self.shards = [shard for shard in contents.shards if shard.rows]
        self.starts = np.cumsum([0, *(shard.rows for shard in self.shards)])  # [shards + 1]
        self._maps: OrderedDict[int, Tensor] = OrderedDict()
        for file in contents.files:
            check_size(directory, file)
        for i in range(len(self.shards)):
            self.values(i)
        ids = [map_ids(directory, shard) for shard in self.shards]
        self.ids = np.concatenate(ids) if ids else np.empty(0, np.int64)  # [N]
        scales = [map_scales(directory, shard, facts) for shard in self.shards]
        known = [factors for factors in scales if factors is not None]
        self._scales = torch.from_numpy(np.concatenate(known)) if known else None  # [N]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """K."""
        return self.facts.layout.width

    def values(self, i: int) -> Tensor:
        """The stored values `[n, K]` of the i-th shard."""
        if i in self._maps:
            self._maps.move_to_end(i)
        else:
            self._maps[i] = map_values(self.directory, self.shards[i], self.facts)
            if len(self._maps) > _MAPS:
                self._maps.popitem(last=False)
        return self._maps[i]

    def norms(self, i: int) -> Tensor:
        """The slices' lengths `[n, S]` float32 of the i-th shard."""
        return read_only_tensor(map_norms(self.directory, self.shards[i], self.facts))

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """The rows from `start` to before `stop`, shard by shard."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for i in range(first, len(self.shards)):
            begin = int(self.starts[i])
            if begin >= stop:
                return
            low, high = max(start, begin), min(stop, int(self.starts[i + 1]))
            scales = None if self._scales is None else self._scales[low:high]
            yield Span(low, self.values(i)[low - begin : high - begin], scales)

    def decoded(self, start: int, stop: int) -> Tensor:
        """Consecutive rows `[stop - start, K]` float32, in memory of their own."""
        out = torch.empty(stop - start, self.width)
        for span in self.spans(start, stop):
            rows = out[span.start - start : span.stop - start]
            rows.copy_(span.values)
            if span.scales is not None:
                rows *= span.scales[:, None]
        return out

    def taken(self, numbers: np.ndarray) -> Tensor:
        """The rows of any numbers `[n]`, as float32 `[n, K]`, in memory of their own."""
        out = torch.empty(len(numbers), self.width)
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        for i in np.unique(owners):
            here = torch.from_numpy(np.flatnonzero(owners == i))
            local = torch.from_numpy(numbers)[here] - int(self.starts[i])
            out[here] = self.values(int(i))[local].to(torch.float32)
        if self._scales is not None:
            out *= self._scales[torch.from_numpy(numbers)][:, None]
        return out
