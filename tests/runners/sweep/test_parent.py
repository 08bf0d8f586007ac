"""A tracked sweep: one parent run with its jobs below it, and finished runs of the store found again."""

import shutil
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from conf.command import FAILED
from runners import train
from tests.runners.conftest import Line
from tests.runners.sweep.test_sweep import table

SHORT = (
    *("model=mlp", "data=digits", "optimizer=sgd", "trainer.max_steps=2", "trainer.batch_size=8"),
    *("trainer.overhead_probes=0", "hardware.threads=1"),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots and pages; no sweep here is about those."""
    monkeypatch.setattr(train, "plot_run", lambda _: [])
    monkeypatch.setattr(train, "leave_report", lambda *_: None)


@pytest.fixture
def client(line: Line, tmp_path: Path, ready_store: Path) -> mlflow.MlflowClient:
    """The store of the folder that sweeps are typed in."""
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    return mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def parents(client: mlflow.MlflowClient) -> list[Run]:
    """The runs without a parent, oldest first."""
    experiment = client.get_experiment_by_name("ghostrunner")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


def children(client: mlflow.MlflowClient, parent: Run) -> list[Run]:
    return client.search_runs(
        [parent.info.experiment_id],
        filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
        order_by=["attributes.start_time ASC"],
    )


def test_a_sweep_is_one_parent_with_its_jobs_below(
    line: Line, client: mlflow.MlflowClient, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = ("-m", *SHORT, "engine.val_sets=domain", "engine.val_batch_size=4,64")
    assert line(*typed, "hydra.sweep.dir=sweep") != 0  # a domain has fewer than 64 validation samples
    (parent,) = parents(client)
    assert parent.info.status == "FAILED"
    assert parent.data.params == {"engine.val_batch_size": "4,64"}
    assert parent.data.metrics == {"sweep/finished": 1, "sweep/failed": 1}
    assert "engine.val_batch_size=4,64" in parent.data.tags["sweep.command"]
    assert parent.data.tags["error"].endswith("1 of 2 jobs did not finish: 1 finished, 1 failed")
    assert "jobs.csv" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    jobs = children(client, parent)
    assert [job.info.status for job in jobs] == ["FINISHED", "FAILED"]
    rows = table()
    assert [row["mlflow_run_id"] for row in rows] == [job.info.run_id for job in jobs]
    assert float(rows[0]["lowest_value"]) < float(rows[0]["highest_value"])

    # Once more, in another directory: the finished run of the store stands in for its job.
    capfd.readouterr()
    assert line(*typed, "hydra.sweep.dir=again") != 0
    again = table(Path("again"))
    assert [row["status"] for row in again] == ["skipped", "failed"]
    assert [again[0][key] for key in ("mlflow_run_id", "val_loss")] == [
        jobs[0].info.run_id,
        rows[0]["val_loss"],
    ]
    assert f"is skipped: MLflow run {jobs[0].info.run_id} computed the same" in capfd.readouterr().out
    assert len(parents(client)) == 2

    # Unless it is not to be skipped.
    assert (
        line("-m", *SHORT, "engine.val_batch_size=4", "hydra.sweep.dir=third", "sweep.skip_finished=false")
        == 0
    )
    assert [row["status"] for row in table(Path("third"))] == ["finished"]


def test_a_directory_has_one_parent(line: Line, client: mlflow.MlflowClient) -> None:
    for seeds in ("0", "0,1"):
        assert line("-m", *SHORT, "hydra.sweep.dir=sweep", f"seed={seeds}") == 0
    (parent,) = parents(client)
    assert len(children(client, parent)) == 2


def test_what_a_killed_job_left_open_is_closed(
    line: Line, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_it_open(*_: object) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(train, "build_optimizer", leave_it_open)
    monkeypatch.setattr("runners.tracking.Tracker._abort", lambda *_: None)  # as SIGKILL would have it
    assert line("-m", *SHORT, "hydra.sweep.dir=sweep", "seed=0") == FAILED
    (parent,) = parents(client)
    assert [run.info.status for run in (parent, *children(client, parent))] == ["RUNNING", "KILLED"]
