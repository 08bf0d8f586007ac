"""Lists of samples: one id a line, rows of CSV, objects of JSON. Lines of other samples keep their bytes."""

import csv
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from analysis.forget.artefact import NamingFile, replace

ROW_KEYS = ("sample_id", "query")
LIST_KEY = "sample_ids"


class LineFile(NamingFile):
    """A file of records, each of some whole lines."""

    def names(self) -> set[str]:
        return {name for _, ids in self._records() for name in ids}

    def _rewrite(self, ids: Set[str]) -> None:
        kept = "".join(record for record, own in self._records() if not own & ids)
        replace(self.path, lambda partial: partial.write_bytes(_encoded(kept)))

    @abstractmethod
    def _records(self) -> Iterator[tuple[str, set[str]]]:
        """Each record with its line ends, and the ids that it is of."""


class TextList(LineFile):
    """`.txt`: one id a line."""

    def _records(self) -> Iterator[tuple[str, set[str]]]:
        for line in _lines(self.path):
            yield line, {line.strip()} - {""}


class CsvTable(LineFile):
    """`.csv` with a column `sample_id` or `query`."""

    def _records(self) -> Iterator[tuple[str, set[str]]]:
        lines = _lines(self.path)
        reader, start = csv.reader(lines), 0
        header: list[str] = []
        for row in reader:  # of several lines, where a field has line ends
            ids = {value for key, value in zip(header, row, strict=False) if key in ROW_KEYS}
            header = header or row
            yield "".join(lines[start : reader.line_num]), ids
            start = reader.line_num


class JsonLines(LineFile):
    """`.jsonl` whose objects have a `sample_id` or `query`."""

    def _records(self) -> Iterator[tuple[str, set[str]]]:
        for line in _lines(self.path):
            yield line, _own_ids(_parsed(line))


class JsonFile(NamingFile):
    """`.json` with objects that have a `sample_id` or `query`, or with lists under `sample_ids`."""

    def names(self) -> set[str]:
        return set(_ids_below(_parsed(_text(self.path))))

    def _rewrite(self, ids: Set[str]) -> None:
        text = _text(self.path)
        second = text.split("\n")[1] if "\n" in text.strip() else ""
        indent = len(second) - len(second.lstrip()) or None
        kept = json.dumps(_without(_parsed(text), ids), indent=indent, ensure_ascii=text.isascii())
        end = text[len(text.rstrip()) :]
        replace(self.path, lambda partial: partial.write_bytes(_encoded(kept + end)))


def _text(path: Path) -> str:
    """The file's text; bytes that are not UTF-8 come back as they were by `_encoded`."""
    return path.read_bytes().decode("utf-8", errors="surrogateescape")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _lines(path: Path) -> list[str]:
    """With their ends; only a line feed ends one."""
    return re.findall(r"[^\n]*\n|[^\n]+", _text(path))


def _parsed(text: str) -> Any:
    """None for what is no JSON: it has no ids in places that are known."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _own_ids(value: Any) -> set[str]:
    """The samples that an object is of."""
    if not isinstance(value, dict):
        return set()
    return {value[key] for key in ROW_KEYS if isinstance(value.get(key), str)}


def _ids_below(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _ids_below(item)
    if isinstance(value, dict):
        yield from _own_ids(value)
        for key, item in value.items():
            if key == LIST_KEY and isinstance(item, list):
                yield from (name for name in item if isinstance(name, str))
            yield from _ids_below(item)


def _without(value: Any, ids: Set[str]) -> Any:
    """The same without objects of these samples, and without their ids in lists of ids."""
    if isinstance(value, list):
        return [_without(item, ids) for item in value if not _own_ids(item) & ids]
    if isinstance(value, dict):
        return {
            key: [one for one in item if not isinstance(one, str) or one not in ids]
            if key == LIST_KEY and isinstance(item, list)
            else _without(item, ids)
            for key, item in value.items()
            if not (_own_ids(item) & ids)
        }
    return value
