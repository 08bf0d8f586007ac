"""Checkpoint folders: each is whole or not there, damage is seen, and only the newest are kept.

Torch is not imported: whether a directory has checkpoints is asked before a run begins.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ghost.atomic import sync

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
FACTS_FILE = "checkpoint.json"
SUMS_FILE = "SHA256SUMS"
"""A checksum for every other file, in the form that `sha256sum --check` reads."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint is of.

    Attributes:
        step: Optimizer steps that were done.
        world_size: Processes that wrote it.
        fingerprint: `runners.identity.fingerprint` of the run's saved config.
        metrics_bytes: Length of `metrics.jsonl`.
    """

    step: int
    world_size: int
    fingerprint: str
    metrics_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    facts: Facts


def folders(out: Path) -> list[tuple[int, Path]]:
    """Step and folder of a run directory's checkpoints, damaged ones too, the newest first."""
    found = [(int(path.name.removeprefix("step-")), path) for path in (out / FOLDER).glob("step-[0-9]*")]
    return sorted(found, reverse=True)


def partial_folder(out: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole; made empty."""
    partial = out / FOLDER / f".step-{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def seal(partial: Path, facts: Facts, keep: int) -> Path:
    """Let a written folder appear as a checkpoint, its files being on disk; then remove all but the `keep`
    newest up to this step. Later ones are damaged, or the run would have gone on behind them.
    """
    (partial / FACTS_FILE).write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
    sums = "".join(f"{digest}  {name}\n" for name, digest in _digests(partial).items())
    (partial / SUMS_FILE).write_text(sums, encoding="utf-8")
    for name in (FACTS_FILE, SUMS_FILE):
        sync(partial / name)
    sync(partial)
    folder = partial.with_name(f"step-{facts.step:08d}")
    if folder.exists():  # damaged, or the run would not have come here again
        shutil.rmtree(folder)
    partial.rename(folder)
    sync(folder.parent)
    _prune(folder.parent.parent, facts.step, keep)
    return folder


def _prune(out: Path, step: int, keep: int) -> None:
    earlier = [path for number, path in folders(out) if number <= step]
    later = [path for number, path in folders(out) if number > step]
    for path in earlier[keep:] + later:
        shutil.rmtree(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None for nothing."""
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return f"{SUMS_FILE} is missing or unreadable"
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = _digests(folder)
    for name in (FACTS_FILE, *sorted({*expected, *found})):
        if name not in found:
            return f"{name} is missing"
        if expected.get(name) != found[name]:
            return f"{name} is not what was written"
    return None


def newest_whole(out: Path) -> Checkpoint | None:
    """The newest checkpoint without damage; each damaged one is named in a warning. None: there is none."""
    for _, folder in folders(out):
        wrong = damage(folder)
        if wrong is None:
            facts: Mapping[str, object] = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
            return Checkpoint(folder, Facts(**facts))  # type: ignore[arg-type]
        log.warning("The checkpoint %s is damaged (%s): taking the one before.", folder, wrong)
    return None


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of the folder's files by name, the list of checksums left out."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != SUMS_FILE:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
