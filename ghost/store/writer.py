"""Writes projected rows as they come, in the background, and goes on where an earlier writer was killed."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghost.errors import StoreError
from ghost.layout import Layout
from ghost.store.assembly import clear_uncommitted, join, seal
from ghost.store.codec import StoredRows, codec
from ghost.store.files import check_size, held, make_folder, writing
from ghost.store.journal import Journal, journal_path
from ghost.store.manifest import Facts, ShardRecord
from ghost.store.shard import write_shard
from ghost.store.worker import Worker

_LOCK_SECONDS = 5.0  # a killed run's data loaders hold its lock until they notice


class Safe(NamedTuple):
    """How much of a rank's rows is on disk."""

    batches: int
    rows: int
    bytes: int

    @classmethod
    def of(cls, shards: Sequence[ShardRecord]) -> "Safe":
        """What the shards hold."""
        return cls(
            sum(shard.batches for shard in shards),
            sum(shard.rows for shard in shards),
            sum(file.size for shard in shards for file in shard.files),
        )

    def __add__(self, other: "Safe") -> "Safe":  # type: ignore[override]
        return Safe(*(mine + its for mine, its in zip(self, other, strict=True)))


class _HostCopy:
    """A copy of a tensor in the host's memory, which a CUDA device makes when it gets there."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._host.copy_(tensor.detach(), non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(tensor.device))

    @property
    def value(self) -> Tensor:
        """The copy, waited for."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


class StoreWriter:
    """One rank's writer of a projection store: a new one, or one to go on with.

    Rows wait in memory until `batches_per_shard` batches are together, and are then written as one shard
    that is either whole or not there. A writer that is killed leaves whole shards; the next one for the same
    folder and rank says in `next_batch` where to go on, and the store ends up with the same bytes as if
    nothing had happened.

    As a context manager it is closed at the end of the block, and abandoned if the block raises.

    Args:
        directory: The store's folder.
        layout: What the columns are.
        projection: How they were made; plain numbers and text.
        fingerprints: Of the model's weights, the data and the configuration.
        dtype: How rows are stored: `float32`, `float16`, `bfloat16` or `int8` with a factor for each row.
        shard_format: `npy` or `pt`.
        batches_per_shard: Batches in one file.
        rank, world_size: Whose rows these are. Rows are in the order of the ranks, so that each rank writes
            its own contiguous part of the corpus.

    Raises:
        StoreError: The folder holds rows of something else (names the first thing that differs), is damaged,
            cannot be written, or another process is writing this rank's rows.
    """

    def __init__(
        self, directory: str | Path, layout: Layout, projection: Mapping[str, Any],
        fingerprints: Mapping[str, str], dtype: str = "float32", shard_format: str = "npy",
        batches_per_shard: int = 64, rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        self.directory, self._rank = Path(directory), rank
        self._facts = Facts(
            layout, projection, fingerprints, dtype, shard_format, world_size, batches_per_shard
        )
        if not 0 <= rank < world_size:
            raise StoreError(f"rank is {rank}: it should be between 0 and {world_size - 1}, world_size - 1.")
        self._codec = codec(dtype)
        self._collected: list[StoredRows] = []  # the worker's
        self._journal: Journal | None = None  # none where the rank has written all its batches
        self._closed = False
        make_folder(self.directory)
        with writing(self.directory, "the beginning of a store"), ExitStack() as resources:
            busy = f"{self.directory} is being written by another process as rank {rank}: wait or stop it."
            resources.enter_context(held(self.directory / f".lock-r{rank}", _LOCK_SECONDS, busy))
            contents = join(self.directory, self._facts).contents
            if contents is None:
                journal = Journal(journal_path(self.directory, rank))
                resources.callback(journal.close)
                self._safe = self._taken_up(journal)
                self._journal = None if journal.found.done else journal
            else:
                mine = [shard for shard in contents.shards if shard.rank == rank]
                self._safe = Safe.of(mine)._replace(batches=contents.batches[rank])
            self._worker = Worker(limit=max(2, batches_per_shard))
            resources.callback(self._worker.stop)
            self._resources = resources.pop_all()

    @property
    def next_batch(self) -> int:
        """How many of the rank's batches are safe on disk; whoever goes on begins with this one."""
        return self._safe.batches

    @property
    def rows_written(self) -> int:
        """How many of the rank's rows are safe on disk."""
        return self._safe.rows

    @property
    def bytes_written(self) -> int:
        """How many bytes hold them."""
        return self._safe.bytes

    def append(self, sample_ids: Tensor | Sequence[int], rows: Tensor) -> None:
        """Add a batch. It is copied, and encoded and written in the background.

        Args:
            sample_ids: `[n]` integers.
            rows: `[n, K]` float32 or float64, on any device.

        Raises:
            StoreError: The shapes do not fit, the store is complete, or an earlier batch cannot be written.
        """
        ids = torch.as_tensor(sample_ids).detach()
        self._check(ids, rows)
        self._worker.submit(partial(self._take, _HostCopy(ids), _HostCopy(rows)))

    def close(self) -> None:
        """Write what is pending and end this rank's part; the last rank to do so completes the store.

        Raises:
            StoreError: A batch could not be written; the part is not ended then.
        """
        if self._closed:
            return
        self._closed = True
        with self._resources:
            self._worker.submit(self._end)
            self._worker.finish()
            with writing(self.directory, "the manifest"):
                seal(self.directory)

    def abandon(self) -> None:
        """Stop without ending this rank's part: what is not on disk is dropped, to be written again."""
        self._closed = True
        self._resources.close()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def _taken_up(self, journal: Journal) -> Safe:
        """What an earlier writer has left, rid of what it had not committed."""
        for shard in journal.found.shards:
            for file in shard.files:
                check_size(self.directory, file)
        clear_uncommitted(self.directory, self._rank, journal.found)
        return Safe.of(journal.found.shards)

    def _check(self, ids: Tensor, rows: Tensor) -> None:
        if self._closed:
            raise StoreError(f"{self.directory}: the writer is closed, so a batch can no longer be added.")
        if self._journal is None:
            raise StoreError(
                f"{self.directory} has all {self.next_batch} batches of rank {self._rank}: choose an empty "
                "folder for more."
            )
        width = self._facts.layout.width
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
        if ids.ndim != 1 or (len(ids) and not whole) or rows.shape != (len(ids), width):
            raise StoreError(
                f"sample_ids {ids.dtype} {tuple(ids.shape)} and rows {tuple(rows.shape)} do not fit: they "
                f"should be integers [n] and [n, {width}], the layout's width."
            )
        if rows.dtype not in (torch.float32, torch.float64):
            raise StoreError(f"rows are {rows.dtype}: they should be float32 or float64.")

    def _take(self, ids: "_HostCopy", rows: "_HostCopy") -> None:
        encoded = self._codec.encode(ids.value.to(torch.int64), rows.value, self._facts.layout)
        self._collected.append(encoded)
        if len(self._collected) == self._facts.batches_per_shard:
            self._commit()

    def _commit(self) -> None:
        """Write the batches that are together as one shard; the journal's line makes it part of the store."""
        assert self._journal is not None
        first, batches = self.next_batch, len(self._collected)
        rows = StoredRows.joined(self._collected)
        self._collected = []
        stem = f"r{self._rank}-{first // self._facts.batches_per_shard:06d}"
        with writing(self.directory, f"shard {stem} of {rows.nbytes} bytes", f" from batch {first}"):
            files = write_shard(self.directory, stem, rows, self._facts)
            shard = ShardRecord(stem, self._rank, first, batches, len(rows), files)
            self._journal.commit(shard)
        self._safe += Safe.of([shard])

    def _end(self) -> None:
        if self._journal is not None:
            if self._collected:
                self._commit()
            with writing(self.directory, "the end of the journal"):
                self._journal.finish()
