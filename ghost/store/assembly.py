"""How ranks make one store: they agree on a manifest, and the last to finish seals it."""

import re
from pathlib import Path

from ghost.atomic import sync
from ghost.errors import StoreError
from ghost.store import manifest as manifests
from ghost.store.files import changing, check_size
from ghost.store.journal import Progress, journal_path
from ghost.store.manifest import Contents, Facts, Manifest, difference

_OWN = (
    r"((shard|ids|norms|scales)-r\d+-.*|journal-r\d+\.jsonl|deleted-g\d+\.npy|index-.*\.faiss|manifest\.json)"
)
_PARTIAL = rf"\.{_OWN}\.partial"
_RANK_LOCK = r"\.lock-r\d+"


def join(directory: Path, facts: Facts) -> Manifest:
    """The folder's manifest, made where there is none; leftovers of a sealed store are cleared away.

    Raises:
        StoreError: It is of something else, or files of a store are there without one.
    """
    with changing(directory):
        if not (directory / manifests.NAME).exists():
            if any(re.fullmatch(_OWN, path.name) for path in directory.iterdir()):
                raise StoreError(
                    f"{directory} holds files of a store but no {manifests.NAME}: restore it, or choose "
                    "an empty folder."
                )
            Manifest(facts).write(directory)
        manifest = Manifest.read(directory)
        differs = difference(manifest.facts.described(), facts.described())
        if differs is not None:
            raise StoreError(
                f"{directory} holds rows of something else, for {differs}: choose an empty folder, or "
                "go on with what it was begun with."
            )
        if manifest.contents is not None:
            clear_leftovers(directory, manifest.contents)
    return manifest


def seal(directory: Path) -> None:
    """Complete the manifest if all ranks are done; whoever comes later finds nothing to do.

    Raises:
        StoreError: A file has gone or has another length than was written.
    """
    with changing(directory):
        manifest = Manifest.read(directory)
        if manifest.contents is not None:
            return
        ranks = journals(directory, manifest.facts)
        if not all(progress.done for progress in ranks):
            return
        contents = assembled(ranks)
        for file in contents.files:
            check_size(directory, file)
        Manifest(manifest.facts, contents).write(directory)
        clear_leftovers(directory, contents)


def journals(directory: Path, facts: Facts) -> list[Progress]:
    """What each rank's journal says."""
    return [Progress.read(journal_path(directory, rank)) for rank in range(facts.world_size)]


def assembled(ranks: list[Progress]) -> Contents:
    """What the ranks have committed, in the order of its rows."""
    shards = tuple(shard for progress in ranks for shard in progress.shards)
    return Contents(shards, tuple(sum(shard.batches for shard in progress.shards) for progress in ranks))


def clear_leftovers(directory: Path, contents: Contents) -> None:
    """Remove what a sealed store does not need: journals, locks of ranks, and files of interrupted work.

    Files of earlier generations are among them; tombstones and indexes of this one stay.
    """
    kept = {file.name for file in contents.files} | {manifests.NAME}
    current = re.compile(rf"(deleted|index)-g{contents.generation}\b.*")
    leftover = re.compile(f"{_OWN}|{_PARTIAL}|{_RANK_LOCK}")
    _remove(
        directory,
        [
            name
            for name in _names(directory)
            if leftover.fullmatch(name) and name not in kept and not current.fullmatch(name)
        ],
    )


def clear_uncommitted(directory: Path, rank: int, progress: Progress) -> None:
    """Remove a rank's files that its journal does not name."""
    kept = {file.name for shard in progress.shards for file in shard.files}
    of_rank = re.compile(rf"\.?(shard|ids|norms|scales)-r{rank}-.*")
    _remove(directory, [name for name in _names(directory) if of_rank.fullmatch(name) and name not in kept])


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _remove(directory: Path, names: list[str]) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)
    if names:
        sync(directory)
