"""tracking.json: what a run's copy in MLflow is made of, and how the run ended."""

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import psutil

from ghost.atomic import write_atomically
from runners.errors import DataError
from runners.resume.files import FOLDER as CHECKPOINTS_FOLDER
from runners.resume.names import LOCK_FILE

RECORD_FILE = "tracking.json"
RUNNING = "RUNNING"
MODEL_FOLDER, STORE_FOLDER = "model", "projections"
"""Folders of a run directory that are uploaded only where large files are asked for."""
_STAYS = frozenset({STORE_FOLDER, RECORD_FILE, CHECKPOINTS_FOLDER, LOCK_FILE})  # stores go by another way

_CLOCK_SLACK = 1.0  # seconds by which one process's start is told differently


@dataclass
class Record:
    """A run's record beside its files: with both, its MLflow run can be made again from nothing.

    Attributes:
        params, tags: What the run was begun with; tags that came later too.
        experiment: The MLflow experiment; None where the run's config names none.
        run_name: What MLflow calls it.
        uri: Address of the store without its password; None where the run was not tracked.
        run_id: Its run in that store; None where there is none.
        parent_run_id: The run that it is shown under.
        upload, upload_large: `tracking.upload` and `tracking.upload_large`.
        artifacts: Folders whose files were given as artifacts, relative to the run directory if in it.
        store: The folder of projections, likewise.
        status: RUNNING, and at the end FINISHED, FAILED or KILLED.
        error: The first words of what ended it.
        started, ended: Unix time in milliseconds, MLflow's unit; `ended` is None while the run goes on.
        host, pid, process_started: The process that writes this record.
    """

    params: dict[str, str]
    tags: dict[str, str]
    experiment: str | None
    run_name: str
    uri: str | None = None
    run_id: str | None = None
    parent_run_id: str | None = None
    upload: bool = True
    upload_large: bool = False
    artifacts: list[str] = field(default_factory=list)
    store: str | None = None
    status: str = RUNNING
    error: str | None = None
    started: int = field(default_factory=lambda: int(time.time() * 1000))
    ended: int | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    process_started: float = field(default_factory=lambda: psutil.Process().create_time())

    @classmethod
    def read(cls, directory: Path) -> "Record":
        """The record in a run directory.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = directory / RECORD_FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{item.name: found[item.name] for item in fields(cls)})
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}): give a run's own directory, in which every run "
                f"that got as far as training has a {RECORD_FILE}"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from error

    def write(self, directory: Path) -> None:
        """Replace the record in a run directory.

        Raises:
            OSError: it cannot be written; the earlier one stays.
        """
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(directory / RECORD_FILE, lambda file: file.write(text.encode()))

    def end(self, status: str, error: str | None, ended: int | None = None) -> None:
        """Note how the run ended, and when: now, or at a moment in Unix milliseconds."""
        self.status, self.error = status, error
        self.ended = int(time.time() * 1000) if ended is None else ended

    @property
    def is_of_this_host(self) -> bool:
        """Whether the run's process is, or was, one of this machine."""
        return self.host == socket.gethostname()

    @property
    def process_lives(self) -> bool:
        """Whether the run's process is still there; only its own machine can tell."""
        try:
            began = psutil.Process(self.pid).create_time()
        except psutil.Error:
            return False
        return self.is_of_this_host and abs(began - self.process_started) < _CLOCK_SLACK

    def add_artifacts(self, directory: Path, run_directory: Path) -> None:
        """Note that a folder's files belong to the run's artifacts."""
        if (name := _within(directory, run_directory)) not in self.artifacts:
            self.artifacts.append(name)

    def add_store(self, directory: Path, run_directory: Path) -> None:
        """Note the folder of projections that the run wrote."""
        self.store = _within(directory, run_directory)

    def files(self, run_directory: Path) -> Iterator[tuple[Path, str | None]]:
        """What is to be uploaded: files and folders, each with its folder among the artifacts.

        A run that was ended before it named any gives all that its directory has.
        """
        if not self.upload:
            return
        folders = self.artifacts
        if not folders and (run_directory / "config.yaml").exists():
            folders = ["."]
        for folder in folders:
            yield from artifacts_in(run_directory / folder, self.upload_large)
        if self.store is not None:
            yield store_artifact(run_directory / self.store, self.upload_large), STORE_FOLDER


def artifacts_in(directory: Path, upload_large: bool) -> Iterator[tuple[Path, str | None]]:
    """A directory's files and folders, each with its folder among the artifacts; large ones where asked."""
    left_out = _STAYS if upload_large else _STAYS | {MODEL_FOLDER}
    for path in sorted(directory.iterdir()):
        if path.name not in left_out and path.suffix != ".partial":  # a killed writer leaves those
            yield path, path.name if path.is_dir() else None


def store_artifact(directory: Path, upload_large: bool) -> Path:
    """What is uploaded of a store of projections."""
    return directory if upload_large else directory / "manifest.json"


def _within(path: Path, directory: Path) -> str:
    """The path as seen from the directory where it lies in it, so that both can be moved; else absolute."""
    path, directory = path.absolute(), directory.absolute()
    return str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path)
