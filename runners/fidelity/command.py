"""Runs an experiment about values, point by point.

python -m runners.fidelity fidelity=one_step jobs=2
"""

import dataclasses
import logging
import multiprocessing
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from analysis.fidelity.plan import planned_seeds
from analysis.fidelity.summary import Measurement, console_tables, summarise
from analysis.fidelity.tags import COMMITTED, COORDINATES, EXPERIMENT, PLANNED, SETTINGS
from conf.command import Reported, run_command
from conf.errors import UserError
from ghost.errors import GhostError
from runners.environment import PROJECT, git_state
from runners.fidelity.config import check_fidelity, experiment_of, settings_of
from runners.fidelity.experiment import Point
from runners.fidelity.points import Job, finished, is_untracked, measure, measure_apart, prepare_process
from runners.fidelity.settings import ADDING, ExperimentConfig, deciding, fingerprint
from runners.progress import LiveLine, duration
from runners.resume.lock import entered
from runners.retrain_runs import begin
from runners.summary import print_ways_on, print_whole
from runners.tracking import NullTracker, build_tracker, flatten
from runners.world import ALONE

log = logging.getLogger(__name__)

RECORD, _TRACKED_AS = "fidelity.yaml", "mlflow-run-id"
Results = dict[str, Mapping[str, float]]
"""Metrics by the point's name."""


class ProcessLostError(UserError):
    """A process that measured a point was killed."""

    exit_code = 1


class PointsLine(LiveLine):
    """The progress of an experiment, counted in points."""

    def update(self, done: int, name: str) -> None:
        """Show that so many are done, the latest of this name."""
        rate = self._measure_rate(done)
        left = f"ETA {duration((self.total - done) / rate)}" if rate else "ETA -:--"
        self._show(done, left, name)


def run(cfg: DictConfig) -> Results:
    """Measure the points that no earlier call has finished; the metrics of all.

    Raises:
        ConfigError, DataError, GhostError: An experiment cannot work as configured.
        ProcessLostError: One of several processes was killed.
    """
    out, cwd = Path(cfg.output_dir), Path(HydraConfig.get().runtime.cwd)
    points, settings = check_fidelity(cfg), settings_of(cfg)
    begin(OmegaConf.create({"fidelity": deciding(settings)}), out, RECORD)
    log.info("If this is killed, it goes on with: %s", shlex.join([*_typed(), f"hydra.run.dir={out}"]))
    with build_tracker(cfg.tracking, out, cwd, run_id=_earlier_run_id(out)) as tracker:
        tags = _tags(settings, points)
        _start(cfg, out, tracker, tags)
        jobs = [
            Job(point, settings, cfg.hardware, cfg.tracking, out / point.name, cwd, tracker.run_id, tags)
            for point in points
        ]
        _warn_of_untracked(jobs)
        results = _measured(jobs, cfg.jobs)
        tracker.finish()
        _show(settings, points, results, tracker)
    return results


def _warn_of_untracked(jobs: Sequence[Job]) -> None:
    """Say which finished points MLflow does not have: those of a call without it."""
    missing = [job.point.name for job in jobs if job.parent_run_id is not None and is_untracked(job)]
    if missing:
        log.warning(
            "%d finished points were measured with tracking=none (%s first), and MLflow does not have them: "
            "python -m runners.upload run=%s tracking.experiment=%s brings them there",
            len(missing), missing[0], jobs[0].folder.parent, jobs[0].tracking.experiment,
        )  # fmt: skip


def _show(
    settings: ExperimentConfig, points: Sequence[Point], results: Results, tracker: NullTracker
) -> None:
    """The closing table on the console: means over seeds."""
    measurements = [
        Measurement({name: str(value) for name, value in point.items()}, results[point.name])
        for point in points
    ]
    for table in console_tables(str(settings.name), summarise(measurements)):
        print_whole(table)
    ways = {
        "Directory": str(tracker.output_dir),
        "Run it again": shlex.join([*_typed(), *_typed_folder()]),
        "Tables, figures": "python -m analysis.fidelity",
    }
    print_ways_on(Console(), ways, tracker.ui_command(), tracker.run_url())


def _tags(settings: ExperimentConfig, points: Sequence[Point]) -> dict[str, str]:
    """What the runs of the experiment and of its points are found by."""
    git = git_state(PROJECT)
    return {
        "git.commit": git.commit or "unknown",
        "git.dirty": str(git.dirty).lower(),
        EXPERIMENT: str(settings.name),
        SETTINGS: fingerprint(settings),
        PLANNED: str(planned_points(settings)),
        COORDINATES: ",".join(points[0]),
        COMMITTED: str(at_committed_sizes(HydraConfig.get().overrides.task)).lower(),
    }


def planned_points(settings: ExperimentConfig) -> int:
    """How many points the experiment has with the seeds of its YAML file, whatever seeds were typed."""
    planned = dataclasses.replace(settings, seeds=planned_seeds(str(settings.name)))
    return len(experiment_of(planned, torch.device("cpu")).points())


def at_committed_sizes(overrides: Sequence[str]) -> bool:
    """Whether a command line changes nothing of an experiment's settings but what adds points."""
    own = ("fidelity.", "+fidelity.", "++fidelity.", "~fidelity.")
    return not any(
        (text.startswith(own) and not text.startswith(tuple(f"fidelity.{name}=" for name in ADDING)))
        or "@fidelity." in text.partition("=")[0]
        for text in overrides
    )


def _measured(jobs: Sequence[Job], processes: int) -> Results:
    """All results, in the order of the points."""
    known = {job.point.name: finished(job) for job in jobs}
    results: Results = {name: metrics for name, metrics in known.items() if metrics is not None}
    left = [job for job in jobs if job.point.name not in results]
    log.info("%d of %d points are there.", len(results), len(jobs))
    with PointsLine(len(jobs), "point", sys.stderr) as line:
        for name, metrics in _in_turn(left) if processes == 1 else _side_by_side(left, processes):
            results[name] = metrics
            line.update(len(results), name)
    return {name: results[name] for name in known}


def _in_turn(jobs: Sequence[Job]) -> Iterator[tuple[str, dict[str, float]]]:
    for job in jobs:
        yield job.point.name, measure(job)


def _side_by_side(jobs: Sequence[Job], processes: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Each point as it ends, in processes that start anew: PyTorch's threads do not survive a fork."""
    level, context = logging.getLogger().level, multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(processes):
        numbers.put(number)
    pool = ProcessPoolExecutor(processes, context, prepare_process, (level, numbers))
    names = {pool.submit(measure_apart, job): job.point.name for job in jobs}
    try:
        for future in as_completed(names):
            yield names[future], future.result()
    except BrokenProcessPool as error:
        raise ProcessLostError(
            f"jobs={processes}: one of the processes was killed, perhaps for want of memory: type the same "
            "command to go on, with fewer jobs"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if not all(future.done() for future in names):  # this process was told to end, or a point failed
            for child in multiprocessing.active_children():
                child.terminate()


def _typed() -> list[str]:
    """The command, without Hydra's own settings."""
    return ["python", "-m", "runners.fidelity", *HydraConfig.get().overrides.task]


def _typed_folder() -> list[str]:
    """The directory as it was typed: the same command goes on only there."""
    return [text for text in HydraConfig.get().overrides.hydra if text.startswith("hydra.run.dir=")]


def _start(cfg: DictConfig, out: Path, tracker: NullTracker, tags: Mapping[str, str]) -> None:
    """The MLflow run that the points are shown under; a command that is typed again takes it up."""
    resolved = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    tracker.start(flatten(resolved), tags)  # type: ignore[arg-type]
    if tracker.run_id is not None:
        (out / _TRACKED_AS).write_text(tracker.run_id, encoding="utf-8")


def _earlier_run_id(out: Path) -> str | None:
    path = out / _TRACKED_AS
    return path.read_text(encoding="utf-8") if path.exists() else None


def task(cfg: DictConfig) -> None:
    """Hydra's task function. Raises as `runners.cli.task` does."""
    with Reported(UserError, GhostError), entered(cfg, Path(cfg.output_dir), "output_dir", ALONE):
        run(cfg)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("fidelity", task, groups=("fidelity", "hardware", "tracking"))
