"""Stores that work, stores that cannot, and a new one that several processes open at once."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from analysis.tracking_store import resolve_uri, without_password
from conf.errors import ConfigError
from runners import mlflow_store
from runners.mlflow_store import open_store


def test_uri_is_made_absolute(tmp_path: Path) -> None:
    assert resolve_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri("sqlite:///runs/a.db", tmp_path) == f"sqlite:///{tmp_path}/runs/a.db"
    assert resolve_uri("sqlite:////data/a.db", tmp_path) == "sqlite:////data/a.db"
    assert resolve_uri("http://host:5000/", tmp_path) == "http://host:5000"


@pytest.mark.parametrize("uri", ["mlruns", "file:///mlruns", "ftp://host", "sqlite://", "sqlite:///:memory:"])
def test_uri_that_is_no_store_is_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri="):
        resolve_uri(uri, tmp_path)


def test_password_is_never_shown() -> None:
    assert without_password("postgresql://me:s3cret@host/db") == "postgresql://me:***@host/db"
    assert without_password("http://host:5000/") == "http://host:5000/"
    with pytest.raises(ConfigError) as refused:
        open_store("postgresql+nosuchdriver://me:s3cret@127.0.0.1:9/db", "x")
    assert "s3cret" not in str(refused.value)


def test_mlflow_settings_of_the_user_stay(tracked_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    open_store(f"sqlite:///{tracked_cwd}/mlflow.db", "x")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def change(database: Path, statement: str) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize(
    ("revision", "advice"),
    # The first is one of MLflow's earliest migrations, which every later version knows.
    [("451aebb31d03", "older MLflow.*mlflow db upgrade sqlite:///"), ("0123456789ab", "newer MLflow")],
)
def test_store_of_another_mlflow_is_refused_untouched(tracked_cwd: Path, revision: str, advice: str) -> None:
    change(tracked_cwd / "mlflow.db", f"UPDATE alembic_version SET version_num = '{revision}'")
    before = (tracked_cwd / "mlflow.db").read_bytes()
    with pytest.raises(ConfigError, match=advice):
        open_store(resolve_uri(None, tracked_cwd), "x")
    assert (tracked_cwd / "mlflow.db").read_bytes() == before


def test_foreign_and_damaged_files_are_refused_untouched(tracked_cwd: Path) -> None:
    foreign = tracked_cwd / "foreign.db"
    change(foreign, "CREATE TABLE accounts (id INTEGER)")
    before = foreign.read_bytes()
    with pytest.raises(ConfigError, match="not a complete MLflow store"):
        open_store(resolve_uri(f"sqlite:///{foreign}", tracked_cwd), "x")
    assert foreign.read_bytes() == before
    (tracked_cwd / "text.db").write_text("this is no database " * 100)
    with pytest.raises(ConfigError, match="not a readable SQLite database"):
        open_store(resolve_uri("sqlite:///text.db", tracked_cwd), "x")


def test_folder_that_cannot_be_written_is_one_sentence(tracked_cwd: Path) -> None:
    (tracked_cwd / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        open_store(resolve_uri("sqlite:///file/mlflow.db", tracked_cwd), "x")


def test_deleted_experiment_is_one_sentence(tracked_cwd: Path) -> None:
    uri = f"sqlite:///{tracked_cwd}/mlflow.db"
    MlflowClient(uri).delete_experiment(open_store(uri, "gone").experiment_id)
    with pytest.raises(ConfigError, match=r"tracking\.experiment=gone was deleted"):
        open_store(uri, "gone")


def test_network_file_system_gets_a_warning(
    tracked_cwd: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_store, "filesystem_type", lambda path: "nfs4")
    monkeypatch.setattr(mlflow_store, "is_network_filesystem", lambda path: True)
    open_store(resolve_uri(None, tracked_cwd), "x")
    assert "network file system (nfs4)" in caplog.text
    assert "tracking.uri=http://host:port" in caplog.text
