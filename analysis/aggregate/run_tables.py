"""The tables with rows for each run: runs, domains, trajectories, columns."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.aggregate.column_sums import ColumnKey, ColumnValues
from analysis.aggregate.run_sums import RunSums
from analysis.aggregate.sample_totals import SampleTotals
from analysis.aggregate.tables import COLUMN_VALUES, COLUMNS, DOMAINS, RUNS, TRAJECTORIES


def _engine(config: Mapping[str, Any]) -> str | None:
    """The engine, and whose step its values are about where that is not the gradient's."""
    wanted = (config.get("engine") or {}).get("preconditioner", "none")
    name = _name(config, "engine")
    return name if wanted == "none" else f"{name}, preconditioner={wanted}"


def run_row(sums: RunSums) -> pa.Table:
    """The run's row of `runs`."""
    run, config = sums.run, sums.run.config
    # What MLflow keeps is read from a copy; where the run was is in its config.
    directory = run.directory.absolute() if run.run_id is None else config.get("output_dir", run.directory)
    row = {
        "run": run.name,
        "directory": str(directory),
        "run_id": run.run_id,
        "seed": config.get("seed"),
        "model": _name(config, "model"),
        "optimizer": _name(config, "optimizer"),
        "dtype": _number_format(config.get("dtype")),
        "engine": _engine(config),
        "steps": sums.scored_steps,
        "samples": len(sums.ids),
        "total": float(sums.value.sum()),
    }
    return pa.Table.from_pylist([row], schema=RUNS)


def domain_rows(sums: RunSums) -> pa.Table:
    """The run's rows of `domains`, in alphabetical order."""
    by_domain = _by_domain(sums.domains, sums.value)
    seen = np.bincount(sums.domains.indices.to_numpy(), sums.times_seen, len(sums.domains.dictionary))
    below = np.bincount(sums.domains.indices.to_numpy(), sums.value < 0, len(sums.domains.dictionary))
    samples, total = by_domain["samples"].to_numpy(), by_domain["total"].to_numpy()
    place = by_domain["place"].to_numpy()
    size = np.abs(total).sum()
    columns = {
        "run": _repeated(sums.run.name, len(samples)),
        "domain": by_domain["domain"],
        "samples": samples,
        "times_seen": seen[place].astype(np.int64),
        "total": total,
        "mean": total / samples,
        "share": total / size if size > 0 else pa.nulls(len(total), pa.float64()),
        "negative": below[place] / samples,
    }
    return pa.table(columns, schema=DOMAINS)


def trajectory_rows(sums: RunSums, domains: pa.Table) -> pa.Table:
    """The run's rows of `trajectories`, from its own and its rows of `domains`; none without score shards."""
    if sums.trajectories is None:
        return TRAJECTORIES.empty_table()
    place = pc.index_in(sums.trajectories["domain"], value_set=domains["domain"].combine_chunks())
    samples = domains["samples"].combine_chunks().take(place.combine_chunks())
    mean = pc.divide(sums.trajectories["total"], samples.cast(pa.float64()))
    table = sums.trajectories.append_column("mean", mean)
    return table.add_column(0, "run", _repeated(sums.run.name, table.num_rows)).cast(TRAJECTORIES)


def column_rows(sums: RunSums) -> pa.Table:
    """The run's rows of `columns`; none where its scores have one column."""
    parts = [COLUMNS.empty_table()]
    if sums.columns is not None:
        for (part, val), value in sums.columns.value.items():
            scored = sums.columns.scored[part, val]
            own = _by_domain(sums.domains.filter(pa.array(scored)), value[scored])
            number = own.num_rows
            columns = {
                "run": _repeated(sums.run.name, number),
                "part": _repeated(part, number),
                "val": _repeated(val, number),
                "domain": own["domain"],
                "samples": own["samples"],
                "total": own["total"],
                "mean": pc.divide(own["total"], own["samples"].cast(pa.float64())),
            }
            parts.append(pa.table(columns, schema=COLUMNS))
    return pa.concat_tables(parts)


class ColumnTotals:
    """Values by sample and column, over runs: for each column its sum over runs and their number, `[N]`."""

    def __init__(self) -> None:
        self._sums: dict[ColumnKey, tuple[NDArray[np.float64], NDArray[np.int64]]] = {}

    def add(self, columns: ColumnValues, position: NDArray[np.int64], size: int) -> None:
        """Add a run's columns.

        Args:
            position: `[n]`, of its samples among all.
            size: How many samples all runs have so far.
        """
        for key, value in columns.value.items():
            total, runs = self._sums.get(key, (np.zeros(0), np.zeros(0, dtype=np.int64)))
            total, runs = np.pad(total, (0, size - len(total))), np.pad(runs, (0, size - len(runs)))
            total[position] += value
            runs[position] += columns.scored[key]
            self._sums[key] = total, runs

    def __bool__(self) -> bool:
        return bool(self._sums)

    def tables(self, samples: SampleTotals) -> Iterator[pa.Table]:
        """The rows of `column_values`, one column's at a time."""
        domains = samples.domains()
        for (part, val), (total, runs) in self._sums.items():
            scored = np.flatnonzero(runs)
            columns = {
                "sample_id": samples.ids.take(pa.array(scored)),
                "domain": domains.take(pa.array(scored)),
                "part": _repeated(part, len(scored)),
                "val": _repeated(val, len(scored)),
                "value": total[scored] / runs[scored],
            }
            yield pa.table(columns, schema=COLUMN_VALUES)


def _by_domain(domains: pa.DictionaryArray, value: NDArray[np.float64]) -> pa.Table:
    """`domain, place, samples, total` of the domains with a sample, in alphabetical order; `place` is the
    domain's in the dictionary.
    """
    code, size = domains.indices.to_numpy(), len(domains.dictionary)
    samples, total = np.bincount(code, minlength=size), np.bincount(code, value, size)
    place = np.flatnonzero(samples)
    table = pa.table(
        {
            "domain": domains.dictionary.take(pa.array(place)),
            "place": place,
            "samples": samples[place],
            "total": total[place],
        }
    )
    return table.sort_by("domain")


def _repeated(text: str, number: int) -> pa.Array:
    return pa.repeat(pa.scalar(text, pa.string()), number)


def _name(config: Mapping[str, Any], group: str) -> str | None:
    return config[group].get("name") if group in config else None


def _number_format(dtype: Mapping[str, Any] | None) -> str | None:
    """The parameters' format, and that of autocast."""
    if dtype is None:
        return None
    return f"{dtype['model']}, autocast {dtype['autocast']}" if dtype.get("autocast") else str(dtype["model"])
