"""Documents read one at a time from text, JSON-lines and Parquet files, each with a domain and an id."""

import glob
import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig

from runners.errors import DataError

log = logging.getLogger(__name__)

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
ROWS_PER_READ = 1024


@dataclass(frozen=True)
class TextFile:
    path: Path
    name: str
    """The path below the folder that `data.path` names, with forward slashes."""

    @property
    def ending(self) -> str:
        """One of ENDINGS; empty for a file of another kind."""
        return next((ending for ending in ENDINGS if self.path.name.lower().endswith(ending)), "")

    @property
    def stem(self) -> str:
        return self.path.name[: len(self.path.name) - len(self.ending)]


@dataclass(frozen=True)
class Record:
    """One document as it stands in a file."""

    domain: str
    name: str
    """From the id field; else the file's name, with the row's number where a file has rows."""
    text: str
    file: TextFile
    share_read: float
    """How much of the file has been read, in [0, 1], for progress bars."""


@dataclass(frozen=True)
class Fields:
    """Where a row's text, domain and id stand; None: see `Record`."""

    text: str
    domain: str | None
    id: str | None
    fixed_domain: str | None
    group: str = "data"
    """Whose keys these are: `data.text_field`."""

    def named(self) -> dict[str, str]:
        """The fields that rows must have, by their configuration keys."""
        fields = {"text_field": self.text, "domain_field": self.domain, "id_field": self.id}
        return {key: field for key, field in fields.items() if field is not None}


def fields_of(cfg: DictConfig) -> Fields:
    # A fixed domain stands for every row, so no row needs the field.
    domain_field = None if cfg.domain is not None else cfg.domain_field
    return Fields(text=cfg.text_field, domain=domain_field, id=cfg.id_field, fixed_domain=cfg.domain)


def find_files(path: str) -> list[TextFile]:
    """The files that `data.path` stands for, sorted by name: a file, a folder with all below it, or a glob.

    In a folder, files of other kinds are left out and counted in the log.
    Raises DataError if there is none, or if a file named outright is of an unknown kind.
    """
    root = Path(path)
    if root.is_dir():
        return _files_below(root)
    if root.is_file():
        files = [TextFile(root, root.name)]
    else:
        matches = sorted(Path(match) for match in glob.glob(path, recursive=True))
        fixed = Path(*takewhile(lambda part: not set(part) & set("*?["), root.parts))
        files = [TextFile(match, match.relative_to(fixed).as_posix()) for match in matches if match.is_file()]
    if not files:
        raise DataError(f"data.path={path!r} is no file or folder and matches none; give one, or a glob.")
    for file in files:
        if not file.ending:
            raise DataError(f"{file.path} is of an unknown kind; data=text reads {', '.join(ENDINGS)}.")
    return files


def read_records(files: Iterable[TextFile], fields: Fields) -> Iterator[Record]:
    """The documents of all files in order, each id once within its domain.

    Raises DataError for a damaged file, a bad line, a missing field, an empty text or a second use of an id,
    naming file and row.
    """
    seen: set[str] = set()
    unread: set[str] = set()
    for file in files:
        unread |= _unread_fields(file, fields)
        for record in READERS[file.ending](file, fields):
            full_id = f"{record.domain}/{record.name}"
            if full_id in seen:
                raise DataError(
                    f"The id {record.name!r} comes twice in the domain {record.domain!r}, the second time in "
                    f"{file.path}; ids must be unique (data.id_field={fields.id})."
                )
            seen.add(full_id)
            yield record
    if unread:
        names = ", ".join(sorted(unread))
        hint = " (data.domain_field and data.id_field can name one)" if fields.group == "data" else ""
        log.info("Fields that are not read: %s%s.", names, hint)


def _files_below(root: Path) -> list[TextFile]:
    everything = [
        TextFile(path, path.relative_to(root).as_posix())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    ]
    files = [file for file in everything if file.ending]
    if not files:
        raise DataError(f"data.path={str(root)!r} holds no {', '.join(ENDINGS)} file.")
    if len(files) < len(everything):
        others = sorted({file.path.suffix or file.path.name for file in everything if not file.ending})
        log.warning(
            "%d files in %s are left out, being of other kinds (%s).",
            len(everything) - len(files),
            root,
            ", ".join(others),
        )
    return files


def _read_txt(file: TextFile, fields: Fields) -> Iterator[Record]:
    try:
        text = file.path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it."
        ) from error
    if not text.strip():
        raise DataError(f"{file.path} is empty; remove it.")
    yield Record(fields.fixed_domain or file.stem, file.name, text, file, share_read=1.0)


def _read_jsonl(file: TextFile, fields: Fields) -> Iterator[Record]:
    size = file.path.stat().st_size
    number = 0
    with file.path.open("rb") as raw:
        lines = io.TextIOWrapper(_decompressed(file, raw), encoding="utf-8")
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = _Row(_parse(line, f"{file.path}:{number}"), file, number, raw.tell() / size)
                    yield _record(row, fields)
        except (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{file.path} is damaged or not UTF-8 after line {number} ({error}).") from error


def _read_parquet(file: TextFile, fields: Fields) -> Iterator[Record]:
    number = 0
    try:
        table = pq.ParquetFile(file.path)
        for key, field in fields.named().items():
            if field not in table.schema_arrow.names:
                raise _missing(str(file.path), field, key, table.schema_arrow.names, fields.group)
        columns = sorted(set(fields.named().values()))
        for batch in table.iter_batches(batch_size=ROWS_PER_READ, columns=columns):
            for values in batch.to_pylist():
                number += 1
                yield _record(_Row(values, file, number, number / table.metadata.num_rows), fields)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{file.path} is not a Parquet file, or damaged after row {number} ({error})."
        ) from error


READERS: dict[str, Callable[[TextFile, Fields], Iterator[Record]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.xz": _read_jsonl,
    ".parquet": _read_parquet,
}


def _unread_fields(file: TextFile, fields: Fields) -> set[str]:
    """The fields of the file's first row that no key names; none of a damaged file, refused later."""
    if file.ending == ".txt":
        return set()
    try:
        if file.ending == ".parquet":
            present = pq.read_schema(file.path).names
        else:
            with file.path.open("rb") as raw:
                present = list(json.loads(_decompressed(file, raw).readline()))
    except (ValueError, TypeError, OSError, EOFError, lzma.LZMAError, zlib.error):
        return set()
    return set(present) - set(fields.named().values())


def _decompressed(file: TextFile, raw: BinaryIO) -> Any:
    if file.ending == ".jsonl.gz":
        return gzip.GzipFile(fileobj=raw)
    if file.ending == ".jsonl.xz":
        return lzma.LZMAFile(raw)
    return raw


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg} at column {error.colno}).") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is not a JSON object but a {type(row).__name__}; each line must be an object."
        )
    return row


@dataclass(frozen=True)
class _Row:
    """A line of a JSON-lines file or a row of a Parquet file, not yet checked."""

    values: dict[str, Any]
    file: TextFile
    number: int
    share_read: float

    def __str__(self) -> str:
        return f"{self.file.path}:{self.number}"


def _record(row: _Row, fields: Fields) -> Record:
    values = {key: row.values.get(field) for key, field in fields.named().items()}
    for key, value in values.items():
        if value is None:
            raise _missing(str(row), fields.named()[key], key, row.values, fields.group)
    text = values["text_field"]
    if not isinstance(text, str):
        raise DataError(
            f"{row}: the field {fields.text!r} ({fields.group}.text_field) is not text but "
            f"{type(text).__name__}."
        )
    if not text.strip():
        raise DataError(
            f"{row}: the field {fields.text!r} ({fields.group}.text_field) is empty; remove the row."
        )
    domain = str(values.get("domain_field", fields.fixed_domain or row.file.stem))
    name = str(values.get("id_field", f"{row.file.name}:{row.number}"))
    try:
        f"{domain}{name}{text}".encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row} holds half of a surrogate pair, which is no character; mend it.") from error
    return Record(domain, name, text, row.file, row.share_read)


def _missing(where: str, field: str, key: str, present: Iterable[str], group: str) -> DataError:
    hint = "" if key == "text_field" else f", or {group}.{key}=null"
    return DataError(
        f"{where} has no value for {field!r} ({group}.{key}); its fields are "
        f"{', '.join(sorted(present)) or 'none'}: set {group}.{key} to one of them{hint}."
    )
