"""Aggregates the values of finished runs: over steps, over runs, by sample and by domain.

python -m analysis.aggregate runs=[outputs/DAY/TIME,multirun/DAY/TIME] out=aggregate
"""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import logging
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console

from analysis.aggregate.correlations import correlate
from analysis.aggregate.run_sums import sum_run
from analysis.aggregate.run_tables import ColumnTotals, column_rows, domain_rows, run_row, trajectory_rows
from analysis.aggregate.sample_totals import SampleTotals
from analysis.aggregate.summary import print_aggregate
from analysis.aggregate.tables import check_folder, write_aggregate
from analysis.errors import AnalysisError
from analysis.runs import Run, score_note
from analysis.sources import open_runs
from analysis.stream import CHUNK_ROWS, Steps
from conf.command import Reported, run_command
from conf.errors import ConfigError, UserError
from conf.refuse import refuse
from conf.schema import TrackingStore, key, schema_node, several
from ghost.errors import GhostError

log = logging.getLogger(__name__)

Tables = dict[str, Iterable[pa.Table]]


@dataclass
class AggregateConfig:
    """The whole tree of this command."""

    runs: Any = key(
        "NAME or [NAME,NAME]: run directories, folders of them, MLflow run ids, or MLflow experiments"
    )
    tracking: TrackingStore = MISSING
    out: str | None = key("folder for the tables; an earlier aggregate in it is replaced; null: print only")
    steps: list[int] | None = key("[first,last]: only what these steps credit; null: all steps")
    trajectory_points: int = key("steps of a trajectory at most; those of longer runs are put together")


ConfigStore.instance().store(
    name="schema_aggregate", node=schema_node(AggregateConfig), provider="ghostrunner"
)


def aggregate_runs(
    runs: Sequence[Run], steps: Steps | None, points: int, most_rows: int = CHUNK_ROWS
) -> Tables:
    """The tables of `analysis.aggregate.tables.SCHEMAS` by name, each in parts; `column_values` is made while
    it is read.

    Args:
        runs: At least one, each with values.
        steps: Only score rows of the steps from the first to the second; None: all.
        points: Steps of a trajectory at most.
        most_rows: Score rows that are in memory at a time, about.

    Raises:
        AnalysisError: A file is missing or damaged, or runs do not fit each other.
    """
    samples, columns = SampleTotals(), ColumnTotals()
    by_run: dict[str, list[pa.Table]] = {"runs": [], "domains": [], "trajectories": [], "columns": []}
    for number, run in enumerate(runs, start=1):
        log.info("Reading the values of %s (%d of %d)", run.name, number, len(runs))
        sums = sum_run(run, steps, points, most_rows)
        position = samples.add(sums)
        domains = domain_rows(sums)
        by_run["runs"].append(run_row(sums))
        by_run["domains"].append(domains)
        by_run["trajectories"].append(trajectory_rows(sums, domains))
        if sums.columns is not None:
            columns.add(sums.columns, position, len(samples))
            by_run["columns"].append(column_rows(sums))
    if not len(samples):
        where = "" if steps is None else f" in steps=[{steps[0]},{steps[1]}]"
        raise AnalysisError(f"no run has a finite score row{where}: nothing is to be aggregated")
    tables: Tables = {name: parts for name, parts in by_run.items() if parts}
    tables["values"] = [samples.table()]
    tables["correlations"] = [correlate(samples.runs, [run.config for run in runs], len(samples))]
    if columns:
        tables["column_values"] = columns.tables(samples)
    return tables


def with_values(runs: Sequence[Run]) -> list[Run]:
    """The runs that left values; the others are named in the log.

    Raises:
        AnalysisError: None has.
    """
    valued = [run for run in runs if (run.directory / "values.parquet").is_file()]
    for run in runs:
        if run not in valued:
            engine = run.config.get("engine", {}).get("name")
            log.warning(
                "%s (engine=%s) is left out: it has no values.parquet, since its engine gives none or the "
                "run has not ended.",
                run.name,
                engine,
            )
    if not valued:
        raise AnalysisError(f"none of the {len(runs)} runs has values: give runs with engine=graddotprod")
    return valued


def check_aggregate(cfg: DictConfig) -> None:
    """Raises `ConfigError` or `AnalysisError` for keys that cannot work, before anything is read."""
    if OmegaConf.is_missing(cfg, "runs") or not several(cfg.runs):
        raise ConfigError("runs has no value: type runs=DIR or runs=[DIR,DIR], see --help")
    if cfg.steps is not None and (len(cfg.steps) != 2 or not 0 <= cfg.steps[0] <= cfg.steps[1]):
        refuse(cfg, "steps", "is no range: type steps=[FIRST,LAST]")
    if cfg.trajectory_points < 1:
        refuse(cfg, "trajectory_points", "is too small: type trajectory_points=1 or more")
    if cfg.out is not None:
        check_folder(Path(cfg.out))


def aggregate(cfg: DictConfig) -> None:
    """One aggregation: tables written where `out` says, and a summary printed."""
    check_aggregate(cfg)
    steps = None if cfg.steps is None else (cfg.steps[0], cfg.steps[1])
    with open_runs(several(cfg.runs), cfg.tracking.uri, Path.cwd()) as runs:
        valued = with_values(runs)
        tables = aggregate_runs(valued, steps, cfg.trajectory_points)
        if cfg.out is not None:
            write_aggregate(tables, Path(cfg.out))
        notes = dict.fromkeys(score_note(run.config) for run in valued)
    shown = {name: pa.concat_tables(parts) for name, parts in tables.items() if name != "column_values"}
    print_aggregate(shown, list(notes), Console())
    if cfg.out is not None:
        log.info("Wrote %s to %s", ", ".join(f"{name}.parquet" for name in sorted(tables)), cfg.out)
        folder = shlex.quote(cfg.out)
        log.info(
            "As a page: python -m analysis.report aggregate=%s; as a list of what to keep: python -m "
            "analysis.select values=%s method=quantile quantile=0.1 out=keep.parquet", folder, folder,
        )  # fmt: skip


def task(cfg: DictConfig) -> None:
    """Hydra's task function: one aggregation."""
    with Reported(UserError, GhostError):
        aggregate(cfg)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("aggregate", task, groups=())
