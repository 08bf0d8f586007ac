"""metrics.jsonl: the run's own record of every logged number, whatever becomes of the tracking store."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
RESERVED = frozenset({"step", "time", "non_finite"})
"""Keys of a line that are no metric's name."""


class MetricsLog:
    """Appends one JSON object per call: `{"step": int, "time": unix seconds, name: value, …}`.

    JSON knows no NaN and no infinity: such a value is written as null and spelled out under "non_finite",
    as in `{"step": 7, "time": …, "loss": null, "non_finite": {"loss": "nan"}}`. Several lines may share a
    step; where one name stands twice for a step (a resumed run repeats some), the later line counts.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        self._file: IO[str] | None = None

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line and hand it to the operating system, so that a killed process loses none.

        Raises:
            ValueError: a value is named "step", "time" or "non_finite".
            OSError: the system does not take the line; what it took of it is cut off by the next `append`.
        """
        if clash := sorted(RESERVED & values.keys()):
            raise ValueError(f"a metric must not be named {clash[0]!r}: {FILE_NAME} needs that key itself")
        row: dict[str, object] = {"step": int(step), "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        if strange := {name: str(value) for name, value in values.items() if not math.isfinite(value)}:
            row["non_finite"] = strange
        if self._file is None:
            self._file = self._open()
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError:
            with suppress(OSError):  # what the system has not taken is not tried again
                self.close()
            raise

    def safe_bytes(self) -> int:
        """Bring the lines down to the disk; returns the file's length."""
        if self._file is None:
            return self.path.stat().st_size if self.path.exists() else 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def go_back(self, size: int) -> None:
        """Cut the file to an earlier length, behind which its lines will be written again."""
        self.close()
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < size:
            log.warning("%s has %d bytes and had %d: some of its lines are lost", self.path, found, size)
        elif found > size:
            os.truncate(self.path, size)

    def close(self) -> None:
        """Close the file; the next `append` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _open(self) -> IO[str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._drop_partial_line()
        return self.path.open("a", encoding="utf-8")

    def _drop_partial_line(self) -> None:
        """Cut off a line that a killed process or a full disk left unfinished; it would spoil the next."""
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            log.warning("%s ends in an unfinished line of %d bytes; cut off", self.path, len(content) - end)
            with self.path.open("rb+") as file:
                file.truncate(end)
