"""Lists of sample ids on disk: what to keep, what to drop."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from analysis.errors import AnalysisError
from conf.errors import first_line
from ghost.atomic import written_beside

ENDINGS = (".txt", ".csv", ".parquet")
_ID = "sample_id"


def read_list(path: Path) -> list[str]:
    """The ids of a list, in its order.

    A .txt has one id a line; a .csv or .parquet a column `sample_id`, and any others.

    Raises:
        AnalysisError: The file is missing, of another kind, damaged or empty, or has an id twice.
    """
    ids = _read_text(path) if _checked(path).suffix == ".txt" else _read_table(path)
    if not ids:
        raise AnalysisError(f"{path} lists no sample: give a list with ids")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise AnalysisError(f"{path} has {twice!r} more than once: a list has each id once")
    return ids


def write_list(table: pa.Table, path: Path) -> None:
    """Write a table with a column `sample_id` in the format of the path's ending, atomically; a .txt gets the
    ids alone.

    Raises:
        AnalysisError: The ending is none of a list's, the file cannot be written, or an id has a line break
            that a .txt cannot hold.
    """
    if path.suffix not in ENDINGS:
        raise AnalysisError(f"{path} ends in none of {', '.join(ENDINGS)}: give it one of these endings")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as partial:
            if path.suffix == ".parquet":
                pq.write_table(table, partial)
            elif path.suffix == ".csv":
                pyarrow.csv.write_csv(table, partial)
            else:
                partial.write_text(_lines(table[_ID].to_pylist(), path), encoding="utf-8")
    except OSError as error:
        raise AnalysisError(
            f"{path} cannot be written ({first_line(error)}): name a file elsewhere"
        ) from error


def _lines(ids: list[str], path: Path) -> str:
    for name in ids:
        if name.splitlines() != [name] or name != name.strip():
            raise AnalysisError(f"{path} cannot hold the id {name!r}, which is no line: end it in .parquet")
    return "".join(f"{name}\n" for name in ids)


def _checked(path: Path) -> Path:
    if path.suffix not in ENDINGS:
        raise AnalysisError(f"{path} is no list: lists end in {', '.join(ENDINGS)}")
    if not path.is_file():
        raise AnalysisError(f"{path} is missing: give a list of sample ids")
    return path


def _read_text(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AnalysisError(f"{path} cannot be read ({first_line(error)}): give a text file") from error
    return [line.strip() for line in lines if line.strip()]


def _read_table(path: Path) -> list[str]:
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, columns=[_ID])
        else:
            as_text = pyarrow.csv.ConvertOptions(include_columns=[_ID], column_types={_ID: pa.string()})
            table = pyarrow.csv.read_csv(path, convert_options=as_text)
    except (pa.ArrowException, OSError) as error:
        raise AnalysisError(
            f"{path} cannot be read ({first_line(error)}): it needs a column {_ID}"
        ) from error
    if table.num_columns == 0:
        raise AnalysisError(f"{path} has no column {_ID}: it needs one")
    return table[_ID].cast(pa.string()).to_pylist()
