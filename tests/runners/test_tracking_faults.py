"""Stores that vanish, lock up, fill their disk or have several writers, each with real processes."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.mlflow_server import ROOT, Server, free_port, start_python

pytestmark = pytest.mark.slow

# A run that is told over its standard input what to do, and says how long it took.
RUN = """
    import logging, sys, time
    from pathlib import Path
    from omegaconf import OmegaConf
    from runners import mlflow_sender
    from runners.tracking import Tracker
    logging.basicConfig(level="INFO", stream=sys.stderr)
    mlflow_sender._INTERVAL = mlflow_sender._RETRY_SECONDS = 0.5
    out = Path("{name}")
    out.mkdir()
    (out / "config.yaml").write_text("seed: 0")
    cfg = OmegaConf.create(dict(enabled=True, uri={uri!r}, experiment="e", run_name=None, upload=True,
                                upload_large=False))
    slowest = 0.0
    with Tracker(cfg, out, Path.cwd()) as tracker:
        tracker.start({{"seed": 0}}, {{"device": "cpu"}})
        print(tracker.run_id, flush=True)
        step = 0
        for line in sys.stdin:
            for _ in range(int(line)):
                step += 1
                began = time.monotonic()
                tracker.log_metrics(step, {{"train/loss": 1 / step, "train/lr": 0.1}})
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.005)
            print(f"{{slowest:.3f}}", flush=True)
        tracker.log_artifacts(out)
    print("ended", flush=True)
"""


class Run:
    """A process with a run in it."""

    def __init__(self, cwd: Path, uri: str | None, name: str = "run", before: str = "") -> None:
        self.directory = cwd / name
        self.process = start_python(before + RUN.format(name=name, uri=uri), cwd)
        self.run_id = self._line()

    def steps(self, number: int) -> float:
        """Log so many steps; the longest that one of all so far took, in seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return float(self._line())

    def end(self) -> tuple[str, float]:
        """Its log, and how long its end took, in seconds."""
        began = time.monotonic()
        out, log = self.process.communicate()
        assert self.process.returncode == 0, log
        assert out == "ended\n"
        return log, time.monotonic() - began

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, self.process.communicate()[1]
        return line


@pytest.fixture
def server(tracked_cwd: Path) -> Iterator[Server]:
    port = free_port()
    command = (
        f"exec mlflow server --backend-store-uri sqlite:///{tracked_cwd}/mlflow.db "
        f"--artifacts-destination {tracked_cwd}/served --workers 1 --host 127.0.0.1 --port {port}"
    )
    found = Server(command, port, tracked_cwd / "server.log")
    found.start()
    yield found
    found.kill()


def assert_whole(client: MlflowClient, run_id: str, directory: Path, steps: int) -> None:
    """The store has all that the run directory has, each point once."""
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0"}
    assert run.data.tags["device"] == "cpu"
    for name in ("train/loss", "train/lr"):
        points = client.get_metric_history(run_id, name)
        assert sorted(point.step for point in points) == list(range(1, steps + 1))
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    assert {file.path for file in client.list_artifacts(run_id)} == {"config.yaml", "metrics.jsonl"}


def upload(cwd: Path, *arguments: str) -> str:
    """What the command says."""
    done = subprocess.run(
        [sys.executable, "-m", "runners.upload", *arguments], cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_server_that_is_back_before_the_end_gets_everything_by_itself(
    server: Server, tracked_cwd: Path
) -> None:
    run = Run(tracked_cwd, server.uri)
    run.steps(100)
    server.kill()
    slowest = run.steps(1500)  # for some 8 s, in which several tries fail
    assert slowest < 0.5
    server.start()
    run.steps(100)
    log, _ = run.end()
    assert "the tracking store did not take metrics" in log
    assert "answers again" in log
    assert_whole(MlflowClient(server.uri), run.run_id, run.directory, 1700)


def test_a_server_that_stays_away_is_brought_up_to_date_by_the_command(
    server: Server, tracked_cwd: Path
) -> None:
    run = Run(tracked_cwd, server.uri)
    run.steps(100)
    server.kill()
    run.steps(100)
    log, seconds = run.end()
    assert seconds < 60
    assert "python -m runners.upload run=" in log
    server.start()
    client = MlflowClient(server.uri)
    assert client.get_run(run.run_id).info.status == "RUNNING"
    for _ in range(2):
        assert "is in MLflow, FINISHED" in upload(tracked_cwd, "run=run")
        assert_whole(client, run.run_id, run.directory, 200)


def test_a_store_locked_for_long_by_another_process_holds_up_nothing(tracked_cwd: Path) -> None:
    run = Run(tracked_cwd, None)
    with closing(sqlite3.connect(tracked_cwd / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        slowest = run.steps(4500)  # longer than the 20 s for which MLflow's SQLite waits for a lock
        other.rollback()
    assert slowest < 0.5
    log, _ = run.end()
    assert "did not take metrics" in log
    assert "locked" in log
    assert_whole(MlflowClient(f"sqlite:///{tracked_cwd}/mlflow.db"), run.run_id, run.directory, 4500)


def test_a_full_disk_under_the_store_ends_nothing(tracked_cwd: Path) -> None:
    size = (tracked_cwd / "mlflow.db").stat().st_size
    # Writes beyond this size fail, as on a full disk.
    limit = f"""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 20_000}, resource.RLIM_INFINITY))
    """
    run = Run(tracked_cwd, None, before=limit)
    run.steps(1500)
    log, _ = run.end()
    assert "the tracking store did not take metrics" in log
    assert "python -m runners.upload run=" in log
    assert "is in MLflow, FINISHED" in upload(tracked_cwd, "run=run")
    assert_whole(MlflowClient(f"sqlite:///{tracked_cwd}/mlflow.db"), run.run_id, run.directory, 1500)


@pytest.mark.parametrize("made", [False, True], ids=["new", "made"])
def test_four_processes_at_once_in_one_store(tmp_path: Path, ready_store: Path, made: bool) -> None:
    if made:
        (tmp_path / "mlflow.db").write_bytes(ready_store.read_bytes())
    code = RUN.replace("print(tracker.run_id, flush=True)", "")
    jobs = [start_python(code.format(name=f"run{i}", uri=None), tmp_path) for i in range(4)]
    for job in jobs:
        assert job.stdin is not None
        job.stdin.write("200\n")
    logs = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, logs
    assert all("alembic" not in log and "migration" not in log for log in logs)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    assert experiment.artifact_location == str(tmp_path / "mlartifacts")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 4
    for run in runs:
        assert run.info.run_name is not None
        assert_whole(client, run.info.run_id, tmp_path / run.info.run_name.rpartition("/")[2], 200)
