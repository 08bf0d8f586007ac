"""Rows of text, each a sample of its own: with a class, or with a text to be made of it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from runners.data.base import PADDING_ID, Item, Layout, SampleSet, one_line
from runners.tokenizer import decode


@dataclass(frozen=True)
class TextRow:
    sample_id: str
    domain: str
    tokens: NDArray[np.int32]
    """`[T]`, at least one."""
    label: NDArray[np.int64]
    """A class `[]`, or the token ids `[L]` of the target."""


class TextRowSet(SampleSet):
    """Tokenised rows held in memory."""

    def __init__(
        self,
        rows: Sequence[TextRow],
        offset: int,
        width: int,
        label_width: int | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """`width`: of the token ids; `label_width`: of the target's, None for classes."""
        padding = PADDING_ID if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.layout = Layout({"input_ids": width, "attention_mask": width}, label_width, padding_id=padding)
        self.rows = rows
        self.offset = offset
        self.sample_ids = [row.sample_id for row in rows]
        self.domains = [row.domain for row in rows]
        self._tokenizer = tokenizer

    def __getitem__(self, i: int) -> Item:
        tokens = torch.from_numpy(self.rows[i].tokens.astype(np.int64))  # [T]
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return inputs, torch.tensor(self.rows[i].label), self.offset + i

    def preview(self, i: int, width: int = 80) -> str:
        return one_line(decode(self._tokenizer, self.rows[i].tokens), width)


def encode_whole(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int
) -> tuple[list[NDArray[np.int32]], int]:
    """Token ids with the tokenizer's own special tokens, and how many texts were cut to `longest` tokens."""
    rows = tokenizer(texts, return_attention_mask=False)["input_ids"]
    cut = [i for i, row in enumerate(rows) if len(row) > longest]
    if cut:
        # The tokenizer cuts, not a slice: special tokens at the end must stay.
        shorter = tokenizer(
            [texts[i] for i in cut], truncation=True, max_length=longest, return_attention_mask=False
        )["input_ids"]
        for i, row in zip(cut, shorter, strict=True):
            rows[i] = row
    return [np.asarray(row, dtype=np.int32) for row in rows], len(cut)


def fingerprint_rows(rows: Iterable[TextRow]) -> str:
    """SHA-256 (hex) over the ids, the tokens and the labels, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.sample_id}\0{len(row.tokens)}\0{row.label.shape}\0".encode())
        digest.update(row.tokens.astype("<i4").tobytes())
        digest.update(row.label.astype("<i8").tobytes())
    return digest.hexdigest()
