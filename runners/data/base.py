"""What a data source gives the training loop: samples with stable ids, and batches with their indices."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset

from conf.errors import ConfigError
from ghost.batch import Items
from runners.choices import TaskName

Inputs = torch.Tensor | dict[str, torch.Tensor | Items]
SampleInputs = torch.Tensor | dict[str, torch.Tensor]
Item = tuple[SampleInputs, torch.Tensor, int]

# Causal models never let a counted token see the padding after it, and elsewhere an attention mask hides it,
# so any id of the vocabulary serves.
PADDING_ID = 0


@dataclass(frozen=True)
class Batch:
    """One training or validation micro-batch, on CPU."""

    inputs: Inputs
    """Token ids: `input_ids` `[b, T]` int64 and `attention_mask` `[b, T]` int64 (language: only if a row is
    shorter than T). Images beside text: `pixel_values`, Items of `[images, 3, H, W]` float32. Tables and
    images alone: one float32 tensor `[b, ...]`."""
    labels: torch.Tensor
    """Tokens: `[b, T]` int64, -100 where not counted, not shifted. Classes: `[b]` int64."""
    index: torch.Tensor
    """`[b]` int64: the samples' running indices, the `index` column of samples.parquet."""


@dataclass(frozen=True)
class Layout:
    """How samples of different sizes become one batch."""

    widths: Mapping[str, int] = field(default_factory=dict)
    """By input key, the width to which rows of integers are padded on the right."""
    label_width: int | None = None
    """The width to which labels are padded; None: a label is one number."""
    items: frozenset[str] = frozenset()
    """Input keys of which a sample has any number of values, `[k, ...]`."""
    padding_id: int = PADDING_ID
    """What stands in `input_ids` after a row's end."""


def token_rows(seq_len: int) -> Layout:
    """The layout of language samples: as many labels as token ids."""
    return Layout({"input_ids": seq_len}, seq_len)


class SampleSet(Dataset[Item], ABC):
    """Samples in a fixed order; item i has the id `sample_ids[i]` and the running index `offset + i`."""

    sample_ids: Sequence[str]
    domains: Sequence[str]
    offset: int
    layout: Layout = Layout()

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
    task: TaskName
    vocab_size: int | None
    """Token ids only."""
    input_shape: tuple[int, ...] | None
    """Tables and images only: the shape of one row of a table, or of one image."""
    num_classes: int | None
    """Classes only."""
    fingerprint: str
    """SHA-256 (hex) over the samples' ids and content."""
    description: str
    """One line for the log."""
    test: SampleSet | None = None
    """Held out like `val`, and never scored with; numbered after it."""


def require_at_least(cfg: Any, key: str, least: int) -> None:
    """Raises ConfigError if `data.<key>` is set and below `least`."""
    value = cfg[key]
    if value is not None and value < least:
        raise ConfigError(f"data.{key}={value} is too small; it must be at least {least}.")


def one_line(text: str, width: int) -> str:
    """The text with runs of white space made one blank, cut to `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
