"""Proof that samples are gone: all artefacts read again, and the bytes of every file searched."""

import html
import json
import logging
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from analysis.forget.artefact import Artefact
from analysis.forget.finding import find_artefacts
from analysis.forget.folder import Folder
from analysis.forget.stores import Store
from analysis.forget.tables import ParquetTable

log = logging.getLogger(__name__)

SHORTEST = 6  # bytes of an id that numbers in a file do not have by chance
HEAD = 8192  # bytes that tell text from numbers: text has no zero
WORD = rb"[0-9A-Za-z_]"


@dataclass(frozen=True)
class Finding:
    """Something that is left, and where."""

    path: Path
    why: str


def verify_gone(paths: Sequence[Path], ids: Set[str]) -> list[Finding]:
    """What is still there of these samples at and below the paths.

    Artefacts are read as what they are, since tables are compressed; then every file is searched for the
    bytes of each id, in UTF-8 and as JSON and HTML write it. An id within a longer one does not count.
    """
    artefacts = find_artefacts(paths)
    found = [Finding(artefact.path, why) for artefact in artefacts for why in artefact.left(ids)]
    longer = {name for name in _sample_ids(artefacts) - ids if any(one in name for one in ids)}
    for name in sorted(one for one in ids if len(one.encode()) < SHORTEST):
        log.warning(
            "%s is so short that its bytes are among numbers by chance: only text has been searched.", name
        )
    for path in _files(paths):
        found += [Finding(path, f"has the bytes of {name!r}") for name in _ids_in(path, ids, longer)]
    return found


def has_an_id(path: Path, ids: Set[str]) -> bool:
    """Whether the bytes of one of the ids are in a file."""
    return any(_ids_in(path, ids, set()))


def _ids_in(path: Path, ids: Set[str], longer: Set[str]) -> Iterator[str]:
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        is_text = b"\0" not in content[:HEAD]
        for name in sorted(ids):
            long_enough = is_text or len(name.encode()) >= SHORTEST
            if long_enough and _occurs(content, name, [one for one in longer if name in one], is_text):
                yield name


def _occurs(content: mmap.mmap, name: str, longer: Iterable[str], is_text: bool) -> bool:
    """Whether the id is in the content, and not as a part of a longer one."""
    for written in _spellings(name):
        start = rb"(?<!%b)" % WORD if is_text and re.match(WORD, written) else b""
        end = rb"(?!%b)" % WORD if is_text and re.match(WORD, written[-1:]) else b""
        others = sorted({form for one in longer for form in _spellings(one)}, key=len, reverse=True)
        parts = [re.escape(other) for other in others] + [rb"(?P<id>%b)" % (start + re.escape(written) + end)]
        if any(match["id"] for match in re.finditer(b"|".join(parts), content)):
            return True
    return False


def _spellings(name: str) -> set[bytes]:
    in_yaml = name.replace("'", "''")
    return {form.encode() for form in (name, in_yaml, json.dumps(name)[1:-1], html.escape(name))}


def _sample_ids(artefacts: Iterable[Artefact]) -> set[str]:
    """All ids that tables and stores have."""
    found: set[str] = set()
    for artefact in artefacts:
        files = artefact.files if isinstance(artefact, Folder) else [artefact]
        found |= set().union(*(file.names() for file in files if isinstance(file, ParquetTable | Store)))
    return found


def _files(paths: Iterable[Path]) -> list[Path]:
    """Every file at and below the paths, hidden ones too, each once."""
    found = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])}
    return sorted({file.resolve() for file in found if file.is_file()})
