"""A sweep while it runs: its parent run, the jobs that are left to do, what became of them, and its end."""

import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from conf.command import FAILED, JobFailed
from conf.errors import ConfigError, UserError
from runners.environment import PROJECT, git_state
from runners.mlflow_page import sweep_name
from runners.mlflow_store import Store, open_store
from runners.summary import print_ways_on
from runners.sweep.earlier import EarlierRun, earlier_run
from runners.sweep.jobs import Job, freeze, run_config
from runners.sweep.outcome import (
    JOBS_FILE,
    Outcome,
    counted,
    numbers,
    outcome_of,
    print_outcomes,
    skipped,
    write_outcomes,
)
from runners.sweep.record import JobRecord, Status, SweepRecord, read_sweep, write_job, write_sweep
from runners.tracking import NullTracker, Tracker, build_tracker

log = logging.getLogger(__name__)

SUMMARY_FOLDER = "summary"

RunJobs = Callable[[Sequence[Job]], Mapping[int, str]]
"""Runs jobs to their end, and returns what a scheduler says of those that it ended, by number."""


class SweepEnded(UserError):
    """What the parent run's tag `error` says of a sweep whose jobs did not all finish."""


class Sweep(AbstractContextManager["Sweep"]):
    """From the first job's submission to the closing table.

    A sampler of hyperparameters launches several times; every launch adds jobs to the same sweep.
    """

    def __init__(self, master: DictConfig) -> None:
        """Prepare; nothing is written before `launch`.

        Args:
            master: The sweep's own config, with Hydra's node.
        """
        self.directory = Path(master.hydra.sweep.dir).absolute()
        self.outcomes: list[Outcome] = []
        self._master = master
        self._cwd = Path(master.hydra.runtime.cwd)
        self._tracker: NullTracker | None = None
        self._store: Store | None = None
        self._running: Sequence[Job] = ()

    def launch(self, jobs: Sequence[Job], run_jobs: RunJobs) -> list[JobReturn]:
        """Run those jobs that have not been done before, in whatever way, and return all in their order.

        Raises:
            ConfigError: The jobs are to be tracked in several places, or their store cannot be used.
        """
        if self._tracker is None:
            self._begin(jobs)
        self._running = self._left_to_do(jobs)
        for job in self._running:
            freeze(job)
            write_job(job.directory, JobRecord(job.fingerprint))
        self._ended(run_jobs(self._running) if self._running else {})
        by_number = {outcome.number: outcome for outcome in self.outcomes}
        return [job_return(job, by_number[job.number]) for job in jobs]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is None:  # it ended before it began
            return
        self._ended({})  # what an interrupt has left
        if self._store is not None:
            _end_children(self._store, self._tracker.run_id)
        if any(one.status != Status.unstarted for one in self.outcomes):
            print_outcomes(self.outcomes, Console())
        write_outcomes(self.outcomes, self.directory / SUMMARY_FOLDER)
        codes = [one.exit_code or FAILED for one in self.outcomes if _unfinished(one)]
        told = error
        if codes and (error is None or isinstance(error, JobFailed)):
            number = len(self.outcomes)
            told = SweepEnded(f"{len(codes)} of {number} jobs did not finish: {counted(self.outcomes)}")
        self._tracker.log_metrics(0, {f"sweep/{status}": number for status, number in numbers(self.outcomes)})
        self._tracker.log_artifacts(self.directory / SUMMARY_FOLDER)
        self._tracker.__exit__(None if told is None else type(told), told, trace)
        table = self.directory / SUMMARY_FOLDER / JOBS_FILE
        ways = {"Sweep": str(self.directory), "Logs": str(self.directory / "JOB" / "run.log")}
        ways["Table"] = str(table)
        print_ways_on(Console(), ways, self._tracker.ui_command(), self._tracker.run_url())
        if codes and error is None:  # a sampler may go on after failures; the exit code tells of them
            raise JobFailed(codes[0])

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Create the store and the parent run in this process: a new SQLite store that several jobs open at
        once ends broken.
        """
        tracking, keys = tracking_of(jobs), swept_keys(self._master)
        tracking.run_name = sweep_name(list(keys), self.directory)  # the config's is the jobs'
        earlier = read_sweep(self.directory)
        tracker = build_tracker(
            tracking, self.directory, self._cwd, run_id=None if earlier is None else earlier.parent_run_id
        )
        git = git_state(PROJECT)
        command = shlex.join(["python", *sys.argv])
        tags = {
            "sweep.command": command,
            "sweep.directory": str(self.directory),
            "sweep.launcher": str(self._master.hydra.launcher._target_).rpartition(".")[2],
            "git.commit": git.commit or "unknown",
            "git.dirty": str(git.dirty).lower(),
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        tracker.start(keys, tags)
        if isinstance(tracker, Tracker):
            self._store = open_store(tracker.uri, tracking.experiment)
        write_sweep(self.directory, SweepRecord(command, git.commit, tracker.run_id))
        self._tracker = tracker.__enter__()

    def _left_to_do(self, jobs: Sequence[Job]) -> list[Job]:
        left = []
        for job in jobs:
            done = earlier_run(job, self._store) if _may_be_skipped(job.cfg) else None
            if done is None:
                left.append(job)
            else:
                self._skip(job, done)
        return left

    def _skip(self, job: Job, done: EarlierRun) -> None:
        where = f"MLflow run {done.run_id}" if done.run_id else str(done.directory)
        log.info("%s is skipped: %s computed the same (sweep.skip_finished=false runs it).", job.name, where)
        commit = git_state(PROJECT).commit
        if done.commit != (commit or "unknown"):
            log.warning("%s: that was at commit %s, the code is now at %s.", job.name, done.commit, commit)
        self.outcomes.append(skipped(job, done))

    def _ended(self, stopped: Mapping[int, str]) -> None:
        """Take the outcomes of the jobs that ran."""
        self.outcomes += [outcome_of(job, stopped.get(job.number)) for job in self._running]
        self.outcomes.sort(key=lambda one: one.number)
        self._running = ()


def swept_keys(master: DictConfig) -> dict[str, str]:
    """The keys that differ between jobs, and what they range over, as typed."""
    typed = list(OmegaConf.to_container(master.hydra.overrides.task))  # type: ignore[arg-type]
    parsed = OverridesParser.create().parse_overrides([str(one) for one in typed])
    swept = {
        one.get_key_element(): (one.input_line or "").partition("=")[2]
        for one in parsed
        if one.is_sweep_override()
    }
    params = OmegaConf.select(master, "hydra.sweeper.params") or {}
    return swept | {str(key): str(value) for key, value in params.items()}


def tracking_of(jobs: Sequence[Job]) -> DictConfig:
    """The `tracking` node that holds for the whole sweep.

    Raises:
        ConfigError: Jobs are recorded in different places.
    """
    for key in ("enabled", "uri", "experiment"):
        values = {job.cfg.tracking[key] for job in jobs}
        if len(values) > 1:
            raise ConfigError(
                f"tracking.{key}={','.join(sorted(map(str, values)))} would record the jobs in different "
                "places: type one value, for a sweep is one run with its jobs below it"
            )
    cfg = run_config(jobs[0].cfg).tracking
    # A check of scores records nothing.
    cfg.enabled = bool(cfg.enabled and not any(job.cfg.verify for job in jobs))
    return cfg


def _may_be_skipped(cfg: DictConfig) -> bool:
    return bool(cfg.sweep.skip_finished and not cfg.verify)


def _unfinished(outcome: Outcome) -> bool:
    return outcome.status not in (Status.finished, Status.skipped)


def job_return(job: Job, outcome: Outcome) -> JobReturn:
    """What Hydra's samplers take a job's result from."""
    returned = JobReturn(overrides=filter_overrides(job.overrides), cfg=run_config(job.cfg), task_name="run")
    if _unfinished(outcome):
        returned.status, returned.return_value = JobStatus.FAILED, JobFailed(outcome.exit_code or FAILED)
    else:
        returned.status, returned.return_value = JobStatus.COMPLETED, outcome.loss
    return returned


def _end_children(store: Store, parent_run_id: str | None) -> None:
    """Close as KILLED what jobs that were killed outright have left open."""
    condition = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and attributes.status = 'RUNNING'"
    for run in store.client.search_runs([store.experiment_id], filter_string=condition, max_results=1000):
        log.warning("A job that was killed has left MLflow run %s open: it ends as KILLED.", run.info.run_id)
        store.client.set_terminated(run.info.run_id, "KILLED")
