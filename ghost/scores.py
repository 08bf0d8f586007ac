"""Score shards: flat tensors with one row for each scored sample at each step, written atomically."""

import os
from pathlib import Path

import torch
from torch import Tensor

from ghost.errors import GhostConfigError

COLUMNS = ("step", "sample", "score", "lr", "clip")


def save_atomically(obj: object, path: Path) -> None:
    """`torch.save` to a neighbour, flushed to disk, then renamed: the file is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class ScoreLog:
    """Rows `(step, sample, score, lr, clip)` on their way to `scores/shard-*.pt`.

    Where parameter groups have learning rates of their own, `score` and `lr` are `[n, R]` with one column a
    group; else `[n]`.

    Args:
        directory: The shards' folder; made when the first shard is written. Must not hold shards of another
            run.
        dtype: dtype of the stored scores; None for the scores' own. Rates and coefficients are float64
            always.
    """

    def __init__(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        if any(directory.glob("shard-*.pt")):
            raise GhostConfigError(
                f"result_dir has score shards of another run in {directory}: choose an empty folder, so that "
                "none is overwritten."
            )
        self.directory, self._dtype = directory, dtype
        self._rows: list[dict[str, Tensor]] = []
        self._shards = 0

    def append(self, step: int, sample: Tensor, score: Tensor, lr: Tensor, clip: Tensor) -> None:
        """Add one step's rows; they stay on their device until they are written.

        Args:
            sample: `[n]` int64.
            score: `[n]` or `[n, R]`.
            lr: 0-dim or `[R]`.
            clip: 0-dim.
        """
        if self._rows and self._rows[-1]["score"].shape[1:] != score.shape[1:]:
            self.flush()  # a shard's rows have one width
        self._rows.append(
            {
                "step": torch.full_like(sample, step),
                "sample": sample,
                "score": score.to(self._dtype),
                "lr": lr.double().expand(score.shape),
                "clip": clip.double().expand(sample.shape[0]),
            }
        )

    def flush(self) -> Path | None:
        """Write what has been added since the last shard; returns its path, or None for nothing."""
        if not self._rows:
            return None
        shard = {key: torch.cat([row[key].cpu() for row in self._rows]) for key in COLUMNS}
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"shard-{self._shards:05d}.pt"
        save_atomically(shard, path)
        self._rows, self._shards = [], self._shards + 1
        return path
