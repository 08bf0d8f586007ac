import json
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from analysis.errors import AnalysisError
from analysis.sources import open_runs
from conf.errors import ConfigError
from tests.analysis.conftest import MakeRun


@pytest.fixture
def client(tmp_path: Path, ready_store: Path) -> MlflowClient:
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    return MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def tracked(
    client: MlflowClient,
    directory: Path | None,
    name: str,
    status: str = "FINISHED",
    parent: str | None = None,
) -> str:  # fmt: skip
    """A run of experiment "test" with the directory's files as artifacts."""
    found = client.get_experiment_by_name("test")
    folder = Path(client.tracking_uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    experiment = found.experiment_id if found else client.create_experiment("test", str(folder))
    tags = {"mlflow.parentRunId": parent} if parent else {}
    run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    if directory is not None:
        client.log_artifacts(run_id, str(directory))
    client.set_terminated(run_id, status)
    return run_id


def test_directories_and_folders_of_them(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("sweep/10", "sweep/2", "other/2", "alone"):
        make_run(name)
    (tmp_path / "sweep" / "2" / "projections").mkdir()
    (tmp_path / "sweep" / "2" / "projections" / "config.yaml").write_text("a: store's own\n")
    with open_runs(["alone", "sweep", str(tmp_path / "other"), "sweep/2"], None, tmp_path) as runs:
        assert [run.directory.relative_to(tmp_path).as_posix() for run in runs] == [
            *("alone", "sweep/2", "sweep/10", "other/2"),
        ]
        assert [run.name for run in runs] == ["alone", "sweep/2", "10", "other/2"]
        assert {run.run_id for run in runs} == {None}


def test_runs_sweeps_and_experiments_of_mlflow(
    make_run: MakeRun, tmp_path: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_run()
    parent = tracked(client, None, "sweep")
    children = [tracked(client, directory, f"seed {seed}", parent=parent) for seed in range(2)]
    alone = tracked(client, directory, "seed 1")
    tracked(client, directory, "bad", status="FAILED")
    with open_runs([f"runs:/{alone}"], None, tmp_path) as runs:
        assert [(run.name, run.run_id) for run in runs] == [("seed 1", alone)]
        assert runs[0].values.equals(runs[0].values)
    with open_runs([parent], None, tmp_path) as runs:
        assert [run.run_id for run in runs] == children
    with open_runs(["test"], f"sqlite:///{tmp_path / 'mlflow.db'}", Path("/")) as runs:
        assert [run.run_id for run in runs] == [*children, alone]
        assert [run.name for run in runs] == ["seed 0", f"seed 1 {children[1][:8]}", f"seed 1 {alone[:8]}"]
    assert "1 of 4 runs of experiment test have not finished" in caplog.text


def test_artifacts_elsewhere_are_downloaded_and_removed(
    make_run: MakeRun, tmp_path: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_run()
    (directory / "model").mkdir()
    (directory / "model" / "weights").write_text("large")
    run_id = tracked(client, directory, "far")
    monkeypatch.setattr("analysis.sources._local", lambda uri: None)
    with open_runs([run_id], None, tmp_path) as (run,):
        assert run.directory != directory
        assert run.values.num_rows > 0
        assert len(list(run.scores())) == 2
        assert not (run.directory / "model").exists()
    assert not run.directory.exists()


def test_a_run_that_was_not_uploaded_is_read_where_it_is(
    make_run: MakeRun, tmp_path: Path, client: MlflowClient
) -> None:
    directory = make_run()
    run_id = tracked(client, None, "not uploaded")
    with pytest.raises(AnalysisError, match=r"tracking\.upload=true"), open_runs([run_id], None, tmp_path):
        pass
    client.log_param(run_id, "output_dir", str(directory))
    (directory / "environment.json").write_text(json.dumps({"mlflow.run_id": run_id}))
    with open_runs([run_id], None, tmp_path) as (run,):
        assert run.directory == directory


@pytest.mark.parametrize("left", ["{}", '{"mlflow.run_id": "another"}', "{", None])
def test_the_files_of_another_run_are_not_taken_for_its_own(
    make_run: MakeRun, tmp_path: Path, client: MlflowClient, left: str | None
) -> None:
    directory = make_run()
    if left is not None:
        (directory / "environment.json").write_text(left)
    run_id = tracked(client, None, "overwritten")
    client.log_param(run_id, "output_dir", str(directory))
    with pytest.raises(AnalysisError, match=r"tracking\.upload=true"), open_runs([run_id], None, tmp_path):
        pass


def test_a_run_without_a_directory_is_not_read_where_the_command_is_typed(
    make_run: MakeRun, tmp_path: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_run())
    run_id = tracked(client, None, "a sweep whose jobs failed")
    with pytest.raises(AnalysisError, match=r"tracking\.upload=true"), open_runs([run_id], None, tmp_path):
        pass


def test_children_that_did_not_finish_are_left_out_and_counted(
    make_run: MakeRun, tmp_path: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_run()
    parent, none_yet = tracked(client, None, "sweep"), tracked(client, None, "another")
    statuses = ["RUNNING", "FINISHED", "FAILED", "KILLED", "FINISHED"]
    children = [tracked(client, directory, status, status, parent) for status in statuses]
    with open_runs([parent], None, tmp_path) as runs:
        assert [run.run_id for run in runs] == [children[1], children[4]]
    assert f"3 of 5 runs of run {parent} have not finished, or failed: they are left out." in caplog.messages
    tracked(client, directory, "still at it", "RUNNING", none_yet)
    with pytest.raises(AnalysisError, match="has no finished run"), open_runs([none_yet], None, tmp_path):
        pass
    with open_runs([children[2]], None, tmp_path) as runs:  # one that is named itself is taken as it is
        assert [run.run_id for run in runs] == [children[2]]


def test_names_that_are_nothing_are_one_sentence(
    make_run: MakeRun, tmp_path: Path, client: MlflowClient
) -> None:
    (tmp_path / "empty").mkdir()
    for name, says in {
        "empty": "holds no run",
        "0" * 32: "cannot be read",
        "nothing": "no directory, no MLflow run id, and no experiment",
        "unused": "has no finished run",
    }.items():
        with pytest.raises(AnalysisError, match=says) as error, open_runs([name], None, tmp_path):
            pass
        assert "\n" not in str(error.value)
    nowhere = open_runs(["nothing"], None, tmp_path / "empty")
    with pytest.raises(AnalysisError, match=r"no tracking store .*mlflow.db"), nowhere:
        pass
    assert not (tmp_path / "empty" / "mlflow.db").exists()


def test_what_hydra_keeps_is_no_run(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    (run.parent / ".hydra").mkdir()
    shutil.copy(run / "config.yaml", run.parent / ".hydra")
    with open_runs([str(run.parent)], None, tmp_path) as runs:
        assert [one.directory for one in runs] == [run]


def test_a_store_that_nothing_is_looked_for_in_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    said = r"tracking\.uri=sqlite:///m\.db has no effect, since .* is on this machine"
    with pytest.raises(ConfigError, match=said), open_runs([str(make_run())], "sqlite:///m.db", tmp_path):
        pass
