"""Opening the MLflow store of a run: where it is, whether it can be used, and one creator for a new one."""

import logging
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from filelock import FileLock, Timeout

from analysis.tracking_store import one_line, prepare_mlflow, sqlite_path, without_password
from conf.errors import ConfigError
from runners.environment import filesystem_type, is_network_filesystem

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

_LOCK_SECONDS = 120.0  # creating a store takes 2-4 s, and a whole sweep may queue for it


@dataclass(frozen=True)
class StoreFile:
    """An SQLite store's file, as it was when it was opened."""

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "StoreFile":
        """The file at this path now."""
        found = path.stat()
        return cls(path, found.st_dev, found.st_ino)

    def is_there(self) -> bool:
        """Whether the path still leads to the same file."""
        try:
            return StoreFile.of(self.path) == self
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Store:
    """An open tracking store and the experiment in it that takes the run."""

    uri: str
    client: "MlflowClient"
    experiment_id: str
    file: StoreFile | None = None

    def refuse_lost(self) -> None:
        """Raises `FileNotFoundError` where an SQLite store is no longer the file that was opened.

        SQLite would go on writing to the deleted file, and nobody would ever find it.
        """
        if self.file is not None and not self.file.is_there():
            raise FileNotFoundError(2, "deleted or replaced while the run was going", str(self.file.path))


def open_store(uri: str, experiment: str) -> Store:
    """Connect to the store at a resolved address, creating a SQLite store and the experiment where missing.

    Raises:
        ConfigError: the store cannot be reached, is no MLflow store, or belongs to another MLflow version.
    """
    prepare_mlflow()
    import mlflow  # noqa: F401  (slow to import: only a run that tracks pays for it)

    # A new store reports each of its migrations; that says nothing to whoever started a training run.
    for noisy in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It would repeat for every try what is said once of an outage.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    database = sqlite_path(uri)
    if database is not None:
        return _open_sqlite(uri, database, experiment)
    if not uri.startswith("http"):
        _probe_database(uri)
    return _connect(uri, experiment, artifact_location=None)


def _open_sqlite(uri: str, database: Path, experiment: str) -> Store:
    if is_network_filesystem(database.parent):
        log.warning(
            "the tracking store %s lies on a network file system (%s), where SQLite can lock up or break "
            "when several jobs write: start a server (mlflow server) and set tracking.uri=http://host:port",
            database,
            filesystem_type(database.parent),
        )
    lock = FileLock(f"{database}.lock", timeout=_LOCK_SECONDS)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        # Several jobs that create one store at once leave it broken, so each opens it in turn.
        with lock:
            _refuse_unusable(database)
            opened = _connect(uri, experiment, artifact_location=str(database.parent / "mlartifacts"))
            if not database.exists():  # MLflow has connections to the deleted file
                raise ConfigError(
                    f"tracking.uri={uri} was deleted while this process had it open: type the command again."
                )
            return replace(opened, file=StoreFile.of(database))
    except Timeout as error:
        raise ConfigError(
            f"tracking.uri={uri} was held by another process for {_LOCK_SECONDS:.0f} s: end it, or choose "
            "another tracking.uri."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"tracking.uri={uri} cannot be written ({error.strerror}): choose a tracking.uri in a folder "
            "that you may write to, or set tracking.enabled=false."
        ) from error


def _refuse_unusable(database: Path) -> None:
    """Stop before MLflow touches a file that is not its own or that another version of it made.

    MLflow would add its tables to a foreign database, and would migrate some older stores without asking.
    """
    if not database.exists() or database.stat().st_size == 0:
        return
    if not os.access(database, os.W_OK):
        raise PermissionError(13, "Permission denied", str(database))
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            tables = {name for (name,) in found}
            marked = "alembic_version" in tables
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if marked else None
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"tracking.uri: {database} is not a readable SQLite database ({error}).") from error
    if row is None and tables:
        raise ConfigError(
            f"tracking.uri: {database} is a database, but not a complete MLflow store: move it away or "
            "choose another tracking.uri."
        )
    if row is not None:
        _refuse_other_schema(database, row[0])


def _refuse_other_schema(database: Path, revision: str) -> None:
    import mlflow
    from alembic.script import ScriptDirectory

    migrations = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    if revision == migrations.get_current_head():
        return
    if revision in {script.revision for script in migrations.walk_revisions()}:
        raise ConfigError(
            f"tracking.uri: {database} was made by an older MLflow: back it up and run "
            f"`mlflow db upgrade sqlite:///{database}`, or choose another tracking.uri."
        )
    raise ConfigError(
        f"tracking.uri: {database} was made by a newer MLflow than {mlflow.__version__}: install that "
        "version, or choose another tracking.uri."
    )


def _probe_database(uri: str) -> None:
    """Connect once: MLflow itself would try ten times, for minutes, before it gave up."""
    import sqlalchemy
    from sqlalchemy.exc import SQLAlchemyError

    try:
        engine = sqlalchemy.create_engine(uri)
        with engine.connect():
            pass
        engine.dispose()
    except ImportError as error:
        shown = without_password(uri)
        raise ConfigError(f"tracking.uri={shown} needs a database driver: {error}.") from error
    except SQLAlchemyError as error:
        raise _unreachable(uri, error) from error


def _connect(uri: str, experiment: str, artifact_location: str | None) -> Store:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        return Store(uri, client, _experiment_id(client, experiment, artifact_location))
    except (MlflowException, ValueError) as error:  # a malformed host is a ValueError
        raise _unreachable(uri, error) from error


def _experiment_id(client: "MlflowClient", name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return _experiment_id(client, name, artifact_location)  # another job of a sweep was quicker
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"tracking.experiment={name} was deleted in the tracking store: restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or choose another name."
        )
    return found.experiment_id


def _unreachable(uri: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"tracking.uri={without_password(uri)} cannot be used as a tracking store ({one_line(error)}): start "
        "the server or correct the address, or set tracking.enabled=false."
    )
