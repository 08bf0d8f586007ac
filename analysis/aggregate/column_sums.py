"""Values by part of the model and validation set, or validation sample, of runs whose scores have columns."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.errors import AnalysisError
from analysis.samples import DELETED, RunSamples
from analysis.stream import Piece
from ghost.scores import ONE_COLUMN

ColumnKey = tuple[str, str]
"""Part of the model; validation set, or id of a validation sample, or empty."""


_WHOLE = {(column.part, column.val) for column in ONE_COLUMN}


@dataclass(frozen=True)
class ColumnValues:
    """Values of a run's `n` scored samples by column, each `[n]`: float64, and whether there is one."""

    value: dict[ColumnKey, NDArray[np.float64]]
    scored: dict[ColumnKey, NDArray[np.bool_]]


class ColumnSums:
    """Sums over score rows by sample and column; the columns of a sample add up to its value."""

    def __init__(self, samples: RunSamples) -> None:
        self._samples = samples
        self._value: dict[ColumnKey, NDArray[np.float64]] = defaultdict(lambda: np.zeros(samples.size))
        self._scored: dict[ColumnKey, NDArray[np.bool_]] = defaultdict(
            lambda: np.zeros(samples.size, dtype=bool)
        )
        # Of pairs: a row for each validation sample.
        self._pair_value: dict[str, NDArray[np.float64]] = {}
        self._pair_scored: dict[str, NDArray[np.bool_]] = {}

    def add(self, piece: Piece) -> None:
        """Add rows of a shard; columns that differ by their learning rate alone tell nothing more than the
        values.

        Raises:
            AnalysisError: A row is of a sample or a validation row that the run does not have.
        """
        if {(column.part, column.val) for column in piece.columns} <= _WHOLE or not len(piece.rows):
            return
        self._samples.domains_of(piece.rows.sample)
        values = piece.column_values()
        if "val" in piece.shard:
            self._add_pairs(piece, values)
            return
        for k, column in enumerate(piece.columns):
            key = column.part, column.val
            np.add.at(self._value[key], piece.rows.sample, values[:, k])
            self._scored[key][piece.rows.sample] = True

    def result(self, index: NDArray[np.int64]) -> ColumnValues | None:
        """The sums of the samples with these running indices; None where no scores have columns."""
        value = {key: found[index] for key, found in self._value.items()}
        scored = {key: found[index] for key, found in self._scored.items()}
        for part, found in self._pair_value.items():
            for row, name in enumerate(self._samples.val_ids):
                own = self._pair_scored[part][row, index]
                if name is not None and own.any():
                    value[part, name], scored[part, name] = found[row, index], own
        return ColumnValues(value, scored) if value else None

    def _add_pairs(self, piece: Piece, values: NDArray[np.float64]) -> None:
        rows = piece.shard["val"].numpy()  # [n, V]
        number, wide = len(self._samples.val_ids), rows.shape[1]
        if rows.min() < DELETED or rows.max() >= number or len(piece.columns) % wide:
            raise AnalysisError(
                f"{self._samples.run.directory}/scores has scores for other validation samples than the "
                f"{number} of samples.parquet."
            )
        there = rows != DELETED
        place = (rows * self._samples.size + piece.rows.sample[:, None])[there]
        for first in range(0, len(piece.columns), wide):  # each part has a column for each pair
            part = piece.columns[first].part
            if part not in self._pair_value:
                self._pair_value[part] = np.zeros((number, self._samples.size))
                self._pair_scored[part] = np.zeros((number, self._samples.size), dtype=bool)
            np.add.at(self._pair_value[part].reshape(-1), place, values[:, first : first + wide][there])
            self._pair_scored[part].reshape(-1)[place] = True
