"""A command of the project: compose its config with Hydra, run its jobs, say every error in one sentence.

Exit codes: 0 done, 1 a failure inside the job (with a traceback in its log), 2 a mistake in the command or
the data (one sentence on stderr), 130 interrupted, 141 nobody reads what it prints.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.errors import UserError
from conf.help_text import keys_help
from conf.hydra_errors import sentence

log = logging.getLogger(__name__)

CONF_DIR = Path(__file__).resolve().parent
FAILED, MISTAKE, INTERRUPTED, UNREAD = 1, 2, 130, 141

OmegaConf.register_new_resolver("keys_help", keys_help, replace=True)


class JobFailed(UserError):
    """A job of a sweep failed and has said why in its log; the other jobs go on."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


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
            exit_code = error.exit_code if isinstance(error, UserError) else MISTAKE
        else:
            log.error("The run failed.", exc_info=error)
            exit_code = FAILED
        raise job_end(exit_code) from error


def job_end(exit_code: int) -> JobFailed | SystemExit:
    """What ends a job that has said why: a single run's program, or only this job of a sweep."""
    return JobFailed(exit_code) if HydraConfig.get().mode == RunMode.MULTIRUN else SystemExit(exit_code)


def run_command(config_name: str, task: Callable[[DictConfig], object], groups: Sequence[str]) -> int:
    """Composes the config of that name from the command line, runs its jobs, and returns the exit code.

    Args:
        groups: Its config groups, for hints at what to type.
    """
    return exit_code(lambda: compose_and_run(config_name, task), groups)


def compose_and_run(config_name: str, task: Callable[[DictConfig], object]) -> None:
    """Hydra's main function for a config by name."""
    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(task)()


@contextmanager
def mistakes_end_it() -> Iterator[None]:
    """Says a callback's `UserError` and ends the program: Hydra turns any Exception of one into a warning."""
    try:
        yield
    except UserError as error:
        say(str(error))
        raise SystemExit(MISTAKE) from error


def say(line: str) -> None:
    """Writes one line to stderr: logging is set up only once a job starts."""
    sys.stderr.write(f"{line}\n")


def exit_code(command: Callable[[], None], groups: Sequence[str], tell: Callable[[str], None] = say) -> int:
    """Runs a command, says in one sentence what was wrong, and returns the exit code.

    Args:
        groups: Its config groups, for hints at what to type.
        tell: How the sentence is said.
    """
    # Hydra's way to hand composition errors to the caller instead of printing its own blocks.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra's parser takes overrides in one row only: a flag between them would end it.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    try:
        command()
    except JobFailed as error:
        return error.exit_code
    except UserError as error:
        tell(str(error))
        return MISTAKE
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        # Only from Hydra itself: jobs let nothing but SystemExit and JobFailed through.
        tell(sentence(error, sys.argv[1:], groups))
        return MISTAKE
    except BrokenPipeError:  # of `--help | head`, say
        # Python would write what is left at its end, and complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except OSError as error:  # Hydra makes the run directory
        tell(
            f"{error.filename or 'the run directory'} cannot be written ({error.strerror}): choose another "
            "hydra.run.dir, or hydra.sweep.dir with -m"
        )
        return MISTAKE
    except KeyboardInterrupt:
        tell("Interrupted.")
        return INTERRUPTED
    return 0
