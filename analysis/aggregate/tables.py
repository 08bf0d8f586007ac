"""The tables of an aggregate: their columns, and a folder of them on disk."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import AnalysisError
from analysis.runs import Run, load_run
from conf.errors import first_line
from ghost.atomic import written_beside

log = logging.getLogger(__name__)

_STRING, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()

VALUES = pa.schema(
    [
        *(
            ("sample_id", _STRING),
            ("domain", _STRING),
            ("value", _FLOAT),
            ("times_seen", _INT),
            ("runs", _INT),
        ),
        *(("std", _FLOAT), ("low", _FLOAT), ("high", _FLOAT), ("rank", _INT), ("run_rank", _FLOAT)),
        *(("step_rank", _FLOAT), ("step_std", _FLOAT), ("positive", _FLOAT), ("sign_stability", _FLOAT)),
    ]
)
RUNS = pa.schema(
    [
        *(("run", _STRING), ("directory", _STRING), ("run_id", _STRING), ("seed", _INT), ("model", _STRING)),
        *(("optimizer", _STRING), ("dtype", _STRING), ("engine", _STRING)),
        *(("steps", _INT), ("samples", _INT), ("total", _FLOAT)),
    ]
)
DOMAINS = pa.schema(
    [
        *(("run", _STRING), ("domain", _STRING), ("samples", _INT), ("times_seen", _INT)),
        *(("total", _FLOAT), ("mean", _FLOAT), ("share", _FLOAT), ("negative", _FLOAT)),
    ]
)
TRAJECTORIES = pa.schema(
    [("run", _STRING), ("step", _INT), ("domain", _STRING), ("total", _FLOAT), ("mean", _FLOAT)]
)
CORRELATIONS = pa.schema(
    [
        *(("run_a", _STRING), ("run_b", _STRING), ("shared", _INT), ("spearman", _FLOAT)),
        *(("kendall", _FLOAT), ("pearson", _FLOAT), ("same_sign", _FLOAT), ("differ", _STRING)),
    ]
)
COLUMNS = pa.schema(
    [
        *(("run", _STRING), ("part", _STRING), ("val", _STRING), ("domain", _STRING)),
        *(("samples", _INT), ("total", _FLOAT), ("mean", _FLOAT)),
    ]
)
COLUMN_VALUES = pa.schema(
    [("sample_id", _STRING), ("domain", _STRING), ("part", _STRING), ("val", _STRING), ("value", _FLOAT)]
)

SCHEMAS = {
    "values": VALUES,
    "runs": RUNS,
    "domains": DOMAINS,
    "trajectories": TRAJECTORIES,
    "correlations": CORRELATIONS,
    "columns": COLUMNS,
    "column_values": COLUMN_VALUES,
}
OPTIONAL = ("columns", "column_values")
"""Only there where a run's scores have columns."""

BESIDE = ("comparison.json", "report.html")
"""What else may be in the folder: `analysis.report` reads the one and may write the other there."""


@dataclass(frozen=True)
class Aggregate:
    """The tables in a folder of `python -m analysis.aggregate`, each read on first use; their columns are the
    schemas above. A table that is missing or damaged raises `AnalysisError`.
    """

    directory: Path

    @cached_property
    def values(self) -> pa.Table:
        """A row for each sample that any run scored."""
        return self._table("values")

    @cached_property
    def runs(self) -> pa.Table:
        """A row for each run."""
        return self._table("runs")

    @cached_property
    def domains(self) -> pa.Table:
        """A row for each run and domain."""
        return self._table("domains")

    @cached_property
    def trajectories(self) -> pa.Table:
        """A row for each run, step and domain."""
        return self._table("trajectories")

    @cached_property
    def correlations(self) -> pa.Table:
        """A row for each pair of runs."""
        return self._table("correlations")

    @cached_property
    def columns(self) -> pa.Table | None:
        """A row for each run, part of the model, validation set and domain; None without such scores."""
        return self._optional("columns")

    @cached_property
    def column_values(self) -> pa.Table | None:
        """A row for each sample, part of the model and validation set; None without such scores."""
        return self._optional("column_values")

    @property
    def names(self) -> list[str]:
        """The runs' names."""
        return self.runs["run"].to_pylist()

    def open_runs(self) -> dict[str, Run]:
        """The runs whose directories are still where they were, by name."""
        found = {}
        for row in self.runs.select(["run", "directory"]).to_pylist():
            try:
                found[row["run"]] = replace(load_run(Path(row["directory"])), name=row["run"])
            except AnalysisError:
                continue
        return found

    def _optional(self, name: str) -> pa.Table | None:
        return self._table(name) if (self.directory / _file(name)).exists() else None

    def _table(self, name: str) -> pa.Table:
        path, schema = self.directory / _file(name), SCHEMAS[name]
        if not path.is_file():
            raise AnalysisError(f"{path} is missing: give the folder that analysis.aggregate wrote")
        try:
            table = pq.ParquetFile(path).read()
            if absent := [column for column in schema.names if column not in table.column_names]:
                there = ", ".join(table.column_names)
                raise AnalysisError(f"{path} has no column {absent[0]!r}, only {there}: it is no aggregate's")
            return table.select(schema.names).cast(schema)
        except (pa.ArrowException, OSError) as error:
            raise AnalysisError(f"{path} is damaged: {first_line(error)}") from error


def read_aggregate(folder: Path) -> Aggregate:
    """The aggregate in a folder.

    Raises:
        AnalysisError: The folder holds none.
    """
    for name in ("values", "runs"):  # a run has the first alone
        if not (folder / _file(name)).is_file():
            raise AnalysisError(
                f"{folder} holds no aggregate, since it has no {_file(name)}: give the folder that "
                "analysis.aggregate wrote"
            )
    return Aggregate(folder)


def check_folder(folder: Path) -> None:
    """Raises `AnalysisError` for a folder that tables may not be written to: one with other files in it."""
    if folder.exists() and not folder.is_dir():
        raise AnalysisError(f"out={folder} is no folder: name a new one")
    own = {_file(name) for name in SCHEMAS} | set(BESIDE)
    if folder.is_dir() and (foreign := sorted({path.name for path in folder.iterdir()} - own)):
        raise AnalysisError(f"out={folder} has other files in it, such as {foreign[0]}: name a new folder")


def write_aggregate(tables: Mapping[str, Iterable[pa.Table]], folder: Path) -> None:
    """Write tables, each given in parts, to `<name>.parquet`; they take the place of an earlier aggregate's
    once all are written.

    Raises:
        AnalysisError: The folder has other files in it, or cannot be written.
    """
    check_folder(folder)
    if any(folder.glob("*.parquet")):
        log.info("The earlier aggregate in %s is replaced.", folder)
        for name in BESIDE:
            if (folder / name).exists():
                log.warning("%s is of the aggregate before: write it again.", folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for name, parts in tables.items():
                partial = stack.enter_context(written_beside(folder / _file(name)))
                with pq.ParquetWriter(partial, SCHEMAS[name]) as writer:
                    for part in parts:
                        writer.write_table(part)
        for name in set(SCHEMAS) - set(tables):
            (folder / _file(name)).unlink(missing_ok=True)
    except OSError as error:
        raise AnalysisError(f"out={folder} cannot be written ({first_line(error)}): name another") from error


def _file(name: str) -> str:
    return f"{name}.parquet"
