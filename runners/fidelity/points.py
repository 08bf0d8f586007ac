"""One point in a directory and an MLflow run of its own, in whatever process."""

import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig

from analysis.fidelity.tags import COURSE, POINT, SETTINGS
from conf.errors import ConfigError
from ghost.atomic import write_atomically, written_beside
from runners.environment import device_description, versions
from runners.errors import DataError
from runners.fidelity.config import experiment_of
from runners.fidelity.experiment import Measured, Point
from runners.fidelity.settings import ExperimentConfig, deciding, fingerprint
from runners.resume.names import FINISHED_FILE
from runners.retrain_runs import end_killed, logged_to
from runners.tracking import build_tracker
from runners.tracking_record import RECORD_FILE, Record
from runners.train import prepare_machine

log = logging.getLogger(__name__)

MEASURED_FILE = "measured.json"
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Job:
    """A point to be measured, with all that another process must know.

    Attributes:
        hardware, tracking: The command's nodes.
        folder: The point's own directory.
        cwd: Where the command was typed.
        parent_run_id: The MLflow run of the whole experiment; None: nothing is tracked.
        tags: Of the point's MLflow run.
    """

    point: Point
    settings: ExperimentConfig
    hardware: DictConfig
    tracking: DictConfig
    folder: Path
    cwd: Path
    parent_run_id: str | None
    tags: Mapping[str, str]


def finished(job: Job) -> dict[str, float] | None:
    """The metrics of a point that an earlier call of the command finished; None where none has.

    Raises:
        ConfigError: The directory's record is damaged, or of other settings.
    """
    path = job.folder / FINISHED_FILE
    if not path.exists():
        return None
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        metrics: dict[str, float] = json.loads((job.folder / MEASURED_FILE).read_text(encoding="utf-8"))[
            "metrics"
        ]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{job.folder} is damaged ({error}): delete it, and the point is done again"
        ) from error
    if noted.get(SETTINGS) != fingerprint(job.settings):
        raise ConfigError(f"{job.folder} holds a point of other settings: choose another hydra.run.dir")
    return metrics


def is_untracked(job: Job) -> bool:
    """Whether an earlier call finished the point without a tracker."""
    return (job.folder / FINISHED_FILE).exists() and Record.read(job.folder).run_id is None


def measure(job: Job) -> dict[str, float]:
    """Measure the point and record it; returns its metrics. What is left of an unfinished attempt goes.

    Raises:
        ConfigError, DataError, GhostError: as the experiment; or a number that it gives is not finite.
    """
    _clear(job)
    job.folder.mkdir(parents=True)
    tracking = job.tracking.copy()
    tracking.run_name = job.point.name
    with (
        logged_to(job.folder / "run.log"),
        build_tracker(tracking, job.folder, job.cwd, parent_run_id=job.parent_run_id) as tracker,
    ):
        device = prepare_machine(DictConfig({"seed": job.point.seed, "hardware": job.hardware}))
        tags = {f"version.{name}": version for name, version in versions().items()}
        tags |= {POINT: job.point.name, "device": device_description(device), **job.tags}
        params = {f"fidelity.{name}": value for name, value in deciding(job.settings).items()}
        params |= {f"point.{name}": value for name, value in job.point.items()}
        tracker.start({**params, "output_dir": str(job.folder)}, tags)
        torch.backends.cudnn.allow_tf32 = False  # convolutions in float32, as all else is
        measured = experiment_of(job.settings, device).measure(job.point, job.folder)
        _refuse_non_finite(measured, job.point)
        _write(measured, job.folder)
        tracker.add_tags(measured.facts)
        tracker.log_metrics(0, measured.metrics)
        for step, numbers in measured.course.items():
            tracker.log_metrics(step, {f"{COURSE}{name}": number for name, number in numbers.items()})
        tracker.log_artifacts(job.folder)
    note = json.dumps({SETTINGS: fingerprint(job.settings), POINT: job.point.name})
    write_atomically(job.folder / FINISHED_FILE, lambda file: file.write(note.encode()))
    return dict(measured.metrics)


def measure_apart(job: Job) -> dict[str, float]:
    """`measure` in a process of a pool: one that is told to end does so, and takes no other point."""
    try:
        return measure(job)
    except SystemExit:
        os._exit(TERMINATED)


def _clear(job: Job) -> None:
    if not job.folder.exists():
        return
    log.warning("%s was not finished: the point is done again", job.folder)
    if job.parent_run_id is not None and (job.folder / RECORD_FILE).exists():
        end_killed(job.folder, job.tracking, job.cwd)
    shutil.rmtree(job.folder)


def _refuse_non_finite(measured: Measured, point: Point) -> None:
    for name, number in measured.metrics.items():
        if not math.isfinite(number):
            raise DataError(
                f"{name} of {point.name} is {number}: the run diverged, or what is compared does not differ; "
                "give it a lower learning rate, or more samples"
            )


def _write(measured: Measured, folder: Path) -> None:
    """Metrics and facts as JSON, in which no number is NaN, and the tables."""
    record = {"metrics": dict(measured.metrics), "facts": dict(measured.facts)}
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / MEASURED_FILE, lambda file: file.write(text.encode()))
    for name, columns in measured.tables.items():
        with written_beside(folder / f"{name}.parquet") as partial:
            pq.write_table(
                pa.table({key: pa.array(list(values)) for key, values in columns.items()}), partial
            )


def prepare_process(level: int, numbers: "SimpleQueue[int]") -> None:
    """Make a new process log as the command's own does, and end with it, however that ends; of several GPUs
    the processes take turns.

    Args:
        numbers: One for each process, from 0.
    """
    logging.getLogger().setLevel(level)
    number = numbers.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # the point's record is closed as of any run that is terminated
