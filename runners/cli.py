"""The command line of `run.py`: check the composed config, then dispatch it.

Exit codes are `conf.command`'s, and 1 for scores that `verify=true` finds wrong. Torch is imported only once
a checked config is about to run.
"""

import sys
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from conf.command import CONF_DIR, FAILED, MISTAKE, Reported, compose_and_run, exit_code, job_end, say
from conf.errors import ConfigError, UserError
from runners.config import GROUPS
from runners.experiment_file import register_experiment_files
from runners.validate import check


class CheckBeforeRun(Callback):
    """Refuses an impossible config before the run directory is made; a sweep's jobs check at their start."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        tree = config.copy()
        OmegaConf.set_struct(tree, False)
        del tree["hydra"]
        try:
            self.check(tree)
            refuse_earlier_run(Path(config.hydra.run.dir), "hydra.run.dir")
        except UserError as error:
            say(str(error))
            # Hydra turns any Exception of a callback into a warning; SystemExit ends the program.
            raise SystemExit(MISTAKE) from error

    def check(self, config: DictConfig) -> None:
        """Raises `ConfigError` for a config that cannot run as it stands."""
        check(config)


def task(cfg: DictConfig) -> float | None:
    """One job: check, then run or report. Returns a training run's final validation loss, for sweepers.

    Raises `SystemExit` (single run) or `JobFailed` (sweep) after logging what went wrong.
    """
    with Reported(UserError):
        check(cfg)
        refuse_earlier_run(Path(cfg.output_dir), "output_dir")
    from ghost.errors import GhostError

    with Reported(UserError, GhostError):
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
    return exit_code(_run, GROUPS)


def _run() -> None:
    register_experiment_files(sys.argv[1:], CONF_DIR / "experiment")
    compose_and_run("config", task)
