"""Nearest samples as rows: found in a store, named by its samples, shown and saved."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.errors import ConfigError, first_line
from ghost.atomic import written_beside

SCHEMA = pa.schema(
    [
        *(("query", pa.string()), ("query_domain", pa.string()), ("rank", pa.int64())),
        *(("sample_id", pa.string()), ("domain", pa.string()), ("index", pa.int64())),
        ("score", pa.float64()),
    ]
)
FORMATS = (".parquet", ".json", ".csv")


def neighbour_table(
    queries: Sequence[tuple[str, str]], found: np.ndarray, scores: np.ndarray, samples: pa.Table
) -> pa.Table:
    """One row of `SCHEMA` for each query and neighbour, best first.

    Args:
        queries: Id and domain of each of q queries.
        found: Indices of the neighbours, `[q, k]`.
        scores: `[q, k]`.
        samples: `index`, `sample_id` and `domain` of the store's samples, `index` ascending.
    """
    q, k = found.shape
    rows = samples.take(np.searchsorted(samples["index"].to_numpy(), found.ravel()))
    columns = [
        [name for name, _ in queries for _ in range(k)],
        [domain for _, domain in queries for _ in range(k)],
        np.tile(np.arange(1, k + 1), q),
        rows["sample_id"].combine_chunks(),
        rows["domain"].combine_chunks(),
        rows["index"].combine_chunks(),
        scores.ravel().astype(np.float64),
    ]
    return pa.table([pa.array(column) for column in columns], schema=SCHEMA)


def print_neighbours(
    neighbours: pa.Table, score: str, previews: Callable[[int], str] | None, console: Console
) -> None:
    """Print a table of all rows, `score` being the heading of that column.

    Args:
        previews: From a sample's index to one line of its text; None shows none.
    """
    table = Table(title="Nearest training samples", title_justify="left", show_lines=previews is not None)
    for heading in ("query", "domain", "nearest sample", "domain"):
        table.add_column(heading, overflow="fold")
    table.add_column(score, justify="right", no_wrap=True)
    for row in neighbours.to_pylist():
        # Text objects, since an id or a text may hold what rich would take for markup.
        nearest = Text(row["sample_id"])
        if previews is not None:
            nearest.append("\n" + previews(row["index"]), style="dim")
        first = row["rank"] == 1
        table.add_row(
            Text(row["query"] if first else ""), Text(row["query_domain"] if first else ""), nearest,
            Text(row["domain"]), f"{row['score']:.4g}",
        )  # fmt: skip
    console.print(table)


def refuse_output(path: Path) -> None:
    """Raises `ConfigError` for a file that cannot be written, or is there."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"out={path} ends in none of {', '.join(FORMATS)}: give it one of these endings")
    if path.exists():
        raise ConfigError(f"out={path} exists: name a new file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"out={path} is in no folder that exists: make {path.parent} first")


def save_neighbours(neighbours: pa.Table, path: Path) -> None:
    """Write the table as its path's ending says, atomically.

    Raises:
        ConfigError: The system refuses.
    """
    try:
        with written_beside(path) as partial:
            if path.suffix == ".parquet":
                pq.write_table(neighbours, partial)
            elif path.suffix == ".csv":
                pyarrow.csv.write_csv(neighbours, partial)
            else:
                partial.write_text(json.dumps(neighbours.to_pylist(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        why = error.strerror or first_line(error)
        raise ConfigError(f"out={path} cannot be written ({why}): name a file elsewhere") from error


def chosen_indices(samples: pa.Table, domains: Sequence[str], ids: Sequence[str]) -> np.ndarray | None:
    """Indices of the samples of these domains and with these ids, ascending; None where neither is given.

    Raises:
        ConfigError: There is no such domain or id, or none with both.
    """
    if not domains and not ids:
        return None
    keep = pa.array(np.ones(len(samples), dtype=bool))
    for key, column, wanted in (("domains", "domain", domains), ("ids", "sample_id", ids)):
        present = pc.unique(samples[column]).to_pylist()
        if unknown := sorted(set(wanted) - set(present)):
            hint = f" (domains: {', '.join(sorted(present))})" if key == "domains" else ""
            raise ConfigError(f"{key}={unknown[0]} is nothing that the store has{hint}")
        if wanted:
            keep = pc.and_(keep, pc.is_in(samples[column], pa.array(wanted)))
    chosen = samples.filter(keep)["index"].to_numpy()
    if not len(chosen):
        raise ConfigError(
            f"ids={','.join(ids)} are not of domains={','.join(domains)}: leave out one of them"
        )
    return chosen
