"""Run directories brought to MLflow after the fact, by the function and by the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, OmegaConf

from conf.errors import ConfigError
from runners import mlflow_sender
from runners.errors import DataError
from runners.tracking import Tracker, build_tracker
from runners.tracking_record import Record
from runners.upload import upload

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tracker(tracked_cwd: Path) -> Callable[..., Tracker]:
    def make(name: str = "run", parent: str | None = None, **changes: object) -> Tracker:
        (tracked_cwd / name).mkdir(parents=True)
        settings = OmegaConf.create(
            {"enabled": True, "uri": None, "experiment": "e", "run_name": None, "upload": True}
            | {"upload_large": False}
            | changes
        )
        return build_tracker(settings, tracked_cwd / name, tracked_cwd, parent_run_id=parent)  # type: ignore[return-value]

    return make


def typed(run: Path, *, ended: bool = False, uri: str | None = None) -> DictConfig:
    return OmegaConf.create(
        {"run": str(run), "ended": ended, "tracking": {"uri": uri, "experiment": "untracked"}}
    )


def train(tracker: Tracker, steps: int = 3) -> None:
    """What a run does with its tracker."""
    (tracker.output_dir / "config.yaml").write_text("seed: 0\n")
    (tracker.output_dir / "scores").mkdir()
    (tracker.output_dir / "scores" / "shard-00000.pt").write_bytes(b"scores")
    with tracker:
        tracker.start({"seed": 0, "data.kind": "digits"}, {"data.fingerprint": "f" * 64})
        (tracker.output_dir / "environment.json").write_text(json.dumps({"mlflow.run_id": tracker.run_id}))
        for step in range(steps):
            tracker.log_metrics(step, {"loss": 1.0 / (step + 1)})
        tracker.describe("**Validation loss** 0.3")
        tracker.log_artifacts(tracker.output_dir)


def content(client: MlflowClient, run_id: str) -> tuple[object, ...]:
    """All that a store knows of a run, but for its id."""
    run: Run = client.get_run(run_id)
    tags = {name: text for name, text in run.data.tags.items() if name != "mlflow.parentRunId"}
    history = {
        name: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run_id, name)]
        for name in run.data.metrics
    }
    files = sorted(file.path for file in client.list_artifacts(run_id)) + sorted(
        file.path for file in client.list_artifacts(run_id, "scores")
    )
    data = [(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs]
    return run.info.status, run.info.run_name, run.data.params, tags, history, files, data


def test_another_store_gets_the_same_run_and_a_second_upload_changes_nothing(
    tracker: Callable[..., Tracker], tracked_cwd: Path
) -> None:
    first = tracker()
    train(first)
    whole = content(MlflowClient(first.uri), str(first.run_id))
    other = f"sqlite:///{tracked_cwd}/other.db"
    shutil.copy(tracked_cwd / "mlflow.db", tracked_cwd / "other.db")
    MlflowClient(other).delete_run(first.run_id)
    with pytest.raises(ConfigError, match=r"does not take run=.*active"):
        upload(typed(first.output_dir, uri=other), tracked_cwd)
    other = f"sqlite:///{tracked_cwd}/new.db"
    (run,) = upload(typed(first.output_dir, uri=other), tracked_cwd)
    assert run.run_id != first.run_id
    assert content(MlflowClient(other), run.run_id) == whole
    assert json.loads((first.output_dir / "environment.json").read_text())["mlflow.run_id"] == run.run_id
    (again,) = upload(typed(first.output_dir), tracked_cwd)
    assert again.run_id == run.run_id
    assert content(MlflowClient(other), run.run_id) == whole


def test_a_store_deleted_during_the_run_is_said_and_the_run_not_lost(
    tracker: Callable[..., Tracker],
    tracked_cwd: Path,
    ready_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(mlflow_sender, "_PATIENCE", 0.1)
    monkeypatch.setattr(mlflow_sender, "_LAST_RETRY_SECONDS", 0.05)
    first = tracker()
    with first:
        first.start({"seed": 0}, {})
        (tracked_cwd / "mlflow.db").unlink()
        first.log_metrics(1, {"loss": 2.0})
    assert "deleted or replaced while the run was going" in caplog.text
    assert f"python -m runners.upload run={first.output_dir}" in caplog.text
    assert not (tracked_cwd / "mlflow.db").exists()
    with pytest.raises(ConfigError, match="deleted while this process had it open"):
        upload(typed(first.output_dir), tracked_cwd)
    other = f"sqlite:///{tracked_cwd}/other.db"
    shutil.copy(ready_store, tracked_cwd / "other.db")
    (run,) = upload(typed(first.output_dir, uri=other), tracked_cwd)
    found = MlflowClient(other).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert (found.data.metrics, found.data.params) == ({"loss": 2.0}, {"seed": "0"})


def test_an_untracked_run_can_be_uploaded(tracker: Callable[..., Tracker], tracked_cwd: Path) -> None:
    train(tracker(enabled=False))
    (run,) = upload(typed(tracked_cwd / "run"), tracked_cwd)
    found = run.store.client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"loss": 1.0 / 3}
    assert run.store.client.get_experiment(found.info.experiment_id).name == "untracked"
    record = Record.read(tracked_cwd / "run")
    assert (found.info.start_time, found.info.end_time) == (record.started, record.ended)


def killed_processes(cwd: Path) -> tuple[str, str]:
    """A parent and its child of a process that kills itself in the middle; their ids."""
    code = f"""
        import os, signal, sys, time
        from pathlib import Path
        from omegaconf import OmegaConf
        from runners.tracking import Tracker
        cwd = Path({str(cwd)!r})
        cfg = OmegaConf.create(dict(enabled=True, uri=None, experiment="e", run_name=None, upload=True,
                                    upload_large=False))
        (cwd / "sweep" / "0").mkdir(parents=True)
        with Tracker(cfg, cwd / "sweep", cwd) as parent:
            parent.start({{}}, {{}})
            with Tracker(cfg, cwd / "sweep" / "0", cwd, parent_run_id=parent.run_id) as child:
                child.start({{}}, {{}})
                (cwd / "sweep" / "0" / "config.yaml").write_text("seed: 0")
                child.log_metrics(1, {{"loss": 2.0}})
                print(parent.run_id, child.run_id, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    parent, child = done.stdout.split()
    return parent, child


@pytest.mark.slow
def test_killed_runs_end_as_killed_with_all_that_they_wrote(tracked_cwd: Path, ready_store: Path) -> None:
    parent, child = killed_processes(tracked_cwd)
    client = MlflowClient(f"sqlite:///{tracked_cwd}/mlflow.db")
    assert client.get_run(child).info.status == "RUNNING"
    assert [run.run_id for run in upload(typed(tracked_cwd / "sweep"), tracked_cwd)] == [parent, child]
    for run_id in (parent, child):
        found = client.get_run(run_id)
        assert found.info.status == "KILLED"
        assert "could not say why" in found.data.tags["error"]
    assert client.get_run(child).data.metrics == {"loss": 2.0}
    assert [file.path for file in client.list_artifacts(child)] == ["config.yaml", "metrics.jsonl"]
    shutil.copy(ready_store, tracked_cwd / "other.db")  # made anew there, the child still is its parent's
    made = upload(typed(tracked_cwd / "sweep", uri=f"sqlite:///{tracked_cwd}/other.db"), tracked_cwd)
    found = made[1].store.client.get_run(made[1].run_id)
    assert found.data.tags["mlflow.parentRunId"] == made[0].run_id
    assert found.info.status == "KILLED"


def test_a_run_that_is_going_is_left_alone(
    tracker: Callable[..., Tracker], tracked_cwd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = tracker()
    with first:
        first.start({}, {})
        assert upload(typed(first.output_dir), tracked_cwd) == []
        assert "is still going" in caplog.text
        assert upload(typed(first.output_dir, ended=True), tracked_cwd) == []
        elsewhere = replace(Record.read(first.output_dir), host="node17")
    elsewhere.write(first.output_dir)
    assert upload(typed(first.output_dir), tracked_cwd) == []
    assert "going on node17; if it was killed, type ended=true" in caplog.text
    (run,) = upload(typed(first.output_dir, ended=True), tracked_cwd)
    assert run.store.client.get_run(run.run_id).info.status == "KILLED"


def test_a_password_is_asked_for_and_kept_out_of_files(
    tracker: Callable[..., Tracker], tracked_cwd: Path
) -> None:
    first = tracker(enabled=False)
    with first:
        first.start({"tracking.uri": "http://me:s3cret@host:1"}, {})
    assert "s3cret" not in (first.output_dir / "tracking.json").read_text()
    replace(Record.read(first.output_dir), uri="http://me:***@host:1").write(first.output_dir)
    with pytest.raises(ConfigError, match="whose password is not kept"):
        upload(typed(first.output_dir), tracked_cwd)


@pytest.mark.parametrize(
    ("text", "error"),
    [(None, "holds no run"), ("{", "is damaged"), ("{}", "is damaged"), ("[]", "is damaged")],
)
def test_folders_without_a_readable_record_are_one_sentence(
    tmp_path: Path, text: str | None, error: str
) -> None:
    if text is not None:
        (tmp_path / "tracking.json").write_text(text)
    with pytest.raises(DataError, match=error):
        upload(typed(tmp_path), tmp_path)


def test_a_run_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run is not set"):
        upload(typed(Path("???")), tmp_path)


def test_the_command(tracker: Callable[..., Tracker], tracked_cwd: Path) -> None:
    train(tracker(enabled=False))
    command = [sys.executable, "-m", "runners.upload", "run=run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tracked_cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "run is in MLflow, FINISHED: http://127.0.0.1:5000/#/experiments/" in done.stderr
    assert "Open MLflow: " in done.stderr
    assert "Traceback" not in done.stderr
