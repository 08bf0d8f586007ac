"""Score shards: flat tensors with one row for each scored sample at each step, written atomically."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ghost.atomic import write_atomically
from ghost.errors import GhostConfigError

COLUMNS = ("step", "sample", "score", "lr", "clip")


def save_atomically(obj: object, path: Path) -> None:
    """`torch.save` of a whole file or none.

    Raises:
        OSError: The system does not take it.
    """
    content = BytesIO()  # written to a file itself, `torch.save` would lose the system's reason
    torch.save(obj, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


@dataclass(frozen=True)
class Column:
    """What a column of a wide shard's scores is.

    Attributes:
        part: The layer, family or head, or "total".
        lr_group: The optimizer's parameter group.
        val: The validation set; "pair j" for the step's j-th validation row; empty where there is one set.
    """

    part: str
    lr_group: int
    val: str


ONE_COLUMN = (Column("total", 0, ""),)


class ScoreLog:
    """Rows `(step, sample, score, lr, clip)` on their way to `scores/shard-*.pt`.

    With one column `score` and `lr` are `[n]`, else `[n, K]`, and `shard-*.json` beside the shard says what
    each column is. Columns add up to a row's value, `Σ_k score_k · lr_k · clip`. Pairwise shards have `val
    [n, V]` as well, the validation rows that the columns are about.

    Shards of second-order scores have `curvature` too, of the shape of `score` (`ghost.values`), and those of
    a run with a policy `weight` `[n]`.

    Several ranks write into one folder, each its own shards `shard-*-rank*.pt`.

    Args:
        directory: The shards' folder; made when the first shard is written. Must not hold shards of another
            run.
        dtype: dtype of the stored scores; None for the scores' own. Rates and coefficients are float64
            always.
        written: How many shards an earlier log of this run has written, to go on behind them; what it wrote
            later is deleted, since it will be written again. None for a new run.
        rank, world_size: Which of how many logs this is.

    Raises:
        GhostConfigError: There are shards of another run, or fewer than were written.
    """

    def __init__(
        self, directory: Path, dtype: torch.dtype | None = None, written: int | None = None,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        self.directory, self._dtype = directory, dtype
        self._rank, self._world_size = rank, world_size
        self._rows: list[dict[str, Tensor]] = []
        self._columns: tuple[Column, ...] = ONE_COLUMN
        self._shards = written or 0
        if written is None:
            self._refuse_earlier_shards()
        else:
            self._go_back_to(written)

    @property
    def written(self) -> int:
        """How many shards are on disk."""
        return self._shards

    def _refuse_earlier_shards(self) -> None:
        # Of several ranks each looks for its own: another may have begun to write.
        if any(self.directory.glob(self._name("*"))):
            raise GhostConfigError(
                f"result_dir has score shards of another run in {self.directory}: choose an empty folder, so "
                "that none is overwritten."
            )

    def _go_back_to(self, written: int) -> None:
        missing = [n for n in range(written) if not self._path(n).exists()]
        if missing:
            raise GhostConfigError(
                f"result_dir lacks {self._path(missing[0])}, which the run to go on with had written: "
                "restore it, or start the run anew."
            )
        kept = {self._path(n) for n in range(written)}
        for path in set(self.directory.glob(self._name("*"))) - kept:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.directory / self._name(f"{number:05d}")

    def _name(self, number: str) -> str:
        own = f"-rank{self._rank:05d}" if self._world_size > 1 else ""
        return f"shard-{number}{own}.pt"

    def append(
        self, step: int, sample: Tensor, score: Tensor, lr: Tensor, clip: Tensor,
        columns: Sequence[Column] = ONE_COLUMN, val: Tensor | None = None, curvature: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add one step's rows; they stay on their device until they are written.

        Args:
            sample: `[n]` int64.
            score: `[n, K]`.
            lr: `[K]`.
            clip: 0-dim.
            columns: What the K columns are.
            val: `[V]` int64, the validation rows that pairwise columns are about.
            curvature: `[n, K]`, the second-order term of scores that have one.
            weight: `[n]`, how often each row's sample is in the step that was taken; None for once.
        """
        if tuple(columns) != self._columns:
            self.flush()  # a shard's rows have the same columns
        self._columns = tuple(columns)
        shape = score.shape[:1] if len(columns) == 1 else score.shape
        row = {
            "step": torch.full_like(sample, step),
            "sample": sample,
            "score": score.reshape(shape).to(self._dtype),
            "lr": lr.double().expand(score.shape).reshape(shape),
            "clip": clip.double().expand(sample.shape[0]),
        }
        if curvature is not None:
            row["curvature"] = curvature.reshape(shape).to(self._dtype)
        if weight is not None:
            row["weight"] = weight.double()
        if val is not None:
            row["val"] = val.expand(sample.shape[0], -1)
        self._rows.append(row)

    def flush(self) -> Path | None:
        """Write what has been added since the last shard; returns its path, or None for nothing."""
        if not self._rows:
            return None
        shard = {key: torch.cat([row[key].cpu() for row in self._rows]) for key in self._rows[0]}
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(self._shards)
        if self._columns != ONE_COLUMN:
            described = json.dumps([asdict(column) for column in self._columns], indent=1)
            write_atomically(path.with_suffix(".json"), lambda file: file.write(described.encode()))
        save_atomically(shard, path)
        self._rows, self._shards = [], self._shards + 1
        return path


def read_columns(shard: Path) -> tuple[Column, ...]:
    """What the columns of a shard's scores are."""
    described = shard.with_suffix(".json")
    if not described.exists():
        return ONE_COLUMN
    return tuple(Column(**column) for column in json.loads(described.read_text()))
