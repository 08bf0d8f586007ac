"""Jobs handed to submitit, and the wait for them: SLURM's own, or processes that submitit starts here.

Whether a job has ended is read from its record. SLURM is asked for the rest: what was cancelled, timed out or
ran out of memory leaves no word of its own. `squeue` knows that without SLURM's accounting.
"""

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.types import HydraContext
from omegaconf import OmegaConf

from conf.errors import ConfigError, first_line
from conf.help_text import typed
from runners.environment import PROJECT
from runners.sweep.jobs import Job
from runners.sweep.record import Status, read_job
from runners.sweep.work import run_frozen

if TYPE_CHECKING:
    from submitit import AutoExecutor
    from submitit import Job as Submission
    from submitit.helpers import DelayedSubmission

log = logging.getLogger(__name__)

SLURM = "slurm"
# The settings that submitit has for every cluster; the others are named for theirs.
_GENERAL = {
    *("name", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min"),
    "stderr_to_stdout",
}
_ON_CREATION = {"max_num_timeout", "submitit_folder"}
# States of SLURM in which a job is not over.
_ALIVE = {
    *("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"),
    *("RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "PREEMPTED"),
}
_LOOK_SECONDS = 0.5  # at the jobs' records
_ASK_SECONDS = 15.0  # SLURM: less often than it forgets ended jobs (MinJobAge, 300 s by default)
_SETTLE_SECONDS = 30.0  # for a cancelled job to close its run


class SubmittedJob:
    """What submitit starts, and again when SLURM requeues the job: its directory says how far it came."""

    def __init__(self, context: HydraContext) -> None:
        self._context = context

    def __call__(self, directory: Path) -> None:
        import submitit

        record = run_frozen(directory, self._context, recorded=submitit.JobEnvironment().global_rank == 0)
        if record.status == Status.failed:
            # An exit code of 0 and a log that ends in "completed successfully" would hide it.
            raise RuntimeError(f"the job failed, see {directory / 'run.log'}: {record.error}")

    def checkpoint(self, directory: Path) -> "DelayedSubmission":
        """What is submitted again when SLURM takes the job's place: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, directory)


def submit(
    jobs: Sequence[Job], context: HydraContext, cluster: str, settings: Mapping[str, Any]
) -> Mapping[int, str]:
    """Submit the jobs as one array and wait for them; an interrupt cancels those that are left.

    Returns:
        What SLURM says of jobs that ended without a word of their own, by number.

    Raises:
        ConfigError: SLURM is not there, or does not take the jobs as they are asked for.
    """
    from submitit.core.utils import FailedJobError

    executor = _executor(jobs, cluster, settings)
    try:
        submissions = executor.map_array(SubmittedJob(context), [job.directory for job in jobs])
    except FailedJobError as error:
        raise ConfigError(f"SLURM does not take the sweep: {_sbatch_words(error)}") from error
    pending = dict(zip(jobs, submissions, strict=True))
    log.info("Submitted %d jobs: %s", len(jobs), ", ".join(one.job_id for one in submissions))
    try:
        return _wait(pending, cluster)
    except (KeyboardInterrupt, SystemExit):
        log.warning("The jobs that are left are cancelled.")
        _cancel(submissions, cluster)
        raise


def script(jobs: Sequence[Job], settings: Mapping[str, Any]) -> str:
    """The batch script that `submit` would hand to SLURM's `sbatch`."""
    executor: Any = _executor(jobs, SLURM, settings)._executor
    if len(jobs) > 1:
        executor.parameters["map_count"] = len(jobs)
    return str(executor._make_submission_file_text(executor._submitit_command_str, uid="ID"))


def _executor(jobs: Sequence[Job], cluster: str, settings: Mapping[str, Any]) -> "AutoExecutor":
    from submitit import AutoExecutor

    if cluster == SLURM and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError(
            "hydra/launcher=submitit_slurm needs SLURM's sbatch and srun, which are not here: type it on a "
            "login node, or take hydra/launcher=joblib"
        )
    plain: dict[str, Any] = {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for key, value in settings.items()
        if value is not None
    }
    tasks = (plain.get("nodes") or 1) * (plain.get("tasks_per_node") or 1)
    for job in jobs:
        _refuse_other_number(job, tasks)
    if cluster == SLURM:
        # The processes of a run wait for each other: when one is gone, all must go.
        plain["srun_args"] = ["--kill-on-bad-exit=1"]
    # The job starts in the folder that the sweep was typed in, which need not be the project's.
    paths = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    python = shlex.join(["env", f"PYTHONPATH={paths}", sys.executable])
    executor = AutoExecutor(
        cluster=cluster,
        folder=str(plain["submitit_folder"]),
        **{f"{cluster}_python": python},
        **({"slurm_max_num_timeout": plain["max_num_timeout"]} if cluster == SLURM else {}),
    )
    try:
        executor.update_parameters(**{
            key if key in _GENERAL else f"{cluster}_{key}": value
            for key, value in plain.items() if key not in _ON_CREATION
        })  # fmt: skip
    except (NameError, ValueError) as error:
        raise ConfigError(f"hydra.launcher: {first_line(error)}") from error
    return executor


def _refuse_other_number(job: Job, tasks: int) -> None:
    processes = OmegaConf.select(job.cfg, "hardware.processes")
    if (processes or 1) != tasks:
        raise ConfigError(
            f"{job.name}: hardware.processes={typed(processes)} is not hydra.launcher.nodes × "
            f"hydra.launcher.tasks_per_node={tasks}: type hardware.processes={tasks}, or other numbers there"
        )


def _wait(pending: dict[Job, "Submission[None]"], cluster: str) -> dict[int, str]:
    """Until every job has ended; by number, how those ended that could not say."""
    gone: dict[int, str] = {}
    left = dict(pending)
    over_before: set[str] = set()
    asked = time.monotonic()
    while left:
        time.sleep(_LOOK_SECONDS)
        left = {job: one for job, one in left.items() if not _has_ended(job)}
        if not left or (cluster == SLURM and time.monotonic() - asked < _ASK_SECONDS):
            continue
        asked = time.monotonic()
        over = _over(list(left.values()), cluster)
        # What a job that was over at the last look has written must have come through NFS by now.
        for job in [job for job, one in left.items() if one.job_id in over_before & over.keys()]:
            gone[job.number] = over[left.pop(job).job_id]
            log.error("%s is over: %s", job.name, gone[job.number])
        over_before = {*over}
    return gone


def _has_ended(job: Job) -> bool:
    record = read_job(job.directory)
    return record is not None and record.status in (Status.finished, Status.failed)


def _over(submissions: Sequence["Submission[None]"], cluster: str) -> dict[str, str]:
    """The jobs that are over, by id, with how it came about."""
    if cluster != SLURM:
        return {one.job_id: "its process ended without a word" for one in submissions if one.done()}
    states = slurm_states([one.job_id for one in submissions])
    if states is None:
        return {}
    found = {one.job_id: states.get(one.job_id, "forgotten") for one in submissions}
    return {job_id: f"SLURM says {state}" for job_id, state in found.items() if state not in _ALIVE}


def slurm_states(job_ids: Sequence[str]) -> dict[str, str] | None:
    """SLURM's state of the jobs that it still knows, by id; None while it does not answer."""
    arrays = sorted({job_id.partition("_")[0] for job_id in job_ids})
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={','.join(arrays)}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        log.warning("squeue does not answer, the jobs may go on: %s", " ".join(done.stderr.split()))
        return None
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())


def _cancel(submissions: Sequence["Submission[None]"], cluster: str) -> None:
    """End the jobs that are left, and give them time to close their runs."""
    for one in submissions:
        one.cancel(check=False)
    end = time.monotonic() + _SETTLE_SECONDS
    while len(_over(submissions, cluster)) < len(submissions) and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)


def _sbatch_words(error: Exception) -> str:
    """What sbatch said first, without the frame that submitit puts around it."""
    said = re.search(r"sbatch: error: (.*)", str(error))
    return said[1].strip() if said else first_line(error)
