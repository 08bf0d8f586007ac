"""Deleting samples: tombstones at once, and files without them later."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ghost.atomic import sync, write_atomically
from ghost.errors import StoreError
from ghost.store.assembly import clear_leftovers
from ghost.store.files import npy_pieces
from ghost.store.manifest import Contents, Facts, Manifest, ShardRecord
from ghost.store.shard import map_ids, read_shard, write_shard


def read_deleted(directory: Path, generation: int) -> np.ndarray:
    """The deleted ids, rising, of a store in its present generation.

    Raises:
        StoreError: The tombstones cannot be read.
    """
    path = _tombstones(directory, generation)
    if not path.exists():
        return np.empty(0, np.int64)
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(
            f"{path} cannot be read, so it is not known what was deleted: restore it."
        ) from error
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise StoreError(f"{path} holds {ids.dtype} {ids.shape}, not ids: restore it.")
    return ids


def write_deleted(directory: Path, generation: int, ids: np.ndarray) -> None:
    """Replace the tombstones; whoever calls this holds the folder's lock."""
    path = _tombstones(directory, generation)
    write_atomically(path, lambda file: file.writelines(npy_pieces(np.unique(ids))))
    sync(directory)


def compact(directory: Path, manifest: Manifest, contents: Contents, deleted: np.ndarray) -> None:
    """Write the shards that hold deleted samples anew, and remove what had them.

    Whoever calls this holds the folder's lock. The manifest is replaced between the two, so that a kill
    leaves the old store or the new one, and files that the next call clears away.
    """
    kept = (
        _without(directory, shard, manifest.facts, contents.generation + 1, deleted)
        for shard in contents.shards
    )
    shards = tuple(shard for shard in kept if shard is not None)
    if len(deleted):
        contents = replace(contents, shards=shards, generation=contents.generation + 1)
        replace(manifest, contents=contents).write(directory)
    clear_leftovers(directory, contents)


def _without(
    directory: Path, shard: ShardRecord, facts: Facts, generation: int, deleted: np.ndarray
) -> ShardRecord | None:
    """The shard without deleted samples: itself, a new one, or none where no row is left."""
    keep = ~np.isin(map_ids(directory, shard), deleted)
    if keep.all():
        return shard
    if not keep.any():
        return None
    rows = read_shard(directory, shard, facts)[torch.from_numpy(np.flatnonzero(keep))]
    stem = f"{shard.stem.partition('-g')[0]}-g{generation}"
    return replace(shard, stem=stem, rows=len(rows), files=write_shard(directory, stem, rows, facts))


def _tombstones(directory: Path, generation: int) -> Path:
    return directory / f"deleted-g{generation}.npy"
