"""From scores to Shapley values: `value_i = Σ_steps η_t · c_t · score_i^(t)`, the fall in validation loss
credited to a sample.

With SGD this is first-order In-Run Data Shapley (Wang et al., ICLR 2025, Theorem 3), signed so that positive
values help.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def row_values(shard: Mapping[str, Tensor]) -> Tensor:
    """Each row's value `η_t · c_t · score`, `[n]` float64, summed over parameter groups."""
    weighted = shard["score"].double() * shard["lr"].double()
    summed = weighted.sum(1) if weighted.dim() > 1 else weighted
    return summed * shard["clip"].double()


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


def accumulate(shards: Iterable[Mapping[str, Tensor]]) -> SampleValues:
    """Values summed over all rows of all shards; memory is the number of samples, not of rows.

    Rows whose value is not finite are left out and counted in a warning: one of them would hide all other
    rows of its sample.
    """
    value, seen, lost = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), 0
    for shard in shards:
        rows, sample = row_values(shard), shard["sample"].long()
        finite = rows.isfinite()
        lost += int((~finite).sum())
        rows, sample = rows[finite], sample[finite]
        grown = max(value.numel(), int(sample.max()) + 1 if sample.numel() else 0) - value.numel()
        value, seen = torch.cat([value, value.new_zeros(grown)]), torch.cat([seen, seen.new_zeros(grown)])
        value.index_add_(0, sample, rows)
        seen.index_add_(0, sample, torch.ones_like(sample))
    if lost:
        log.warning("%d score rows are not finite and are left out of the values.", lost)
    scored = seen.nonzero().flatten()
    return SampleValues(scored, value[scored], seen[scored])
