"""Training samples found for queries, as rows: ranked, named, shown and saved."""

import json
from collections.abc import Mapping, Sequence
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
        *(("query", pa.string()), ("query_domain", pa.string())),
        *(("end", pa.string()), ("rank", pa.int64())),
        *(("sample_id", pa.string()), ("domain", pa.string()), ("index", pa.int64())),
        ("score", pa.float64()),
    ]
)
HIGHEST, LOWEST = "highest", "lowest"  # which end of the scores a row is of
TEXT, QUERY_TEXT = "text", "query_text"  # columns that are there where text is asked for
FORMATS = (".parquet", ".json", ".csv")


def neighbour_table(
    queries: Sequence[tuple[str, str]],
    found: np.ndarray,
    scores: np.ndarray,
    samples: pa.Table,
    end: str = HIGHEST,
) -> pa.Table:
    """One row of `SCHEMA` for each query and sample found for it, rank 1 being the outermost of its end.

    Args:
        queries: Id and domain of each of q queries.
        found: Indices of the samples found, `[q, k]`.
        scores: `[q, k]`.
        samples: `index`, `sample_id` and `domain` of what was searched, `index` ascending.
        end: `HIGHEST` or `LOWEST`.
    """
    q, k = found.shape
    rows = samples.take(np.searchsorted(samples["index"].to_numpy(), found.ravel()))
    columns = [
        [name for name, _ in queries for _ in range(k)],
        [domain for _, domain in queries for _ in range(k)],
        [end] * (q * k),
        np.tile(np.arange(1, k + 1), q),
        rows["sample_id"].combine_chunks(),
        rows["domain"].combine_chunks(),
        rows["index"].combine_chunks(),
        scores.ravel().astype(np.float64),
    ]
    return pa.table([pa.array(column) for column in columns], schema=SCHEMA)


def with_texts(neighbours: pa.Table, texts: Mapping[str, str], query_texts: Mapping[str, str]) -> pa.Table:
    """The rows with the first words of their samples and queries, by id; a query without any has null."""
    own = [texts[name] for name in neighbours["sample_id"].to_pylist()]
    asked = [query_texts.get(name) for name in neighbours["query"].to_pylist()]
    for column, words in ((QUERY_TEXT, asked), (TEXT, own)):
        neighbours = neighbours.append_column(column, pa.array(words, pa.string()))
    return neighbours


def print_neighbours(neighbours: pa.Table, title: str, score: str, console: Console) -> None:
    """Print a table of all rows, their texts where they have them; `score` is the heading of that column."""
    table = Table(title=title, title_justify="left", show_lines=TEXT in neighbours.column_names)
    for heading in ("query", "domain", "training sample", "domain"):
        table.add_column(heading, overflow="fold")
    table.add_column(score, justify="right", no_wrap=True)
    for row in neighbours.to_pylist():
        first = row["rank"] == 1
        table.add_row(
            _cell(row["query"], row.get(QUERY_TEXT)) if first else "",
            Text(row["query_domain"] if first else ""),
            _cell(row["sample_id"], row.get(TEXT)),
            Text(row["domain"]),
            f"{row['score']:#.4g}",
        )
    console.print(table)


def _cell(name: str, text: str | None) -> Text:
    """A Text object, since an id or a text may hold what rich would take for markup."""
    cell = Text(name)
    if text is not None:
        cell.append(f"\n{text}", style="dim")
    return cell


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


def chosen_indices(
    samples: pa.Table, domains: Sequence[str], ids: Sequence[str], searched: str
) -> np.ndarray | None:
    """Indices of the samples of these domains and with these ids, ascending; None where neither is given.

    Args:
        searched: What has the samples, `key=value`.

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
            raise ConfigError(f"{key}={unknown[0]} is nothing that {searched} has{hint}")
        if wanted:
            keep = pc.and_(keep, pc.is_in(samples[column], pa.array(wanted)))
    chosen = samples.filter(keep)["index"].to_numpy()
    if not len(chosen):
        raise ConfigError(
            f"ids={','.join(ids)} are not of domains={','.join(domains)}: leave out one of them"
        )
    return chosen
