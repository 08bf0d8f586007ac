"""Tokenises text files once, to memory-mapped files that runs read with `data=tokens`.

python -m runners.prepare data=text data.path=corpus/ prepare.out=tokens/
"""

import hashlib
import logging
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hydra.core.config_store import ConfigStore
from numpy.typing import NDArray
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from conf.command import Reported, run_command
from conf.errors import ConfigError, UserError
from conf.refuse import refuse
from conf.schema import key
from runners.config import DataConfig
from runners.data.records import Record, TextFile, fields_of, find_files, read_records
from runners.data.tokenfiles import DomainMeta, Meta, smallest_dtype
from runners.errors import DataError
from runners.tokenizer import encode_batch, load_tokenizer

log = logging.getLogger(__name__)

DOCUMENTS_PER_BATCH = 256
IDS_PER_WRITE = 16_384
IDS_SCHEMA = pa.schema([("id", pa.string())])


@dataclass
class PrepareConfig:
    """The prepare step."""

    out: str = key("folder to write, new or empty")


@dataclass
class PrepareRoot:
    """The whole tree of this command."""

    data: DataConfig = MISSING
    prepare: PrepareConfig = MISSING


ConfigStore.instance().store(name="schema_prepare", node=PrepareRoot, provider="ghostrunner")


def prepare(cfg: DictConfig) -> Meta:
    """Tokenises the documents of `data.path` to `prepare.out`, a batch at a time, and returns what it wrote.

    The folder appears complete or not at all. Raises ConfigError for a source that is not text or a folder
    that holds something, DataError for files that cannot be read as `data` says.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} is not set; give it: {missing[0]}=<path>.")
    if cfg.data.kind != "text":
        raise ConfigError(f"data.kind={str(cfg.data.kind)!r} has no text to tokenise; use data=text.")
    for name in ("keep", "drop"):
        if cfg.data[name] is not None:
            refuse(cfg, f"data.{name}", "has no effect here: give it to the runs that train on the files")
    if cfg.data.test_samples:
        refuse(cfg, "data.test_samples", "has no effect here: give it to the runs that train on the files")
    out = Path(cfg.prepare.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"prepare.out={cfg.prepare.out!r} exists and is not an empty folder; name a new one."
        )
    files = find_files(cfg.data.path)
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename at the end stays on one file system.
    with TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=parent) as temporary:
        partial = Path(temporary) / out.name
        partial.mkdir()
        meta = write_tokens(files, cfg.data, partial)
        if out.exists():
            out.rmdir()
        partial.replace(out)
    for name, domain in meta.domains.items():
        log.info("%s: %d documents, %d tokens", name, domain.documents, domain.tokens)
    log.info("Wrote %s (%s, %s); use it with data=tokens data.path=%s", out, meta.tokenizer, meta.dtype, out)
    return meta


def write_tokens(files: list[TextFile], data: DictConfig, folder: Path) -> Meta:
    """Writes the token files of all documents and `meta.json`; memory holds one batch of documents."""
    tokenizer = load_tokenizer(data.tokenizer)
    dtype = smallest_dtype(len(tokenizer))
    writers: dict[str, DomainWriter] = {}
    try:
        records = with_progress(read_records(files, fields_of(data)), files)
        while batch := list(islice(records, DOCUMENTS_PER_BATCH)):
            rows = encode_batch(tokenizer, [record.text for record in batch])
            for record, tokens in zip(batch, rows, strict=True):
                if record.domain not in writers:
                    writers[record.domain] = DomainWriter(folder, record.domain, dtype)
                writers[record.domain].add(record.name, tokens)
    finally:
        written = {name: writer.close() for name, writer in sorted(writers.items())}
    # A relative path would mean another folder once the command is typed elsewhere.
    local = Path(data.tokenizer)
    name = str(local.resolve()) if local.is_dir() else data.tokenizer
    meta = Meta(name, len(tokenizer), dtype, written)
    meta.write(folder)
    return meta


class DomainWriter:
    """Appends documents to one domain's files; the format is described in `runners.data.tokenfiles`."""

    def __init__(self, folder: Path, domain: str, dtype: str) -> None:
        """Raises DataError if the domain's name cannot be the name of a file."""
        if domain.startswith(".") or any(letter in domain for letter in "/\\\0"):
            raise DataError(
                f"The domain {domain!r} cannot be the name of a file; set data.domain, or "
                "data.domain_field=null."
            )
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._tokens = (folder / f"{domain}.bin").open("wb")
        self._ids = pq.ParquetWriter(folder / f"{domain}.ids.parquet", IDS_SCHEMA)
        self._index = folder / f"{domain}.idx.npy"
        self._pending: list[str] = []
        self._boundaries = array("q", [0])
        self._digest = hashlib.sha256()

    def add(self, name: str, tokens: NDArray[np.int32]) -> None:
        stored = tokens.astype(self._dtype).tobytes()
        self._tokens.write(stored)
        self._boundaries.append(self._boundaries[-1] + len(tokens))
        self._digest.update(f"{name}\0{len(tokens)}\0".encode())
        self._digest.update(stored)
        self._pending.append(name)
        if len(self._pending) == IDS_PER_WRITE:
            self._write_ids()

    def close(self) -> DomainMeta:
        self._write_ids()
        self._ids.close()
        self._tokens.close()
        boundaries = np.array(self._boundaries, dtype=np.int64)
        np.save(self._index, boundaries, allow_pickle=False)
        return DomainMeta(int(boundaries[-1]), len(boundaries) - 1, self._digest.hexdigest())

    def _write_ids(self) -> None:
        self._ids.write_batch(pa.record_batch([self._pending], schema=IDS_SCHEMA))
        self._pending = []


def with_progress(records: Iterator[Record], files: list[TextFile]) -> Iterator[Record]:
    """The records, with a bar over the bytes of all files on a terminal."""
    sizes = {file: file.path.stat().st_size for file in files}
    starts = dict(zip(files, accumulate(sizes.values(), initial=0), strict=False))
    console = Console(stderr=True)
    columns = [TextColumn("{task.fields[documents]} documents"), BarColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenise", total=sum(sizes.values()), documents=0)
        for number, record in enumerate(records, start=1):
            yield record
            done = starts[record.file] + record.share_read * sizes[record.file]
            progress.update(task, completed=done, documents=number)


def task(cfg: DictConfig) -> None:
    """Hydra's task function. Raises as `runners.cli.task` does."""
    with Reported(UserError):
        prepare(cfg)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("prepare", task, groups=("data",))


if __name__ == "__main__":
    sys.exit(main())
