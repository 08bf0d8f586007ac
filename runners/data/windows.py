"""Documents cut into windows of tokens: what the sources that tokenise in memory share."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from runners.choices import TaskName
from runners.data.base import DataBundle, Item, SampleSet, one_line, token_rows
from runners.data.tasks import text_bundle
from runners.tokenizer import decode, encode

# A causal model predicts each token from those before it, so a row of one token has nothing to score.
SHORTEST_WINDOW = 2


@dataclass(frozen=True)
class Document:
    domain: str
    name: str
    """Unique within its domain."""
    read: Callable[[], str]
    """The text, made when it is needed."""

    @property
    def id(self) -> str:
        return f"{self.domain}/{self.name}"


@dataclass(frozen=True)
class Window:
    sample_id: str
    domain: str
    tokens: NDArray[np.int32]
    """`[tokens]`, at most seq_len of them."""


class Corpus:
    """Documents that are tokenised and cut into windows once they are asked for.

    A document gives consecutive windows of `seq_len` tokens without overlap. The last one may be shorter,
    down to `shortest` tokens; a still shorter end is dropped and counted in `dropped_ends`.
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seq_len: int, shortest: int
    ) -> None:
        self.documents = documents
        self.ids = [document.id for document in documents]
        self.dropped_ends = 0
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._shortest = shortest
        self._pieces: dict[int, list[NDArray[np.int32]]] = {}

    @property
    def tokenised(self) -> int:
        """The number of documents tokenised so far."""
        return len(self._pieces)

    def count(self, i: int) -> int:
        """The number of windows of document i."""
        return len(self._cut(i))

    def window(self, i: int, k: int) -> Window:
        return Window(f"{self.ids[i]}#{k}", self.documents[i].domain, self._cut(i)[k])

    def _cut(self, i: int) -> list[NDArray[np.int32]]:
        if i not in self._pieces:
            tokens = encode(self._tokenizer, self.documents[i].read())
            pieces = [tokens[start : start + self._seq_len] for start in range(0, len(tokens), self._seq_len)]
            if pieces and len(pieces[-1]) < self._shortest:
                pieces.pop()
                self.dropped_ends += 1
            self._pieces[i] = pieces
        return self._pieces[i]


def fingerprint(windows: Iterable[Window]) -> str:
    """SHA-256 (hex) over the ids and the tokens, in order."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{window.sample_id}\0{len(window.tokens)}\0".encode())
        digest.update(window.tokens.astype("<i4").tobytes())
    return digest.hexdigest()


class WindowSet(SampleSet):
    """Windows held in memory as the samples of a causal language model: the labels are the input ids."""

    def __init__(
        self, windows: Sequence[Window], offset: int, seq_len: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.windows = windows
        self.offset = offset
        self.layout = token_rows(seq_len)
        self.sample_ids = [window.sample_id for window in windows]
        self.domains = [window.domain for window in windows]
        self._tokenizer = tokenizer

    def __getitem__(self, i: int) -> Item:
        ids = torch.from_numpy(self.windows[i].tokens.astype(np.int64))  # [T]
        return {"input_ids": ids}, ids.clone(), self.offset + i

    def preview(self, i: int, width: int = 80) -> str:
        return one_line(decode(self._tokenizer, self.windows[i].tokens), width)


def window_bundle(
    train: list[Window], val: list[Window], cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, source: str
) -> DataBundle:
    """Windows of at most `data.seq_len` tokens as samples for `data.task`; `source` names them in the log."""
    return text_bundle(
        WindowSet(train, 0, cfg.seq_len, tokenizer),
        WindowSet(val, len(train), cfg.seq_len, tokenizer),
        TaskName(cfg.task),
        len(tokenizer),
        fingerprint(train + val),
        f"{source}: {len(train)} training and {len(val)} validation windows of up to {cfg.seq_len} tokens",
    )
