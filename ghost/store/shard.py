"""A shard's files: the matrix, and beside it the rows' ids, norms and scales."""

import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor

from ghost.atomic import sync
from ghost.store.codec import StoredRows, codec
from ghost.store.files import FileRecord, damaged, npy_pieces, pieces, release, write_recorded
from ghost.store.manifest import Facts, ShardRecord


def write_shard(directory: Path, stem: str, rows: StoredRows, facts: Facts) -> tuple[FileRecord, ...]:
    """Write a shard's files; when this returns they are safe under their names."""
    files = [write_recorded(_matrix_path(directory, stem, facts), _matrix_pieces(rows.values, facts))]
    for name, column in (("ids", rows.ids), ("norms", rows.norms), ("scales", rows.scales)):
        if column is not None:
            files.append(write_recorded(directory / f"{name}-{stem}.npy", npy_pieces(column.numpy())))
    sync(directory)
    release(_matrix_path(directory, stem, facts))
    return tuple(files)


def map_values(directory: Path, shard: ShardRecord, facts: Facts) -> Tensor:
    """The stored values `[n, K]`, memory-mapped, only to be read.

    Raises:
        StoreError: The file does not hold them.
    """
    path = _matrix_path(directory, shard.stem, facts)
    if facts.shard_format == "npy":
        bits = map_npy(path, (shard.rows, facts.layout.width), codec(facts.dtype).bits)
        return read_only_tensor(bits).view(codec(facts.dtype).dtype)
    try:
        values = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise damaged(path, "cannot be read as a tensor") from error
    shape = (shard.rows, facts.layout.width)
    if values.shape != shape or values.dtype != codec(facts.dtype).dtype:
        raise damaged(path, f"holds {values.dtype} {tuple(values.shape)}, not {facts.dtype} {shape}")
    return values


def map_ids(directory: Path, shard: ShardRecord) -> np.ndarray:
    """`[n]` int64."""
    return map_npy(directory / f"ids-{shard.stem}.npy", (shard.rows,), torch.int64)


def map_norms(directory: Path, shard: ShardRecord, facts: Facts) -> np.ndarray:
    """`[n, S]` float32."""
    shape = (shard.rows, len(facts.layout.slices))
    return map_npy(directory / f"norms-{shard.stem}.npy", shape, torch.float32)


def map_scales(directory: Path, shard: ShardRecord, facts: Facts) -> np.ndarray | None:
    """`[n]` float32; None where the format has none."""
    if not codec(facts.dtype).scaled:
        return None
    return map_npy(directory / f"scales-{shard.stem}.npy", (shard.rows,), torch.float32)


def read_shard(directory: Path, shard: ShardRecord, facts: Facts) -> StoredRows:
    """All of a shard, memory-mapped, only to be read."""
    scales = map_scales(directory, shard, facts)
    return StoredRows(
        read_only_tensor(map_ids(directory, shard)),
        map_values(directory, shard, facts),
        read_only_tensor(map_norms(directory, shard, facts)),
        None if scales is None else read_only_tensor(scales),
    )


def map_npy(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """A read-only memory map of an `.npy` file.

    Raises:
        StoreError: The file holds something else.
    """
    expected = torch.empty(0, dtype=dtype).numpy().dtype
    try:
        # A map of no bytes does not exist.
        array = np.load(path, mmap_mode="r" if all(shape) else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, "cannot be read as an array") from error
    if array.shape != shape or array.dtype != expected:
        raise damaged(path, f"holds {array.dtype} {array.shape}, not {expected} {shape}")
    return array


def read_only_tensor(array: np.ndarray) -> Tensor:
    """A tensor over a read-only map, to compute with and never to write to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _matrix_path(directory: Path, stem: str, facts: Facts) -> Path:
    return directory / f"shard-{stem}.{facts.shard_format}"


def _matrix_pieces(values: Tensor, facts: Facts) -> Iterator[bytes | memoryview]:
    if facts.shard_format == "npy":
        return npy_pieces(values.contiguous().view(codec(facts.dtype).bits).numpy())
    buffer = BytesIO()  # written to a path, the file's bytes would tell its name
    torch.save(values.clone(), buffer)
    return pieces(buffer.getbuffer())
