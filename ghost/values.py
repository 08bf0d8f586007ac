"""From scores to Shapley values: `value_i = Σ_steps η_t · c_t · score_i^(t)`, the fall in validation loss
credited to a sample.

With SGD this is first-order In-Run Data Shapley (Wang et al., ICLR 2025, Theorem 3), signed so that positive
values help. Where shards have curvatures, a step's value is of second order,
`η c · score − (η c)²/2 · curvature` (Theorem 4; `ghost.second_order`). Where they have weights, of a policy's
(`ghost.policies`), a step's value is so many times that: what a sample has added to the step that was taken.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ghost.scores import read_columns

log = logging.getLogger(__name__)


def row_values(shard: Mapping[str, Tensor]) -> Tensor:
    """Each row's value `η_t · c_t · score`, less `(η_t · c_t)²/2 · curvature` where there is one, times the
    sample's weight where a policy gave one, `[n]` float64, summed over the columns of wide scores.

    A step that was not taken (`c_t` = 0) gives nothing, also where an overflow made its scores infinite.
    """
    return column_values(shard, shard["score"].shape[1:].numel()).sum(1)


def column_values(shard: Mapping[str, Tensor], columns: int) -> Tensor:
    """What each of K `columns` adds to the rows' values, `[n, K]` float64."""
    clip = shard["clip"].double()[:, None]  # [n, 1]
    moved = shard["lr"].double().reshape(len(clip), columns) * clip
    values = shard["score"].double().reshape(len(clip), columns) * moved
    if "curvature" in shard:
        values = values - shard["curvature"].double().reshape(len(clip), columns) * moved.square() / 2
    if "weight" in shard:
        values = values * shard["weight"].double()[:, None]
    return torch.where(clip == 0, torch.zeros_like(values), values)


def read_shards(directory: Path) -> Iterator[dict[str, Tensor]]:
    """The score shards of a run, in the order in which they were written."""
    for path in sorted(directory.glob("shard-*.pt")):
        yield torch.load(path, weights_only=True)


@dataclass(frozen=True)
class SampleValues:
    """Values of the samples that were scored, by ascending running index.

    Attributes:
        sample: Running indices `[n]` int64.
        value: `[n]` float64; positive helps.
        times_seen: How often a sample was scored, `[n]` int64.
    """

    sample: Tensor
    value: Tensor
    times_seen: Tensor


class _Sum:
    """Values summed sample by sample; memory is the number of samples, not of rows."""

    def __init__(self) -> None:
        self._value = torch.zeros(0, dtype=torch.float64)
        self._seen = torch.zeros(0, dtype=torch.int64)
        self.lost = 0

    def add(self, sample: Tensor, rows: Tensor) -> None:
        """Add values `[n]` of samples `[n]`; those that are not finite are counted and left out."""
        finite = rows.isfinite()
        self.lost += int((~finite).sum())
        rows, sample = rows[finite], sample[finite].long()
        size = max(len(self._value), int(sample.max()) + 1 if len(sample) else 0)
        self._value = F.pad(self._value, (0, size - len(self._value)))
        self._seen = F.pad(self._seen, (0, size - len(self._seen)))
        self._value.index_add_(0, sample, rows)
        self._seen.index_add_(0, sample, torch.ones_like(sample))

    def result(self) -> SampleValues:
        scored = self._seen.nonzero().flatten()
        return SampleValues(scored, self._value[scored], self._seen[scored])


def accumulate(shards: Iterable[Mapping[str, Tensor]]) -> SampleValues:
    """Values summed over all rows and columns of all shards.

    Rows whose value is not finite are left out and counted in a warning: one of them would hide all other
    rows of its sample.
    """
    total = _Sum()
    for shard in shards:
        total.add(shard["sample"], row_values(shard))
    if total.lost:
        log.warning("%d score rows are not finite and are left out of the values.", total.lost)
    return total.result()


def accumulate_columns(directory: Path) -> dict[tuple[str, str], SampleValues]:
    """Values by part of the model and validation set, or for pairs validation row (its number in the
    validation data); they sum to `accumulate`'s, and of the same rows.

    Args:
        directory: The folder of the score shards.
    """
    sums: dict[tuple[str, str], _Sum] = defaultdict(_Sum)
    for path in sorted(directory.glob("shard-*.pt")):
        shard = torch.load(path, weights_only=True)
        columns = read_columns(path)
        finite = row_values(shard).isfinite()  # a row counts whole or not at all
        shard = {name: column[finite] for name, column in shard.items()}
        values = column_values(shard, len(columns))
        for k, column in enumerate(columns):
            if "val" not in shard:
                sums[column.part, column.val].add(shard["sample"], values[:, k])
                continue
            rows = shard["val"][:, k % shard["val"].shape[1]]  # each part has a column for each pair
            for row in rows.unique().tolist():
                sums[column.part, str(row)].add(shard["sample"][rows == row], values[rows == row, k])
    return {key: found.result() for key, found in sums.items()}


def samples_without_value(directory: Path) -> set[int]:
    """Running indices of the samples with a score row that is not finite."""
    lost: set[int] = set()
    for shard in read_shards(directory):
        lost.update(shard["sample"][~row_values(shard).isfinite()].tolist())
    return lost


def values_by_sample(directory: Path) -> dict[int, tuple[float, int]]:
    """Value and times seen of every sample that was scored, by ascending running index.

    A sample with a score that is not finite has no value: NaN; `times_seen` counts its other rows.

    Args:
        directory: The folder of the score shards.
    """
    found = accumulate(read_shards(directory))
    rows = zip(found.sample.tolist(), found.value.tolist(), found.times_seen.tolist(), strict=True)
    values = {index: (value, seen) for index, value, seen in rows}
    for index in samples_without_value(directory):
        _, seen = values.get(index, (math.nan, 0))
        values[index] = math.nan, seen
    return dict(sorted(values.items()))
