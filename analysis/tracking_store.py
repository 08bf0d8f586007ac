"""Where an MLflow store is, and what is read from it. MLflow is imported only once a store is read."""

import re
from pathlib import Path

from conf.errors import ConfigError
from conf.telemetry import set_defaults

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")

# MLflow's own settings; it has no other way to set them. By default it repeats a request to a server that
# is not there for four minutes, two minutes each, and prints links that the run's summary prints anyway.
_MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


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


def missing_database(uri: str) -> Path | None:
    """The file of a resolved SQLite address that is not there: MLflow would make an empty store of it."""
    database = sqlite_path(uri)
    return database if database is not None and not database.exists() else None


def without_password(uri: str) -> str:
    """The address as it may be shown: a password in it becomes `***`."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", uri)


def prepare_mlflow() -> None:
    """Set what must be set before MLflow is imported; a value that the user has set stays."""
    set_defaults(_MLFLOW_SETTINGS)


def download(uri: str, artifact: str, folder: Path) -> Path:
    """Copy an artifact, named `runs:/<run id>/<path>`, from the store at a resolved address into `folder`.

    Raises:
        ConfigError: the store or the artifact is not there.
    """
    if database := missing_database(uri):
        raise ConfigError(f"{artifact}: there is no tracking store {database}, give tracking.uri=STORE")
    prepare_mlflow()
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return Path(download_artifacts(artifact_uri=artifact, dst_path=str(folder), tracking_uri=uri))
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"{artifact} is not in {without_password(uri)} ({one_line(error)}): give the id of a run in it, "
            "or tracking.uri=STORE"
        ) from error


def one_line(error: BaseException) -> str:
    """An error's type and message on one line of at most 500 characters, passwords masked."""
    text = " ".join(without_password(str(error)).split())
    return f"{type(error).__name__}: {text}"[:500].removesuffix(": ")
