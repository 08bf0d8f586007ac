"""The command line: compose the config with Hydra, check it, dispatch it, say every error in one sentence.

Exit codes: 0 done, 1 a failure inside the run (traceback in `run.log`) or scores that `verify=true` finds
wrong, 2 a mistake in the command or the data (one sentence on stderr), 130 interrupted. Torch is imported
only once a checked config is about to run.
"""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runners.errors import ConfigError, RunnerError
from runners.experiment_file import register_experiment_files
from runners.help_text import keys_help
from runners.hydra_errors import sentence
from runners.validate import check

log = logging.getLogger(__name__)

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
FAILED, MISTAKE, INTERRUPTED = 1, 2, 130

OmegaConf.register_new_resolver("keys_help", keys_help, replace=True)


class JobFailed(RunnerError):
    """A job of a sweep failed and has said why in its log; the other jobs go on."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class CheckBeforeRun(Callback):
    """Refuses an impossible config before the run directory is made; a sweep's jobs check at their start."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        tree = config.copy()
        OmegaConf.set_struct(tree, False)
        del tree["hydra"]
        try:
            self.check(tree)
            refuse_earlier_run(Path(config.hydra.run.dir), "hydra.run.dir")
        except RunnerError as error:
            _say(str(error))
            # Hydra turns any Exception of a callback into a warning; SystemExit ends the program.
            raise SystemExit(MISTAKE) from error

    def check(self, config: DictConfig) -> None:
        """Raises `ConfigError` for a config that cannot run as it stands."""
        check(config)


class Reported:
    """Logs an error once, then ends a single run by its exit code or a sweep's job by `JobFailed`."""

    def __init__(self, *mistakes: type[Exception]) -> None:
        self.mistakes = mistakes

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit | JobFailed):
            return
        if isinstance(error, KeyboardInterrupt):
            log.error("Interrupted; what was written so far is in %s", HydraConfig.get().runtime.output_dir)
            raise SystemExit(INTERRUPTED) from error
        if isinstance(error, self.mistakes):
            log.error("%s", error)
            exit_code = MISTAKE
        else:
            log.error("The run failed.", exc_info=error)
            exit_code = FAILED
        raise job_end(exit_code) from error


def job_end(exit_code: int) -> JobFailed | SystemExit:
    """What ends a job that has said why: a single run's program, or only this job of a sweep."""
    return JobFailed(exit_code) if HydraConfig.get().mode == RunMode.MULTIRUN else SystemExit(exit_code)


def task(cfg: DictConfig) -> float | None:
    """One job: check, then run or report. Returns a training run's final validation loss, for sweepers.

    Raises `SystemExit` (single run) or `JobFailed` (sweep) after logging what went wrong.
    """
    with Reported(RunnerError):
        check(cfg)
        refuse_earlier_run(Path(cfg.output_dir), "output_dir")
    from ghost.errors import GhostError

    with Reported(RunnerError, GhostError):
        if cfg.dry_run and cfg.engine.name == "gradprojlora":
            from runners.dryrun_projection import report_projection

            report_projection(cfg)
            return None
        if cfg.dry_run:
            from runners.dryrun import report

            report(cfg)
            return None
        if cfg.verify:
            from runners.verification import verify_scores

            if not verify_scores(cfg):
                raise job_end(FAILED)
            return None
        if cfg.engine.name == "gradprojlora":
            from runners.project import project

            project(cfg)
            return None
        from runners.train import run

        return run(cfg)


def refuse_earlier_run(directory: Path, key: str) -> None:
    """Raises `ConfigError` if a run has left its files in the directory: two runs' files would be mixed."""
    if (directory / "config.yaml").exists():
        raise ConfigError(f"{key}={directory} holds an earlier run: choose another directory")


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("config", task)


def run_command(config_name: str, task: Callable[[DictConfig], object]) -> int:
    """Composes the config of that name from the command line, runs its jobs, and returns the exit code."""
    # Hydra's way to hand composition errors to the caller instead of printing its own blocks.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        register_experiment_files(sys.argv[1:], CONF_DIR / "experiment")
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(task)()
    except JobFailed as error:
        return error.exit_code
    except RunnerError as error:
        _say(str(error))
        return MISTAKE
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        # Only from Hydra itself: `task` lets nothing but SystemExit and JobFailed through.
        _say(sentence(error, sys.argv[1:]))
        return MISTAKE
    except OSError as error:  # Hydra makes the run directory
        if error.filename is None:
            raise
        _say(
            f"{error.filename} cannot be written ({error.strerror}): choose another hydra.run.dir, or "
            "hydra.sweep.dir with -m"
        )
        return MISTAKE
    except KeyboardInterrupt:
        _say("Interrupted.")
        return INTERRUPTED
    return 0


def _say(line: str) -> None:
    """Writes one line to stderr: logging is set up only once a job starts."""
    sys.stderr.write(f"{line}\n")
