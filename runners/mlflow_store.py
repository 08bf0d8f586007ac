"""Opening the MLflow store of a run: where it is, whether it can be used, and one creator for a new one."""

import logging
import os
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from filelock import FileLock, Timeout

from runners.environment import filesystem_type, is_network_filesystem
from runners.errors import ConfigError
from runners.telemetry import disable_telemetry, set_defaults

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
_LOCK_SECONDS = 120.0  # creating a store takes 2-4 s, and a whole sweep may queue for it

# MLflow's own settings; it has no other way to set them. By default it repeats a request to a server that
# is not there for four minutes, two minutes each, and prints links that the run's summary prints anyway.
_MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@dataclass(frozen=True)
class Store:
    """An open tracking store and the experiment in it that takes the run."""

    uri: str
    client: "MlflowClient"
    experiment_id: str


def resolve_uri(uri: str | None, cwd: Path) -> str:
    """The store's full address: by default `mlflow.db` in `cwd`; a relative SQLite path is taken from `cwd`.

    Raises:
        ConfigError: the address is of no kind that can hold runs.
    """
    if uri is None:
        return f"sqlite:///{cwd.absolute() / 'mlflow.db'}"
    scheme = uri.partition("://")[0].partition("+")[0]
    if "://" not in uri or scheme not in _SCHEMES:
        raise ConfigError(
            f"tracking.uri={without_password(uri)} is no tracking store: give sqlite:///path/mlflow.db, "
            f"http(s)://host:port, or a database address ({', '.join(_SCHEMES[3:])}); null means "
            "mlflow.db in the working directory."
        )
    if scheme != "sqlite":
        return uri.rstrip("/")
    path = uri.removeprefix("sqlite:///")
    if path in (uri, "", ":memory:"):
        raise ConfigError(f"tracking.uri={uri} names no file: give sqlite:///path/mlflow.db.")
    return f"sqlite:///{cwd.absolute() / path}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of a resolved SQLite address; None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """The address as it may be shown: a password in it becomes `***`."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", uri)


def open_store(uri: str, experiment: str) -> Store:
    """Connect to the store at a resolved address, creating a SQLite store and the experiment where missing.

    Raises:
        ConfigError: the store cannot be reached, is no MLflow store, or belongs to another MLflow version.
    """
    disable_telemetry()
    set_defaults(_MLFLOW_SETTINGS)
    import mlflow  # noqa: F401  (slow to import: only a run that tracks pays for it)

    # A new store reports each of its migrations; that says nothing to whoever started a training run.
    for noisy in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    database = sqlite_path(uri)
    if database is not None:
        return _open_sqlite(uri, database, experiment)
    if not uri.startswith("http"):
        _probe_database(uri)
    return _connect(uri, experiment, artifact_location=None)


def download(uri: str, artifact: str, folder: Path) -> Path:
    """Copy an artifact, named `runs:/<run id>/<path>`, from the store at a resolved address into `folder`.

    Raises:
        ConfigError: the store or the artifact is not there.
    """
    database = sqlite_path(uri)
    if database is not None and not database.exists():  # MLflow would make an empty store and look in it
        raise ConfigError(f"{artifact}: there is no tracking store {database}, give tracking.uri=STORE")
    disable_telemetry()
    set_defaults(_MLFLOW_SETTINGS)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return Path(download_artifacts(artifact_uri=artifact, dst_path=str(folder), tracking_uri=uri))
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"{artifact} is not in {without_password(uri)} ({one_line(error)}): give the id of a run in it, "
            "or tracking.uri=STORE"
        ) from error


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
            return _connect(uri, experiment, artifact_location=str(database.parent / "mlartifacts"))
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


def one_line(error: BaseException) -> str:
    """An error's type and message on one line of at most 500 characters, passwords masked."""
    text = " ".join(without_password(str(error)).split())
    return f"{type(error).__name__}: {text}"[:500].removesuffix(": ")
