"""Memory-mapped token files as samples: what `python -m runners.prepare` wrote, or bare `.bin` files."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from conf.errors import ConfigError
from runners.choices import TaskName
from runners.data.base import DataBundle, Item, SampleSet, one_line, require_at_least, token_rows
from runners.data.selection import choose
from runners.data.tasks import text_bundle
from runners.data.tokenfiles import DTYPES, META, DomainTokens, LazyStrings, Meta, TokenFile, open_prepared
from runners.data.windows import SHORTEST_WINDOW
from runners.errors import DataError
from runners.tokenizer import decode, load_tokenizer

log = logging.getLogger(__name__)

BARE_VALIDATION = "val"


def build_tokens(cfg: DictConfig) -> DataBundle:
    """Windows of `data.seq_len` tokens of the documents in `data.path`; a document's last window may be
    shorter.

    The samples, their ids and the split are those of `data=text` on the same documents. A folder without
    `meta.json` needs `data.dtype` and `data.vocab_size`; its windows stand for documents, and a file
    `val.bin` beside others is the validation side.

    Raises ConfigError for keys that do not fit the folder, DataError for files that are damaged or hold too
    little.
    """
    require_at_least(cfg, "seq_len", SHORTEST_WINDOW)
    require_at_least(cfg, "train_samples", 1)
    require_at_least(cfg, "val_samples", 1)
    folder = Path(cfg.path)
    if (folder / META).is_file():
        _refuse_bare_keys(cfg)
        meta = Meta.read(folder)
        tokenizer, vocab_size = meta.tokenizer, meta.vocab_size
        store = TokenStore(open_prepared(folder, meta), cfg.seq_len, documents_known=True)
    else:
        tokenizer, vocab_size = None, cfg.vocab_size
        store = TokenStore(_open_bare(cfg, folder), cfg.seq_len, documents_known=False)
    train_keys, val_keys = choose(
        store.documents,
        store.count,
        cfg.train_samples,
        cfg.val_samples,
        cfg.seed,
        held=store.marked_validation(),
    )
    train = TokenSet(store, train_keys, 0, tokenizer)
    val = TokenSet(store, val_keys, len(train), tokenizer)
    log.info(
        "Token files in %s: %d domains, %d tokens; %d ends dropped (a single token).",
        folder,
        len(store.domains),
        sum(domain.file.tokens for domain in store.domains),
        store.dropped_ends,
    )
    return text_bundle(
        train,
        val,
        TaskName(cfg.task),
        vocab_size,
        _fingerprint(store, [train, val]),
        f"token files in {folder}: {len(train)} training and {len(val)} validation windows of up to "
        f"{cfg.seq_len} tokens",
    )


class TokenStore:
    """The documents of all domains in one row of positions, domain after domain, cut into windows."""

    def __init__(self, domains: list[DomainTokens], seq_len: int, documents_known: bool) -> None:
        self.domains = domains
        self.seq_len = seq_len
        self.documents_known = documents_known
        lengths = [np.diff(domain.boundaries) for domain in domains]
        self.firsts = np.cumsum([0, *(len(part) for part in lengths)])  # [domains + 1]
        full, end = np.divmod(np.concatenate(lengths), seq_len)
        self.counts = full + (end >= SHORTEST_WINDOW)  # [documents]
        self.dropped_ends = int(((end > 0) & (end < SHORTEST_WINDOW)).sum())
        self.documents = StoreDocuments(self)

    def locate(self, i: int) -> tuple[DomainTokens, int]:
        """The domain of document i, and its position there."""
        place = int(np.searchsorted(self.firsts, i, side="right")) - 1
        return self.domains[place], i - int(self.firsts[place])

    def count(self, i: int) -> int:
        """The number of windows of document i."""
        return int(self.counts[i])

    def sample_id(self, i: int, k: int) -> str:
        return f"{self.documents[i]}#{k}" if self.documents_known else self.documents[i]

    def window(self, i: int, k: int) -> NDArray[np.int64]:
        """Window k of document i, `[tokens]`."""
        domain, row = self.locate(i)
        start = int(domain.boundaries[row]) + k * self.seq_len
        return domain.file.read(start, min(start + self.seq_len, int(domain.boundaries[row + 1])))

    def marked_validation(self) -> list[int] | None:
        """The documents of `val.bin` in a bare folder of several files, else None."""
        names = [domain.name for domain in self.domains]
        if self.documents_known or len(names) < 2 or BARE_VALIDATION not in names:
            return None
        place = names.index(BARE_VALIDATION)
        return list(range(int(self.firsts[place]), int(self.firsts[place + 1])))


class StoreDocuments(LazyStrings):
    """The ids of a store's documents, `<domain>/<id>`, or `<domain>#<window>` where documents are not
    known."""

    def __init__(self, store: TokenStore) -> None:
        self._store = store

    def __len__(self) -> int:
        return int(self._store.firsts[-1])

    def item(self, i: int) -> str:
        domain, row = self._store.locate(i)
        return f"{domain.name}/{domain.ids[row]}" if self._store.documents_known else f"{domain.name}#{row}"


class TokenSet(SampleSet):
    """Windows of a token store as the samples of a causal language model: the labels are the input ids."""

    def __init__(
        self, store: TokenStore, keys: NDArray[np.int64], offset: int, tokenizer: str | None
    ) -> None:
        """`keys` `[n, 2]`: the document and the window of each sample; `tokenizer`: its name, for
        previews."""
        self.store = store
        self.keys = keys
        self.offset = offset
        self.layout = token_rows(store.seq_len)
        self.sample_ids = SampleIds(store, keys)
        self.domains = SampleDomains(store, keys)
        self._tokenizer = tokenizer

    def __getitem__(self, i: int) -> Item:
        ids = torch.from_numpy(self.store.window(*self.keys[i].tolist()))  # [T]
        return {"input_ids": ids}, ids.clone(), self.offset + i

    def preview(self, i: int, width: int = 80) -> str:
        tokens = self.store.window(*self.keys[i].tolist())
        if self._tokenizer is None:
            return one_line(" ".join(map(str, tokens.tolist())), width)
        return one_line(decode(load_tokenizer(self._tokenizer), tokens), width)


class SampleIds(LazyStrings):
    def __init__(self, store: TokenStore, keys: NDArray[np.int64]) -> None:
        self._store = store
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def item(self, i: int) -> str:
        return self._store.sample_id(*self._keys[i].tolist())


class SampleDomains(SampleIds):
    def item(self, i: int) -> str:
        return self._store.locate(int(self._keys[i, 0]))[0].name


def _refuse_bare_keys(cfg: DictConfig) -> None:
    for key in ("dtype", "vocab_size"):
        if cfg[key] is not None:
            raise ConfigError(
                f"data.{key}={cfg[key]} has no effect: {cfg.path}/{META} says it; set it to null."
            )


def _open_bare(cfg: DictConfig, folder: Path) -> list[DomainTokens]:
    paths = sorted(folder.glob("*.bin"))
    if not paths:
        raise DataError(
            f"data.path={cfg.path!r} holds neither {META} nor a .bin file; make it with python -m "
            "runners.prepare."
        )
    if cfg.dtype not in DTYPES or cfg.vocab_size is None:
        raise ConfigError(
            f"data.path={cfg.path!r} has no {META}, so data.dtype (now {cfg.dtype}; "
            f"{' or '.join(DTYPES)}) and data.vocab_size (now {cfg.vocab_size}; an integer) must say "
            "what its .bin files hold."
        )
    return [_bare_domain(path, str(cfg.dtype), cfg.vocab_size, cfg.seq_len) for path in paths]


def _bare_domain(path: Path, dtype: str, vocab_size: int, seq_len: int) -> DomainTokens:
    file = TokenFile(path, dtype, vocab_size)
    boundaries = np.append(np.arange(0, file.tokens, seq_len), file.tokens)
    return DomainTokens(path.stem, file, boundaries, ids=(), sha256=None)


def _fingerprint(store: TokenStore, sets: Iterable[TokenSet]) -> str:
    """SHA-256 (hex) over the domains' names and content, and which windows of them are the samples.

    The content is what `prepare` recorded; only bare files are read for it.
    """
    digest = hashlib.sha256(f"{store.seq_len}\0".encode())
    for domain in store.domains:
        digest.update(f"{domain.name}\0{domain.sha256 or _file_sha256(domain.file.path)}\0".encode())
    for samples in sets:
        digest.update(f"{len(samples)}\0".encode())
        digest.update(samples.keys.astype("<i8").tobytes())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
