"""Ways to run the jobs of a sweep on this machine."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log
from hydra.types import HydraContext
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import BrokenProcessPool
from omegaconf import DictConfig
from rich.console import Console

from runners.summary import print_line
from runners.sweep import scope
from runners.sweep.jobs import Job, freeze
from runners.sweep.outcome import outcome_of
from runners.sweep.record import JobRecord, Status, read_job, write_job
from runners.sweep.sweep import Sweep, job_return
from runners.sweep.work import run_frozen

log = logging.getLogger(__name__)


def begin_sweep(master: DictConfig) -> Sweep:
    """A sweep that lasts until the command line ends."""
    sweep = Sweep(master)
    scope.begin(sweep)
    return sweep


def one_after_another(jobs: Sequence[Job], context: HydraContext) -> Mapping[int, str]:
    """Run jobs in this process."""
    for job in jobs:
        log.info("%s starts.", job.name)
        run_frozen(job.directory, context)
        configure_log(job.cfg.hydra.hydra_logging, job.cfg.hydra.verbose)
    return {}


def in_parallel(jobs: Sequence[Job], context: HydraContext, settings: Mapping[str, Any]) -> Mapping[int, str]:
    """Run jobs in joblib's processes, `settings["n_jobs"]` at a time.

    Args:
        settings: Those of `joblib.Parallel`; numbers may be texts.
    """
    left = list(jobs)
    plain = {key: int(value) if str(value).isdecimal() else value for key, value in settings.items()}
    while left:
        try:
            Parallel(**{**plain, "backend": "loky"})(
                delayed(_in_worker)(job.directory, context) for job in left
            )
            break
        except BrokenProcessPool as error:
            log.error("A process was killed, and with it the jobs that ran beside it: %s", error)
        waiting = [job for job in left if _is_queued(job)]
        if len(waiting) == len(left):  # processes die before a job starts: so would the next ones
            break
        left = waiting
    return {}


def rehearse(jobs: Sequence[Job], context: HydraContext, submission: str | None) -> list[JobReturn]:
    """`dry_run=true`: each job's report from this process, and below it what would be submitted."""
    returned = []
    for job in jobs:
        freeze(job)
        write_job(job.directory, JobRecord(job.fingerprint))
        run_frozen(job.directory, context)
        returned.append(job_return(job, outcome_of(job, None)))
    if submission is not None:
        print_line(Console(), submission)
    return returned


def _in_worker(directory: Path, context: HydraContext) -> None:
    with suppress(SystemExit):  # a job ended by a signal ends neither its process nor the sweep
        run_frozen(directory, context)


def _is_queued(job: Job) -> bool:
    record = read_job(job.directory)
    return record is not None and record.status == Status.queued
