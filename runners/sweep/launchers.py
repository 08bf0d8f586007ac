"""The launchers of `run.py`, as Hydra knows launchers; `runners.sweep.ways` and `submitted` do the work.

The settings of a launcher are those of Hydra's own of the same name. Torch is not imported.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from runners.sweep.jobs import Job
    from runners.sweep.sweep import Sweep


class SerialLauncher(Launcher):
    """Jobs one after another in the process that the sweep is typed in."""

    config: DictConfig
    context: HydraContext

    def __init__(self) -> None:
        self._sweep: Sweep | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's way to hand over what a launcher needs."""
        self.config, self.context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose and check all jobs, then run those that have not been done before.

        Raises:
            ConfigError: A job cannot work as configured; none has started.
        """
        from runners.sweep.jobs import compose_jobs
        from runners.sweep.ways import begin_sweep, rehearse

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = compose_jobs(self.context, self.config, job_overrides, initial_job_idx)
        if any(job.cfg.dry_run for job in jobs):
            return rehearse(jobs, self.context, self.submission(jobs))
        if self._sweep is None:
            self._sweep = begin_sweep(self.config)
        return self._sweep.launch(jobs, self.run_jobs)

    def run_jobs(self, jobs: Sequence["Job"]) -> Mapping[int, str]:
        """Run jobs to their end; returns what a scheduler says of those that it ended, by number."""
        from runners.sweep.ways import one_after_another

        return one_after_another(jobs, self.context)

    def submission(self, jobs: Sequence["Job"]) -> str | None:
        """What would be submitted for the jobs, as text; None where nothing is."""
        return None


class JoblibLauncher(SerialLauncher):
    """Jobs in parallel processes of this machine."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = settings

    def run_jobs(self, jobs: Sequence["Job"]) -> Mapping[int, str]:
        from runners.sweep.ways import in_parallel

        return in_parallel(jobs, self.context, self._settings)


class LocalLauncher(SerialLauncher):
    """Jobs as processes of this machine that submitit starts, all at once."""

    cluster = "local"

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = settings

    def run_jobs(self, jobs: Sequence["Job"]) -> Mapping[int, str]:
        from runners.sweep.submitted import submit

        return submit(jobs, self.context, self.cluster, self._settings)


class SlurmLauncher(LocalLauncher):
    """Jobs of SLURM that submitit submits."""

    cluster = "slurm"

    def submission(self, jobs: Sequence["Job"]) -> str | None:
        from runners.sweep.submitted import script

        return script(jobs, self._settings)


# By the name that is typed: Hydra's own launcher and those of its plugins.
LAUNCHERS: dict[str, type[SerialLauncher]] = {
    "basic": SerialLauncher,
    "joblib": JoblibLauncher,
    "submitit_local": LocalLauncher,
    "submitit_slurm": SlurmLauncher,
}

_ADDRESS = "hydra._internal.core_plugins.ghostrunner"


def registered(choice: str) -> str:
    """Make the launcher that stands for a typed name known to Hydra; returns what Hydra calls it."""
    launcher = LAUNCHERS[choice]
    # Hydra imports launchers by their address, and from no other packages than its own and `hydra_plugins`.
    sys.modules[_ADDRESS], launcher.__module__ = sys.modules[__name__], _ADDRESS
    Plugins.instance().register(launcher)
    return f"{launcher.__module__}.{launcher.__name__}"
