"""The tables of an aggregate: their columns, and a folder of them on disk."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import AnalysisError
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


@dataclass(frozen=True)
class Aggregate:
    """The tables in a folder of `python -m analysis.aggregate`; their columns are the schemas above."""

    values: pa.Table
    runs: pa.Table
    domains: pa.Table
    trajectories: pa.Table
    correlations: pa.Table
    columns: pa.Table | None
    column_values: pa.Table | None


def read_aggregate(folder: Path) -> Aggregate:
    """The tables in a folder.

    Raises:
        AnalysisError: The folder holds no aggregate, or one of its files is missing or damaged.
    """
    if not (folder / _file("values")).is_file():
        raise AnalysisError(f"{folder} holds no aggregate: give the folder that analysis.aggregate wrote")
    return Aggregate(**{name: _read(folder / _file(name), name) for name in SCHEMAS})


def check_folder(folder: Path) -> None:
    """Raises `AnalysisError` for a folder that tables may not be written to: one with other files in it."""
    if folder.exists() and not folder.is_dir():
        raise AnalysisError(f"out={folder} is no folder: name a new one")
    own = {_file(name) for name in SCHEMAS}
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


def _read(path: Path, name: str) -> pa.Table | None:
    if name in OPTIONAL and not path.exists():
        return None
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise AnalysisError(f"{path} cannot be read: {first_line(error)}") from error
    if not table.schema.equals(SCHEMAS[name]):
        raise AnalysisError(f"{path} has the columns {table.schema.names}, not {SCHEMAS[name].names}")
    return table
