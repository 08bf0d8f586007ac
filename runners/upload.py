"""Brings MLflow up to date from run directories: what a store did not take, runs that were killed, runs that
were never tracked.

python -m runners.upload run=outputs/DAY/TIME
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from analysis.runs import ENVIRONMENT_FILE
from analysis.tracking_store import one_line, resolve_uri, without_password
from conf.command import Reported, run_command
from conf.errors import ConfigError, UserError
from conf.schema import key, schema_node
from ghost.atomic import write_atomically
from runners.errors import DataError
from runners.mlflow_metrics import MetricsFeed, known_steps
from runners.mlflow_page import run_url, ui_command
from runners.mlflow_run import MlflowRun
from runners.mlflow_store import Store, open_store
from runners.report import read_environment
from runners.tracking_record import RECORD_FILE, RUNNING, Record

log = logging.getLogger(__name__)


@dataclass
class UploadStore:
    """Where the runs go."""

    uri: str | None = key(
        "server or store; null: where each run was tracked, else mlflow.db in the folder the command is "
        "typed in"
    )
    experiment: str = key("MLflow experiment of runs whose config names none")


@dataclass
class UploadConfig:
    """The whole tree of this command."""

    run: str = key("run directory, or a folder with run directories in it")
    ended: bool = key("runs of other machines that seem to be going were killed: mark them KILLED")
    tracking: UploadStore = MISSING


ConfigStore.instance().store(name="schema_upload", node=schema_node(UploadConfig), provider="ghostrunner")


def upload(cfg: DictConfig, cwd: Path) -> list[MlflowRun]:
    """Bring every run up to date that is not going on, parents before their children.

    Raises:
        ConfigError: a key is missing, or a store does not take a run.
        DataError: there is no run, or a record is damaged.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"{missing[0]} is not set: type {missing[0]}=DIRECTORY of a run")
    records = {directory: Record.read(directory) for directory in run_directories(Path(cfg.run))}
    uploaded: list[MlflowRun] = []
    new_ids: dict[str | None, str] = {}  # of runs that had to be made again
    for directory, record in records.items():
        if not close_killed(record, directory, cfg.ended):
            continue
        uri = _store_uri(record, directory, cfg.tracking.uri, cwd)
        earlier = record.run_id
        record.parent_run_id = new_ids.get(record.parent_run_id, record.parent_run_id)
        run = bring_up_to_date(
            record, directory, open_store(uri, record.experiment or cfg.tracking.experiment)
        )
        if earlier is not None:
            new_ids[earlier] = run.run_id
        url = run_url(uri, run.store.experiment_id, run.run_id)
        log.info("%s is in MLflow, %s: %s", directory, record.status, url)
        uploaded.append(run)
    for command in sorted({command for run in uploaded if (command := ui_command(run.store.uri))}):
        log.info("Open MLflow: %s", command)
    return uploaded


def run_directories(folder: Path) -> list[Path]:
    """The directories of runs in a folder, itself maybe, those further up first.

    Raises:
        DataError: there is none.
    """
    found = sorted(
        (path.parent for path in folder.rglob(RECORD_FILE)), key=lambda path: (len(path.parts), path)
    )
    if not found:
        raise DataError(
            f"run={folder} holds no run: give a run directory, which has a {RECORD_FILE}, or a folder of such"
        )
    return sorted(found, key=lambda path: (len(path.parts), path))


def close_killed(record: Record, directory: Path, ended: bool) -> bool:
    """Note a run as KILLED whose process is gone without a word; returns whether the run is over.

    Args:
        ended: Whether a process of another machine is known to be gone.
    """
    if record.status != RUNNING:
        return True
    if record.process_lives:
        log.warning("%s is left alone: its run is still going (process %d)", directory, record.pid)
        return False
    if not (record.is_of_this_host or ended):
        log.warning(
            "%s is left alone: its run seems to be going on %s; if it was killed, type ended=true",
            directory,
            record.host,
        )
        return False
    record.end("KILLED", "the process was killed and could not say why", _last_sign_of_life(directory))
    return True


def bring_up_to_date(record: Record, directory: Path, store: Store) -> MlflowRun:
    """Make the record's run in the store what the run directory says, creating it where it is not there.

    May be repeated: what the store has stays one. The record then names the run and the store.

    Raises:
        ConfigError: the store does not take it.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = _existing(record, store) or _created(record, directory, store)
        run.begin(record.params, record.tags)
        MetricsFeed(run, directory, known_steps(run)).send()
        for path, folder in record.files(directory):
            run.upload(path, folder)
        if (traceback := directory / "traceback.txt").exists() and record.upload:
            run.upload(traceback)
        run.end(record.status, record.error, record.ended)
        record.write(directory)
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"tracking.uri={without_password(store.uri)} does not take run={directory} ({one_line(error)}): "
            "what it has taken stays, type the command again when it answers"
        ) from error
    return run


def _existing(record: Record, store: Store) -> MlflowRun | None:
    from mlflow.exceptions import MlflowException

    if record.run_id is None:
        return None
    try:
        return MlflowRun.find(store, record.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    log.info("%s has no run %s: it is made again", without_password(store.uri), record.run_id)
    return None


def _created(record: Record, directory: Path, store: Store) -> MlflowRun:
    """A new run, which the run directory's files name at once, so that a second try finds it."""
    run = MlflowRun.create(store, record.run_name, record.parent_run_id, record.started)
    record.uri, record.run_id = without_password(store.uri), run.run_id
    record.write(directory)
    if noted := read_environment(directory):
        text = json.dumps(noted | {"mlflow.run_id": run.run_id}, indent=2) + "\n"
        write_atomically(directory / ENVIRONMENT_FILE, lambda file: file.write(text.encode()))
    return run


def _store_uri(record: Record, directory: Path, typed: str | None, cwd: Path) -> str:
    """The address of the store that takes the run."""
    uri = typed or record.uri
    if uri is not None and uri != typed and ":***@" in uri:
        raise ConfigError(
            f"run={directory} was tracked in {uri}, whose password is not kept: type tracking.uri="
        )
    return resolve_uri(uri, cwd)


def _last_sign_of_life(directory: Path) -> int:
    """When a run last wrote something, in Unix milliseconds."""
    written = [path.stat().st_mtime for path in directory.iterdir() if path.is_file()]
    return int(max(written) * 1000)


def task(cfg: DictConfig) -> None:
    """Hydra's task function. Raises as `runners.cli.task` does."""
    with Reported(UserError):
        upload(cfg, Path.cwd())


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("upload", task, groups=())


if __name__ == "__main__":
    sys.exit(main())
