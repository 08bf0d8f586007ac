"""The format of prepared tokens: one folder, `meta.json`, and for each domain three files.

`<domain>.bin` holds the token ids of all documents, one after the other, in the dtype that meta.json names;
`<domain>.idx.npy` the int64 boundaries `[documents + 1]` of the documents in it, starting at 0; and
`<domain>.ids.parquet` the documents' ids (column `id`). A folder of `.bin` files alone, as nanoGPT writes it,
can be read too: its windows then stand for documents.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from runners.errors import DataError

SCHEMA_VERSION = 1
META = "meta.json"
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class DomainMeta:
    tokens: int
    documents: int
    sha256: str
    """Over each document's id, NUL, number of tokens, NUL, and its tokens as they stand in the file."""


@dataclass(frozen=True)
class Meta:
    """What `meta.json` says."""

    tokenizer: str
    vocab_size: int
    dtype: str
    domains: dict[str, DomainMeta]

    def write(self, folder: Path) -> None:
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        (folder / META).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises DataError if the file is damaged or of another version."""
        path = folder / META
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise DataError(
                    f"{path} has schema_version {version}, and this version reads {SCHEMA_VERSION}; run "
                    "python -m runners.prepare again."
                )
            domains = {name: DomainMeta(**domain) for name, domain in content.pop("domains").items()}
            meta = cls(domains=domains, **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}); run python -m runners.prepare again.") from error
        if meta.dtype not in DTYPES:
            raise DataError(f"{path} has dtype {meta.dtype!r}; it must be one of {', '.join(DTYPES)}.")
        return meta


def smallest_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= np.iinfo(np.uint16).max else "uint32"


class LazyStrings(Sequence[str], ABC):
    """Strings that are made one at a time: there can be millions, and few are looked at."""

    @abstractmethod
    def item(self, i: int) -> str:
        """The string at position i, 0 <= i < len(self)."""

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self.item(k) for k in range(*i.indices(len(self)))]
        return self.item(range(len(self))[i])


class ArrowStrings(LazyStrings):
    """A column of strings as a sequence."""

    def __init__(self, column: pa.Array) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def item(self, i: int) -> str:
        return self._column[i].as_py()


class TokenFile:
    """One domain's tokens, memory-mapped. The map is opened by the process that reads: workers do not inherit
    it."""

    def __init__(self, path: Path, dtype: str, vocab_size: int) -> None:
        """Raises DataError if the file's size is no whole number of tokens, or zero."""
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.vocab_size = vocab_size
        size = path.stat().st_size
        if size == 0 or size % self.dtype.itemsize:
            raise DataError(
                f"{path} has {size} bytes, which is no whole number of {dtype} tokens above zero."
            )
        self.tokens = size // self.dtype.itemsize

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `[stop - start]`. Raises DataError if one is no token of the vocabulary."""
        tokens = self._map[start:stop].astype(np.int64)
        if tokens.max(initial=0) >= self.vocab_size:
            raise DataError(
                f"{self.path} holds the token {tokens.max()} between the tokens {start} and {stop}, and the "
                f"vocabulary has {self.vocab_size}; the file is damaged, or its dtype is not "
                f"{self.dtype.name}."
            )
        return tokens

    @cached_property
    def _map(self) -> NDArray[Any]:
        return np.memmap(self.path, dtype=self.dtype, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole file.
        return {name: value for name, value in self.__dict__.items() if name != "_map"}


@dataclass(frozen=True)
class DomainTokens:
    """A domain's tokens and what its documents are."""

    name: str
    file: TokenFile
    boundaries: NDArray[np.int64]
    """`[documents + 1]`: document i is the tokens from `boundaries[i]` to `boundaries[i + 1]`."""
    ids: Sequence[str]
    """The documents' ids; empty where they are not known."""
    sha256: str | None
    """`DomainMeta.sha256`, where there is one."""


def open_prepared(folder: Path, meta: Meta) -> list[DomainTokens]:
    """Raises DataError if a file is missing or its size is not what `meta.json` says."""
    return [_open_domain(folder, name, meta) for name in sorted(meta.domains)]


def _open_domain(folder: Path, name: str, meta: Meta) -> DomainTokens:
    said = meta.domains[name]
    for ending in (".bin", ".idx.npy", ".ids.parquet"):
        if not (folder / f"{name}{ending}").is_file():
            raise DataError(
                f"{folder / META} names the domain {name!r}, but {name}{ending} is missing beside it."
            )
    file = TokenFile(folder / f"{name}.bin", meta.dtype, meta.vocab_size)
    boundaries = np.load(folder / f"{name}.idx.npy", allow_pickle=False)
    ids = pq.read_table(folder / f"{name}.ids.parquet", columns=["id"]).column("id").combine_chunks()
    found = (file.tokens, len(boundaries) - 1, len(ids), int(boundaries[-1]))
    expected = (said.tokens, said.documents, said.documents, said.tokens)
    if found != expected:
        raise DataError(
            f"The domain {name!r} in {folder} is damaged: its files hold {file.tokens} tokens and "
            f"{len(boundaries) - 1} documents, and {META} says {said.tokens} and {said.documents}; run "
            "python -m runners.prepare again."
        )
    return DomainTokens(name, file, boundaries, ArrowStrings(ids), said.sha256)
