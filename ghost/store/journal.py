"""A rank's journal: a line for each committed shard, so that a commit costs the same at any size."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghost.store.files import damaged
from ghost.store.manifest import ShardRecord


def journal_path(directory: Path, rank: int) -> Path:
    """Where a rank's journal is."""
    return directory / f"journal-r{rank}.jsonl"


@dataclass(frozen=True)
class Progress:
    """What a journal says.

    Attributes:
        shards: The committed shards.
        done: Whether the rank has written all its batches.
        size: Bytes of the journal's whole lines; what is behind them was torn by a kill.
    """

    shards: tuple[ShardRecord, ...] = ()
    done: bool = False
    size: int = 0

    @classmethod
    def read(cls, path: Path) -> "Progress":
        """The progress in a journal; none where there is no journal.

        Raises:
            StoreError: A whole line cannot be read, or shards do not follow on each other.
        """
        try:
            whole = path.read_bytes().rpartition(b"\n")[0]
        except FileNotFoundError:
            return cls()
        shards: list[ShardRecord] = []
        done = False
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                done = done or "done" in entry
                if "done" not in entry:
                    shards.append(ShardRecord.read(entry))
            except (ValueError, KeyError, TypeError) as error:
                raise damaged(path, f"cannot be read at line {number}") from error
        follows = 0
        for shard in shards:
            if shard.first_batch != follows:
                raise damaged(path, f"names no shard that begins with batch {follows}")
            follows += shard.batches
        return cls(tuple(shards), done, len(whole) + 1 if whole else 0)


class Journal:
    """Appends to a rank's journal. Only the rank's writer has one, which holds the rank's lock.

    Args:
        path: The journal; made where there is none, and cut to its whole lines.
    """

    def __init__(self, path: Path) -> None:
        self.found = Progress.read(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._file, self.found.size)
        os.fsync(self._file)

    def commit(self, shard: ShardRecord) -> None:
        """Note a shard whose files are safe."""
        self._append(shard.described())

    def finish(self) -> None:
        """Note that the rank has written all its batches."""
        if not self.found.done:
            self._append({"done": True})

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)
