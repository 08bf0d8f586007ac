"""One job of a sweep in the process that runs it: from its frozen config to its record."""

import logging
import time
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig

from conf.command import FAILED, JobFailed
from conf.errors import first_line
from runners.cli import task
from runners.environment import PROJECT, git_state
from runners.sweep.jobs import frozen_config
from runners.sweep.record import JobRecord, Status, read_job, read_sweep, write_job

log = logging.getLogger(__name__)


def run_frozen(directory: Path, context: HydraContext, *, recorded: bool = True) -> JobRecord:
    """Run the job whose frozen config lies in the directory; what ends it by force leaves it `started`.

    Args:
        recorded: Whether this process keeps the job's record: the first of several that run one job.
    """
    setup_globals()
    cfg = frozen_config(directory)
    JobRuntime.instance().set("name", cfg.hydra.job.name)
    queued = read_job(directory)
    assert queued is not None, f"{directory} was not submitted"
    started = replace(queued, status=Status.started, error=None)
    if recorded:
        write_job(directory, started)
    began = time.monotonic()
    returned = run_job(
        task_function=_job,
        config=cfg,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=context,
    )
    ended = replace(_ended(started, returned), seconds=time.monotonic() - began)
    if recorded or ended.status == Status.failed:
        write_job(directory, ended)
    return ended


def _job(cfg: DictConfig) -> float | None:
    _warn_of_other_commit()
    return task(cfg)


def _warn_of_other_commit() -> None:
    """The config is as it was submitted; the code is as it is now."""
    sweep = read_sweep(Path(HydraConfig.get().sweep.dir))
    commit = git_state(PROJECT).commit
    if sweep is not None and sweep.commit != commit:
        log.warning(
            "The sweep was submitted at commit %s; this job runs the code of commit %s.", sweep.commit, commit
        )


def _ended(started: JobRecord, returned: JobReturn) -> JobRecord:
    if returned.status == JobStatus.COMPLETED:
        return replace(started, status=Status.finished, loss=returned.return_value)
    error = returned._return_value  # `return_value` would raise it
    code = error.exit_code if isinstance(error, JobFailed) else FAILED
    return replace(started, status=Status.failed, error=first_line(error.__cause__ or error), exit_code=code)
