"""What became of each job: the closing table of a sweep, and the same as a file."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runners.progress import duration
from runners.report import read_environment
from runners.summary import print_line
from runners.sweep.earlier import EarlierRun
from runners.sweep.jobs import Job
from runners.sweep.record import JobRecord, Status, read_job
from runners.values import VALUES_FILE

JOBS_FILE = "jobs.csv"
_COLORS = {Status.finished: "green", Status.skipped: "cyan", Status.failed: "red", Status.killed: "red"}


@dataclass(frozen=True)
class Extreme:
    """The sample whose value is the lowest or the highest of a run."""

    sample_id: str
    value: float


@dataclass(frozen=True)
class Outcome:
    """One job's line of the table: `own` are the overrides that tell it from other jobs.

    `directory` holds the run's files: the earlier run's, where the job was skipped.
    """

    number: int
    overrides: tuple[str, ...]
    own: tuple[str, ...]
    status: Status
    loss: float | None
    lowest: Extreme | None
    highest: Extreme | None
    seconds: float | None
    run_id: str | None
    directory: Path | None
    error: str | None
    exit_code: int


def outcome_of(job: Job, stopped: str | None) -> Outcome:
    """What the job's directory says of it now that none of its processes is left.

    Args:
        stopped: What its scheduler says of its end; None where it has not been asked.
    """
    record = read_job(job.directory) or JobRecord(job.fingerprint)
    status, error = record.status, record.error
    if status == Status.started or (status == Status.queued and stopped is not None):
        status, error = Status.killed, stopped or "its process ended without a word"
    elif status == Status.queued:
        status = Status.unstarted
    lowest, highest = extremes(job.directory) if status == Status.finished else (None, None)
    return Outcome(
        number=job.number,
        overrides=job.overrides,
        own=job.own,
        status=status,
        loss=record.loss,
        lowest=lowest,
        highest=highest,
        seconds=record.seconds,
        run_id=read_environment(job.directory).get("mlflow.run_id"),
        directory=job.directory,
        error=error,
        exit_code=record.exit_code,
    )


def skipped(job: Job, earlier: EarlierRun) -> Outcome:
    """The job that was done before."""
    lowest, highest = (None, None) if earlier.directory is None else extremes(earlier.directory)
    return Outcome(
        job.number, job.overrides, job.own, Status.skipped, earlier.loss, lowest, highest,
        seconds=None, run_id=earlier.run_id, directory=earlier.directory, error=None, exit_code=0,
    )  # fmt: skip


def extremes(directory: Path) -> tuple[Extreme | None, Extreme | None]:
    """The samples of the lowest and of the highest finite value; None where the run has no values."""
    path = directory / VALUES_FILE
    if not path.exists():
        return None, None
    rows = pq.read_table(path, columns=["sample_id", "value"]).to_pylist()
    finite = [Extreme(row["sample_id"], row["value"]) for row in rows if math.isfinite(row["value"])]
    if not finite:
        return None, None
    return min(finite, key=lambda one: one.value), max(finite, key=lambda one: one.value)


def write_outcomes(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write the table as `jobs.csv`, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JOBS_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((
            "job", "overrides", "status", "val_loss", "lowest_value", "lowest_sample", "highest_value",
            "highest_sample", "seconds", "mlflow_run_id", "directory", "error",
        ))  # fmt: skip
        for one in outcomes:
            low, high = one.lowest, one.highest
            writer.writerow((
                one.number, " ".join(one.overrides), one.status, one.loss, low and low.value,
                low and low.sample_id, high and high.value, high and high.sample_id, one.seconds, one.run_id,
                one.directory, one.error,
            ))  # fmt: skip


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print a line for each job, and below it why jobs failed."""
    table = Table(title=f"{len(outcomes)} jobs: {counted(outcomes)}", title_justify="left")
    for heading in ("job", "overrides", "status", "val loss", "values", "time", "MLflow"):
        table.add_column(heading, overflow="fold")
    for one in outcomes:
        table.add_row(
            str(one.number),
            Text("\n".join(one.own)),
            Text(one.status, style=_COLORS.get(one.status, "")),
            "" if one.loss is None else f"{one.loss:.4f}",
            " … ".join(f"{end.value:+.1e}" for end in (one.lowest, one.highest) if end),
            "" if one.seconds is None else duration(one.seconds),
            (one.run_id or "")[:8],
        )
    console.print(table)
    for one in outcomes:
        if one.error is not None:
            print_line(console, f"job {one.number} {one.status}: {one.error}: see {one.directory}/run.log")


def numbers(outcomes: Sequence[Outcome]) -> list[tuple[Status, int]]:
    """How many jobs there are of each status that occurs."""
    found = [(status, sum(one.status == status for one in outcomes)) for status in Status]
    return [(status, number) for status, number in found if number]


def counted(outcomes: Sequence[Outcome]) -> str:
    """`3 finished, 1 failed`."""
    return ", ".join(f"{number} {status}" for status, number in numbers(outcomes))
