"""The score rows of a run, a bounded number at a time: memory does not grow with the run."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.errors import AnalysisError
from analysis.ranks import rank_shares
from analysis.runs import Run, read_shard
from ghost.scores import Column, read_columns
from ghost.values import column_values, row_values

CHUNK_ROWS = 2**21

Steps = tuple[int, int]
"""The first and the last step of a range."""


@dataclass(frozen=True)
class Rows:
    """Score rows in the order of their steps.

    Attributes:
        step: `[n]` int64, ascending.
        sample: `[n]` int64, running indices.
        value: `[n]` float64, finite.
    """

    step: NDArray[np.int64]
    sample: NDArray[np.int64]
    value: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.step)

    def part(self, first: int, end: int) -> "Rows":
        """The rows from `first` up to but without `end`."""
        return Rows(self.step[first:end], self.sample[first:end], self.value[first:end])

    def copy(self) -> "Rows":
        """The same rows in memory of their own: they hold on to no file and to no other rows."""
        return Rows(self.step.copy(), self.sample.copy(), self.value.copy())

    def step_starts(self) -> NDArray[np.int64]:
        """Where each step's rows begin, `[S]`."""
        new = np.ones(len(self), dtype=bool)
        np.not_equal(self.step[1:], self.step[:-1], out=new[1:])
        return np.flatnonzero(new)

    def step_shares(self) -> NDArray[np.float64]:
        """Each row's rank within its step as a share, `[n]` (`analysis.ranks`)."""
        starts = self.step_starts()
        sizes = np.diff(np.append(starts, len(self)))
        shares = np.empty(len(self))
        for size in np.unique(sizes).tolist():  # most steps have as many rows
            place = starts[sizes == size][:, None] + np.arange(size)  # [steps of this size, size]
            shares[place] = rank_shares(self.value[place])
        return shares


@dataclass(frozen=True)
class Piece:
    """Successive rows of one shard.

    Attributes:
        rows: Those whose value is finite.
        lost: How many others there were.
        shard: The shard's tensors, of the rows kept.
        columns: What the columns of its scores are.
    """

    rows: Rows
    lost: int
    shard: dict[str, Tensor]
    columns: tuple[Column, ...]

    def column_values(self) -> NDArray[np.float64]:
        """What each column adds to the rows' values, `[n, K]`."""
        return column_values(self.shard, len(self.columns)).numpy()


def read_pieces(run: Run, steps: Steps | None = None, most_rows: int = CHUNK_ROWS) -> Iterator[Piece]:
    """The score rows of a run in the order of their steps, each piece of one shard.

    Args:
        steps: Only rows of these steps; None: all.
        most_rows: Rows of a piece at most, of shards with one column; fewer of wider shards.

    Raises:
        AnalysisError: A shard is missing or damaged, or has steps before those of the shard before it.
    """
    latest = None
    for paths in run.shards_of_ranks():
        path, columns = paths[0], read_columns(paths[0])
        shard = _together([read_shard(path) for path in paths])
        if not len(shard["step"]):
            continue
        shard = _by_step(shard)
        first, last = int(shard["step"][0]), int(shard["step"][-1])
        if latest is not None and first < latest:
            raise AnalysisError(
                f"{path} has step {first} after step {latest} of the shards before it: the folder mixes runs."
            )
        latest = last
        yield from _pieces(path, shard, columns, steps or (first, last), most_rows)


def whole_steps(pieces: Iterable[Piece], most_rows: int = CHUNK_ROWS) -> Iterator[Rows]:
    """The rows put together to some `most_rows` at a time, so that all rows of a step come at once."""
    held: list[Rows] = []
    count = 0
    for piece in pieces:
        if not len(piece.rows):
            continue
        held.append(piece.rows.copy())
        count += len(piece.rows)
        if count < most_rows or held[0].step[0] == piece.rows.step[-1]:
            continue
        rows = _joined(held)
        cut = int(np.searchsorted(rows.step, rows.step[-1]))  # the last step may go on in the next piece
        yield rows.part(0, cut)
        held, count = [rows.part(cut, count).copy()], count - cut
    if held:
        yield _joined(held)


def _pieces(
    path: Path, shard: dict[str, Tensor], columns: tuple[Column, ...], steps: Steps, most_rows: int
) -> Iterator[Piece]:
    if shard["score"].shape[1:].numel() != len(columns):
        raise AnalysisError(f"{path} has other columns than {path.with_suffix('.json').name} beside it says.")
    step = shard["step"].numpy()
    begin, end = np.searchsorted(step, [steps[0], steps[1] + 1]).tolist()
    size = max(1, most_rows // len(columns))
    for start in range(begin, end, size):
        yield _piece(
            {name: column[start : min(start + size, end)] for name, column in shard.items()}, columns
        )


def _piece(shard: dict[str, Tensor], columns: tuple[Column, ...]) -> Piece:
    value = row_values(shard).numpy()
    finite = np.isfinite(value)
    lost = 0
    if not finite.all():
        kept = torch.from_numpy(finite)
        shard, lost = {name: column[kept] for name, column in shard.items()}, int((~finite).sum())
        value = value[finite]
    return Piece(Rows(shard["step"].numpy(), shard["sample"].numpy(), value), lost, shard, columns)


def _together(shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of several ranks, one rank's behind the other's."""
    if len(shards) == 1:
        return shards[0]  # mapped into memory, and left there
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def _by_step(shard: dict[str, Tensor]) -> dict[str, Tensor]:
    """The shard with its steps in order, as runs write them; the order within a step stays."""
    step = shard["step"].numpy()
    if (step[1:] >= step[:-1]).all():
        return shard
    order = torch.from_numpy(step.argsort(kind="stable"))
    return {name: column[order] for name, column in shard.items()}


def _joined(rows: list[Rows]) -> Rows:
    if len(rows) == 1:
        return rows[0]
    return Rows(
        np.concatenate([one.step for one in rows]),
        np.concatenate([one.sample for one in rows]),
        np.concatenate([one.value for one in rows]),
    )
