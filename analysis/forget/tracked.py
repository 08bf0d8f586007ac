"""Runs in an MLflow store: their artifacts as a folder, and what else of them names samples."""

import hashlib
import logging
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from analysis.forget.verification import Finding
from analysis.sources import PARENT
from analysis.tracking_store import download, one_line, prepare_mlflow, sqlite_path, without_password
from conf.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

log = logging.getLogger(__name__)


class TrackedRun:
    """A run by its id in the store at a resolved address.

    Raises:
        ConfigError: There is no such store or run.
    """

    def __init__(self, run_id: str, uri: str) -> None:
        self.run_id, self.uri = run_id, uri
        self._run = _found(run_id, uri)
        place = urlparse(self._run.info.artifact_uri)
        self.local = Path(place.path) if place.scheme in ("", "file") else None

    @contextmanager
    def artifacts(self) -> Iterator[Path]:
        """The run's artifacts: their own folder, or a copy of what a server has, for as long as the block."""
        if self.local is not None and self.local.is_dir():
            yield self.local
            return
        with TemporaryDirectory() as folder:
            if self.local is not None:  # nothing was ever uploaded, as of a sweep's own run
                yield Path(folder)
                return
            yield download(self.uri, f"runs:/{self.run_id}/", Path(folder))

    @contextmanager
    def changed_artifacts(self) -> Iterator[Path]:
        """The same; what the block changes in a copy is sent back, and what it removes deleted.

        Raises:
            ConfigError: The server does not take it; the same command can be typed again.
        """
        with self.artifacts() as folder:
            before = _checksums(folder)
            yield folder
            if self.local is None:
                self._send_back(folder, before, _checksums(folder))

    def children(self) -> list[str]:
        """Ids of the runs that are shown under it: a sweep's, or those of `runners.retrain`."""
        from mlflow import MlflowClient

        client, found, token = MlflowClient(tracking_uri=self.uri), [], None
        while True:
            page = client.search_runs(
                [self._run.info.experiment_id], f"tags.`{PARENT}` = '{self.run_id}'", page_token=token
            )
            found += [run.info.run_id for run in page]
            if not (token := page.token):
                return found

    def fields_left(self, ids: Set[str]) -> list[Finding]:
        """Parameters and tags that name the samples: MLflow cannot change a parameter of a run."""
        fields = {f"parameter {key}": value for key, value in self._run.data.params.items()}
        fields |= {f"tag {key}": value for key, value in self._run.data.tags.items()}
        place = Path(f"runs:/{self.run_id}")
        return [
            Finding(place, f"has {name!r} in its {field}")
            for field, value in fields.items()
            for name in sorted(ids)
            if name in value
        ]

    def _send_back(self, folder: Path, before: dict[str, str], now: dict[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        repository = _repository(self._run.info.artifact_uri, self.uri)
        changed = [name for name, checksum in now.items() if before.get(name) != checksum]
        removed = sorted(before.keys() - now.keys())
        # What says whose the numbers are goes last, a store's manifest before the files it no longer names.
        samples = [name for name in changed if Path(name).name == "samples.parquet"]
        manifests = [name for name in changed if Path(name).name == "manifest.json"]
        first = [name for name in changed if name not in (*samples, *manifests)]
        try:
            self._upload(repository, folder, [*first, *manifests])
            for name in removed:
                repository.delete_artifacts(name)
            self._upload(repository, folder, samples)
        except (MlflowException, OSError) as error:
            raise ConfigError(
                f"runs=[{self.run_id}]: {without_password(self.uri)} did not take all of the cleaned "
                f"artifacts ({one_line(error)}), so some name the samples still: type the same command "
                "again, or delete them on the server"
            ) from error
        log.info("Sent %d files back to %s and deleted %d there.", len(changed), self.run_id, len(removed))

    def _upload(self, repository: "ArtifactRepository", folder: Path, names: Sequence[str]) -> None:
        for name in names:
            inside = Path(name).parent
            repository.log_artifact(str(folder / name), None if inside == Path() else inside.as_posix())


def tracked_runs(run_ids: Sequence[str], uri: str) -> list[TrackedRun]:
    """The runs in the store at a resolved address and all runs below them, finished or not, each once.

    Raises:
        ConfigError: There is no such store or run.
    """
    found: dict[str, TrackedRun] = {}
    waiting = list(run_ids)
    while waiting:
        run_id = waiting.pop(0)
        if run_id not in found:
            found[run_id] = TrackedRun(run_id, uri)
            waiting += found[run_id].children()
    return list(found.values())


def _found(run_id: str, uri: str) -> "Run":
    database = sqlite_path(uri)
    if database is not None and not database.exists():  # MLflow would make an empty store and look in it
        raise ConfigError(f"runs=[{run_id}]: there is no tracking store {database}, give tracking.uri=STORE")
    prepare_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return MlflowClient(tracking_uri=uri).get_run(run_id)
    except MlflowException as error:
        raise ConfigError(
            f"runs=[{run_id}] is not in {without_password(uri)} ({one_line(error)}): give the id of a run "
            "in it, or tracking.uri=STORE"
        ) from error


def _repository(artifact_uri: str, uri: str) -> "ArtifactRepository":
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(artifact_uri, tracking_uri=uri)


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below, by its path from the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
