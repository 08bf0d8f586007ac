"""What a data source gives the training loop: samples with stable ids, and batches with their indices."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from runners.errors import ConfigError

Inputs = torch.Tensor | dict[str, torch.Tensor]
Item = tuple[Inputs, torch.Tensor, int]


@dataclass(frozen=True)
class Batch:
    """One training or validation micro-batch, on CPU."""

    inputs: Inputs
    """Language: `input_ids` `[b, T]` int64, and `attention_mask` `[b, T]` int64 only if a row is shorter than
    T. Tables and images: one float32 tensor `[b, ...]`."""
    labels: torch.Tensor
    """Language: `[b, T]` int64, -100 where not counted, not shifted. Classes: `[b]` int64."""
    index: torch.Tensor
    """`[b]` int64: the samples' running indices, the `index` column of samples.parquet."""


class SampleSet(Dataset[Item], ABC):
    """Samples in a fixed order; item i has the id `sample_ids[i]` and the running index `offset + i`."""

    sample_ids: Sequence[str]
    domains: Sequence[str]
    offset: int
    seq_len: int | None = None
    """The width to which short rows of token ids are padded; None for tables and images."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    @abstractmethod
    def __getitem__(self, i: int) -> Item:
        """Inputs and labels of one sample without the batch dimension, unpadded, and its running index."""

    @abstractmethod
    def preview(self, i: int, width: int = 80) -> str:
        """One line of readable text about sample i, at most `width` characters, made on demand."""


@dataclass(frozen=True)
class DataBundle:
    train: SampleSet
    val: SampleSet
    vocab_size: int | None
    """Language only."""
    input_shape: tuple[int, ...] | None
    """Tables and images only: the shape of one input, without the batch dimension."""
    num_classes: int | None
    """Tables and images only."""
    fingerprint: str
    """SHA-256 (hex) over the samples' ids and content."""
    description: str
    """One line for the log."""


def require_at_least(cfg: Any, key: str, least: int) -> None:
    """Raises ConfigError if `data.<key>` is set and below `least`."""
    value = cfg[key]
    if value is not None and value < least:
        raise ConfigError(f"data.{key}={value} is too small; it must be at least {least}.")


def one_line(text: str, width: int) -> str:
    """The text with runs of white space made one blank, cut to `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
