"""An aggregate of several runs, as its folder holds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import AnalysisError
from analysis.runs import Run, load_run

_TEXT, _WHOLE, _NUMBER = pa.string(), pa.int64(), pa.float64()
# Columns that a report reads, by type.
_VALUES = dict.fromkeys(("sample_id", "domain"), _TEXT)
_VALUES |= dict.fromkeys(("times_seen", "runs", "rank"), _WHOLE)
_VALUES |= dict.fromkeys(("value", "std", "low", "high", "run_rank", "positive", "sign_stability"), _NUMBER)
_RUNS = dict.fromkeys(("run", "directory", "model", "optimizer", "dtype"), _TEXT)
_RUNS |= dict.fromkeys(("seed", "steps", "samples"), _WHOLE) | {"total": _NUMBER}
_DOMAINS = dict.fromkeys(("run", "domain"), _TEXT) | {"samples": _WHOLE}
_DOMAINS |= dict.fromkeys(("total", "mean", "share", "negative"), _NUMBER)
_TRAJECTORIES = {"run": _TEXT, "step": _WHOLE, "domain": _TEXT, "mean": _NUMBER}
_COLUMNS = {"run": _TEXT, "part": _TEXT, "val": _TEXT, "total": _NUMBER}
_CORRELATIONS = dict.fromkeys(("run_a", "run_b"), _TEXT) | {"shared": _WHOLE}
_CORRELATIONS |= dict.fromkeys(("spearman", "kendall", "pearson", "same_sign"), _NUMBER)


@dataclass(frozen=True)
class Aggregate:
    """The folder that `python -m analysis.aggregate` wrote; its tables are read on first use.

    Every table raises `AnalysisError` where it is missing or damaged.
    """

    directory: Path

    @cached_property
    def values(self) -> pa.Table:
        """A row for each sample that any run scored."""
        return self._table("values.parquet", _VALUES)

    @cached_property
    def runs(self) -> pa.Table:
        """A row for each run."""
        return self._table("runs.parquet", _RUNS)

    @cached_property
    def domains(self) -> pa.Table:
        """A row for each run and domain."""
        return self._table("domains.parquet", _DOMAINS)

    @cached_property
    def trajectories(self) -> pa.Table:
        """A row for each run, step and domain."""
        return self._table("trajectories.parquet", _TRAJECTORIES)

    @cached_property
    def columns(self) -> pa.Table:
        """A row for each run, part of the model, validation set and domain."""
        return self._table("columns.parquet", _COLUMNS)

    @cached_property
    def correlations(self) -> pa.Table:
        """A row for each pair of runs."""
        return self._table("correlations.parquet", _CORRELATIONS)

    @property
    def names(self) -> list[str]:
        """The runs' names."""
        return self.runs["run"].to_pylist()

    def open_runs(self) -> dict[str, Run]:
        """The runs whose directories are still where they were, by name."""
        found = {}
        for row in self.runs.select(["run", "directory"]).to_pylist():
            try:
                found[row["run"]] = load_run(Path(row["directory"]))
            except AnalysisError:
                continue
        return found

    def has(self, name: str) -> bool:
        """Whether the folder holds a file of that name."""
        return (self.directory / name).is_file()

    def _table(self, name: str, columns: Mapping[str, pa.DataType]) -> pa.Table:
        path = self.directory / name
        if not path.is_file():
            raise AnalysisError(f"{path} is missing: give a folder that python -m analysis.aggregate wrote.")
        try:
            table = pq.read_table(path)
            if absent := [column for column in columns if column not in table.column_names]:
                raise AnalysisError(
                    f"{path} has no column {absent[0]!r}; it has {', '.join(table.column_names)}."
                )
            return table.select(list(columns)).cast(pa.schema(columns))
        except (pa.ArrowException, OSError) as error:
            raise AnalysisError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
