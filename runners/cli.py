"""The command line of `run.py`: check the composed config, then dispatch it.

Exit codes are `conf.command`'s, and 1 for scores that `verify=true` finds wrong. Torch is imported only once
a checked config is about to run.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from conf.command import (
    CONF_DIR,
    FAILED,
    MISTAKE,
    Reported,
    compose_and_run,
    exit_code,
    job_end,
    mistakes_end_it,
    say,
)
from conf.errors import ConfigError, UserError
from runners.config import GROUPS
from runners.experiment_file import register_experiment_files
from runners.launch import launched
from runners.resume.command import with_resumed_run
from runners.resume.lock import enter, entered
from runners.sweep.scope import sweeps_end_here
from runners.validate import check
from runners.validate_world import check_world, refuse_sweep

if TYPE_CHECKING:
    from runners.world import World


class CheckBeforeRun(Callback):
    """Refuses an impossible config before the run directory is made; a sweep's launcher checks its jobs'."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        tree = config.copy()
        OmegaConf.set_struct(tree, False)
        del tree["hydra"]
        with mistakes_end_it():
            if launched().world_size > 1:
                self._in_one_directory(config, tree)
            else:
                self.check(tree)
                self.enter(tree, Path(config.hydra.run.dir))

    def check(self, config: DictConfig) -> None:
        """Raises `ConfigError` for a config that cannot run as it stands."""
        check(config)
        check_world(config, launched())

    def _in_one_directory(self, config: DictConfig, tree: DictConfig) -> None:
        """The same check in each of several processes. The main one's run directory becomes everyone's, since
        `${now:}` differs between them, and it alone saves Hydra's own files there.
        """
        from runners.together import EndingTogether, say_once
        from runners.world import joined_world

        with joined_world() as world:
            try:
                with EndingTogether(world):
                    world.agreed(lambda: self.check(tree))
                    directory = world.broadcast(os.path.abspath(config.hydra.run.dir))
                    tree.hardware.processes = world.world_size
                    world.on_main(lambda: self.enter(tree, Path(directory)))
            except UserError as error:
                say_once(world, str(error))
                raise SystemExit(error.exit_code) from error
        with read_write(config), open_dict(config):
            config.hydra.run.dir = directory
            if not world.is_main:
                config.hydra.output_subdir = None

    def enter(self, config: DictConfig, directory: Path) -> None:
        """Take the run directory, where there is one, until the process ends.

        Raises:
            ConfigError: It holds what this command cannot go on with.
        """
        enter(config, directory, "hydra.run.dir")


def task(cfg: DictConfig) -> float | None:
    """One job: check, then run or report. Returns a training run's final validation loss, for sweepers.

    Raises `SystemExit` (single run) or `JobFailed` (sweep) after logging what went wrong.
    """
    with Reported(UserError):
        check(cfg)
        check_world(cfg, launched())
    from ghost.errors import GhostError
    from runners.logs import log_by_rank
    from runners.together import EndingTogether
    from runners.world import joined_world

    with Reported(UserError, GhostError), joined_world() as world, EndingTogether(world):
        log_by_rank(world, Path(cfg.output_dir))
        if world.world_size > 1:  # part of the record: another number would train on other batches
            cfg.hardware.processes = world.world_size
        with entered(cfg, Path(cfg.output_dir), "output_dir", world):
            return _do(cfg, world)


def _do(cfg: DictConfig, world: "World") -> float | None:
    """What the config asks for."""
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

        project(cfg, world)
        return None
    from runners.train import run

    return run(cfg, world)


def refuse_earlier_run(directory: Path, key: str) -> None:
    """Raises `ConfigError` if a run has left its files in the directory: two runs' files would be mixed."""
    if (directory / "config.yaml").exists():
        raise ConfigError(f"{key}={directory} holds an earlier run: choose another directory")


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    try:
        if launched().world_size == 1:
            return exit_code(_run, GROUPS)
        from runners.together import say_once
        from runners.world import joined_world

        with joined_world() as world:
            return exit_code(_run, GROUPS, partial(say_once, world))
    except ConfigError as error:  # the processes do not find each other
        say(str(error))
        return MISTAKE


def _run() -> None:
    sys.argv[1:] = with_resumed_run(sys.argv[1:])
    refuse_sweep(sys.argv[1:], launched())
    register_experiment_files(sys.argv[1:], CONF_DIR / "experiment")
    with sweeps_end_here():
        compose_and_run("config", task)
