"""`resume=<run directory or MLflow run id>`: what else the command line must say for that run to go on."""

import os
import re
from pathlib import Path

import yaml

from conf.errors import ConfigError
from runners.resume.names import CONFIG_FILE, FINISHED_FILE

_KEY = "resume"
_IMPLIED = ("experiment", "hydra.run.dir", "output_dir")  # what `resume` alone decides


def with_resumed_run(arguments: list[str]) -> list[str]:
    """The arguments, with a `resume=RUN` among them written out: the run's saved config and its directory.

    The process goes to the folder that the run was started from, so that relative paths mean the same.

    Raises:
        ConfigError: There is no such run, it has finished, or the other arguments speak of another.
    """
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{_KEY}=")]
    if not named or named[-1] in ("null", ""):
        return arguments
    others = [argument for argument in arguments if not argument.startswith(f"{_KEY}=")]
    typed = f"{_KEY}={named[-1]}"
    if len(named) > 1 or "-m" in others or "--multirun" in others:
        raise ConfigError(f"{typed} goes on with one run: type one run, without -m")
    for argument in others:
        if argument.partition("=")[0].lstrip("+~") in _IMPLIED:
            raise ConfigError(f"{argument} does not go with {typed}, which says it already: leave it out")
    directory = _directory(named[-1].strip("'\""), others)
    if (directory / FINISHED_FILE).exists():
        raise ConfigError(
            f"{typed}: the run has finished; to run it again, type experiment={directory / CONFIG_FILE}"
        )
    started_in = _started_in(directory)
    if not started_in.is_dir():
        raise ConfigError(
            f"{typed}: the run was started in {started_in}, which is not on this machine: make that folder"
        )
    os.chdir(started_in)
    # Hydra keeps what was typed; the first command's stays where it is.
    return [
        f"{_KEY}={_quoted(directory)}", f"experiment={_quoted(directory / CONFIG_FILE)}",
        f"hydra.run.dir={_quoted(directory)}", "hydra.output_subdir=.hydra/resumed", *others,
    ]  # fmt: skip


def _directory(name: str, arguments: list[str]) -> Path:
    """The directory of the run that a path or an MLflow run id names."""
    path = Path(name).absolute()
    if path.is_dir():
        if not (path / CONFIG_FILE).exists():
            raise ConfigError(f"{_KEY}={name} holds no run: a run directory has a {CONFIG_FILE}")
        return path
    run_id = name.removeprefix("runs:/").rstrip("/")
    if not re.fullmatch(r"[0-9a-f]{32}", run_id):
        raise ConfigError(f"{_KEY}={name} is no directory and no MLflow run id: type one of these")
    # Of all command lines only one that names a tracked run pays for this import.
    from analysis.sources import directory_of_tracked
    from analysis.tracking_store import resolve_uri

    given = [a.partition("=")[2] for a in arguments if a.startswith("tracking.uri=")]
    return directory_of_tracked(run_id, resolve_uri(given[-1] if given else None, Path.cwd()))


def _started_in(directory: Path) -> Path:
    """The folder that the run's command was typed in; a run that others started has no record of it."""
    record = directory / ".hydra" / "hydra.yaml"
    if not record.exists():
        return Path.cwd()
    return Path(yaml.safe_load(record.read_text(encoding="utf-8"))["hydra"]["runtime"]["cwd"])


def _quoted(path: Path) -> str:
    """The path as Hydra's command line takes it."""
    text = str(path)
    if re.fullmatch(r"[\w./@%+\-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
