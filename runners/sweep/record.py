"""What a sweep's directory says of it: `sweep.json` of the whole, `job.json` of each job."""

import json
import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from ghost.atomic import write_atomically

SWEEP_FILE, JOB_FILE, FROZEN_FILE = "sweep.json", "job.json", "config.frozen.yaml"

Status = StrEnum("Status", ["queued", "started", "finished", "failed", "skipped", "killed", "unstarted"])


@dataclass(frozen=True)
class SweepRecord:
    """What the jobs must know of the sweep that they are of.

    `command` is what was typed, `commit` the code's commit at that time (None outside a repository), and
    `parent_run_id` the MLflow run that theirs are shown under (None without tracking).
    """

    command: str
    commit: str | None
    parent_run_id: str | None


@dataclass(frozen=True)
class JobRecord:
    """How far a job has come: written by the process that submits it, then by the job itself.

    `loss` is the final validation loss, `seconds` the time of the last attempt, `error` one line on why the
    job failed, and `exit_code` what a run that ends like this exits with.
    """

    fingerprint: str
    status: Status = Status.queued
    loss: float | None = None
    seconds: float | None = None
    error: str | None = None
    exit_code: int = 0


def write_sweep(directory: Path, record: SweepRecord) -> None:
    _write(directory / SWEEP_FILE, asdict(record))


def read_sweep(directory: Path) -> SweepRecord | None:
    """The record of the sweep in the directory; None where there is none."""
    path = directory / SWEEP_FILE
    return SweepRecord(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def write_job(directory: Path, record: JobRecord) -> None:
    fields = asdict(record)
    if record.loss is not None and not math.isfinite(record.loss):
        fields["loss"] = str(record.loss)  # JSON knows no NaN and no infinity
    _write(directory / JOB_FILE, fields)


def read_job(directory: Path) -> JobRecord | None:
    """The record of the job in the directory; None where there is none."""
    path = directory / JOB_FILE
    if not path.exists():
        return None
    fields = json.loads(path.read_text(encoding="utf-8"))
    loss = None if fields["loss"] is None else float(fields["loss"])
    return JobRecord(**{**fields, "status": Status(fields["status"]), "loss": loss})


def parent_run_id() -> str | None:
    """The MLflow run that the current job's is shown under; None outside of a sweep that is tracked."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return None
    sweep = read_sweep(Path(hydra.sweep.dir))
    return None if sweep is None else sweep.parent_run_id


def _write(path: Path, fields: dict[str, object]) -> None:
    text = json.dumps(fields, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
