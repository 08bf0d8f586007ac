"""Runs in MLflow without samples: artifacts beside the store, and artifacts that a server keeps."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from analysis.forget import folder
from analysis.forget.verification import verify_gone
from analysis.report import write_run_report
from analysis.runs import load_run
from analysis.tracking_store import download
from conf.command import FAILED, MISTAKE
from tests.analysis.conftest import MakeRun
from tests.analysis.forget.test_command import Command, command

__all__ = ["command"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The address of a store with artifacts beside it, and an experiment in it."""
    place = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{place}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    return uri, client.create_experiment("e", artifact_location=str(place / "mlartifacts"))


def uploaded(client: MlflowClient, experiment: str, run: Path) -> tuple[str, str]:
    """The id of a tracked run with this directory's files, and the id of a sample in it."""
    run_id = client.create_run(experiment).info.run_id
    write_run_report(load_run(run), run / "report.html", None)
    client.log_artifacts(run_id, str(run))
    return run_id, load_run(run).values["sample_id"][2].as_py()


def test_local_artifacts_are_cleaned_where_they_are(
    store: tuple[str, str], make_run: MakeRun, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, experiment = store
    client = MlflowClient(tracking_uri=uri)
    run_id, name = uploaded(client, experiment, make_run())
    words = (f"tracking.uri={uri}", f"runs={run_id}", f"ids='{name}'", "compact=true")
    assert command(*words) == 0
    artifacts = Path(client.get_run(run_id).info.artifact_uri)
    assert verify_gone([artifacts], {name}) == []
    assert name not in pq.read_table(artifacts / "values.parquet")["sample_id"].to_pylist()
    above = client.create_run(experiment, tags={}).info.run_id
    client.set_tag(run_id, "mlflow.parentRunId", above)
    child, _ = uploaded(client, experiment, make_run("child"))
    client.set_tag(child, "mlflow.parentRunId", run_id)
    assert command(words[0], f"runs={above}", *words[2:]) == 0
    below = Path(client.get_run(child).info.artifact_uri)
    assert name not in pq.read_table(below / "values.parquet")["sample_id"].to_pylist()
    assert verify_gone([below], {name}) == []
    client.log_param(run_id, "data.drop", f"[{name}]")
    capsys.readouterr()
    assert command(*words) == FAILED
    assert f"has {name!r} in its parameter data.drop" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_one_sentence(
    store: tuple[str, str], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(f"tracking.uri={store[0]}", "runs=" + "0" * 32, "ids=a") == MISTAKE
    assert f"runs=[{'0' * 32}] is not in {store[0]}" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a tracking server that keeps the artifacts itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tmp_path / "served"
    place.mkdir()
    words = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    words += [
        "--backend-store-uri",
        f"sqlite:///{place}/mlflow.db",
        "--artifacts-destination",
        str(place / "kept"),
    ]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(words, cwd=place, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield uri
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_artifacts_of_a_server_are_sent_back_clean(
    server: str, make_run: MakeRun, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "plot_run", lambda _: [])
    client = MlflowClient(tracking_uri=server)
    run = make_run()
    (run / "plots").mkdir()
    (run / "plots/top_bottom.png").write_bytes(b"an old figure")
    run_id, name = uploaded(client, client.create_experiment("e"), run)
    assert command(f"tracking.uri={server}", f"runs={run_id}", f"ids='{name}'", "compact=true") == 0
    (tmp_path / "again").mkdir()
    left = download(server, f"runs:/{run_id}/", tmp_path / "again")
    files = {path.relative_to(left).as_posix() for path in left.rglob("*") if path.is_file()}
    before = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert before - files == {"plots/top_bottom.png"}
    assert verify_gone([left], {name}) == []
    assert name not in load_run(left).values["sample_id"].to_pylist()
