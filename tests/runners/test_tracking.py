"""Every run against a real SQLite store: what is in it afterwards, and how the run ended."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, OmegaConf

from conf.errors import ConfigError
from runners import mlflow_sender
from runners.tracking import NullTracker, Tracker, build_tracker, flatten

MakeTracker = Callable[..., Tracker]


@pytest.fixture
def make_tracker(tracked_cwd: Path) -> MakeTracker:
    def make(
        directory: str = "out", *, run_id: str | None = None, parent: str | None = None, **cfg: object
    ) -> Tracker:
        output_dir = tracked_cwd / directory
        output_dir.mkdir(parents=True, exist_ok=True)
        return Tracker(config(**cfg), output_dir, tracked_cwd, run_id=run_id, parent_run_id=parent)

    return make


def config(**changes: object) -> DictConfig:
    defaults = {
        "enabled": True,
        "uri": None,
        "experiment": "test",
        "run_name": None,
        "upload": True,
        "upload_large": False,
    }
    return OmegaConf.create(defaults | changes)


def stored(tracker: Tracker) -> Run:
    assert tracker.run_id is not None
    return MlflowClient(tracker.uri).get_run(tracker.run_id)


def artifacts(tracker: Tracker) -> set[str]:
    assert tracker.run_id is not None
    return {file.path for file in MlflowClient(tracker.uri).list_artifacts(tracker.run_id)}


def run_that_raises(
    tracker: Tracker, error: BaseException, params: Mapping[str, object] | None = None
) -> None:
    with tracker:
        tracker.start(params or {}, {})
        tracker.log_metrics(1, {"loss": 4.0})
        raise error


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_finished_run_is_whole(make_tracker: MakeTracker, tracked_cwd: Path) -> None:
    tracker = make_tracker(run_name="first")
    with tracker:
        tracker.start({"model.name": "gpt2", "seed": 3, "path": None}, {"git_commit": "abc"})
        for step in range(1, 4):
            tracker.log_metrics(step, {"train/loss": 1.0 / step})
        tracker.log_artifacts(tracker.output_dir)
    run = stored(tracker)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params == {"model.name": "gpt2", "seed": "3", "path": "None"}
    assert run.data.tags["git_commit"] == "abc"
    history = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1.0 / 3)]
    assert artifacts(tracker) == {"metrics.jsonl"}
    assert (tracked_cwd / "mlartifacts" / tracker.run_id / "artifacts" / "metrics.jsonl").is_file()
    assert [row["step"] for row in rows(tracker.output_dir)] == [1, 2, 3]


def test_run_is_named_after_its_directory_and_shown_under_its_parent(make_tracker: MakeTracker) -> None:
    tracker = make_tracker("10-20-30/4", parent="0" * 32)
    with tracker:
        tracker.start({}, {})
    run = stored(tracker)
    assert run.info.run_name == "10-20-30/4"
    assert run.data.tags["mlflow.parentRunId"] == "0" * 32


def test_many_metrics_and_params_arrive_in_batches(make_tracker: MakeTracker) -> None:
    tracker = make_tracker()
    with tracker:
        tracker.start({f"key{i}": i for i in range(230)}, {})
        tracker.log_metrics(1, {f"m{i}": float(i) for i in range(2300)})
    run = stored(tracker)
    assert len(run.data.params) == 230
    assert run.data.metrics == {f"m{i}": float(i) for i in range(2300)}


def test_long_param_is_cut_and_says_so(make_tracker: MakeTracker, caplog: pytest.LogCaptureFixture) -> None:
    tracker = make_tracker()
    with tracker:
        tracker.start({"data.domains": "x" * 7000}, {})
    assert stored(tracker).data.params["data.domains"] == "x" * 6000
    assert "data.domains is cut" in caplog.text


def test_name_that_mlflow_refuses_is_replaced_once_and_kept_in_the_file(
    make_tracker: MakeTracker, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = make_tracker()
    with tracker:
        tracker.start({}, {})
        tracker.log_metrics(1, {"val/loss[code](%)": 2.0})
        tracker.log_metrics(2, {"val/loss[code](%)": 1.0})
    assert stored(tracker).data.metrics == {"val/loss_code____": 1.0}
    assert rows(tracker.output_dir)[0]["val/loss[code](%)"] == 2.0
    assert caplog.text.count("MLflow does not take the name") == 1


def test_non_finite_numbers_survive(make_tracker: MakeTracker) -> None:
    tracker = make_tracker()
    with tracker:
        tracker.start({}, {})
        tracker.log_metrics(1, {"loss": math.nan, "norm": math.inf, "lr": 0.5})
    row = rows(tracker.output_dir)[0]
    assert (row["loss"], row["norm"], row["lr"]) == (None, None, 0.5)
    assert row["non_finite"] == {"loss": "nan", "norm": "inf"}
    assert math.isnan(stored(tracker).data.metrics["loss"])


def test_exception_ends_the_run_as_failed_with_its_traceback(make_tracker: MakeTracker) -> None:
    tracker = make_tracker()
    with pytest.raises(ArithmeticError):
        run_that_raises(tracker, ArithmeticError("loss is\nnot finite"))
    run = stored(tracker)
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"loss": 4.0}
    assert run.data.tags["error"] == "ArithmeticError: loss is not finite"
    assert artifacts(tracker) == {"traceback.txt"}
    text = (tracker.output_dir / "traceback.txt").read_text()
    assert text.startswith("Traceback")
    assert "raise error" in text


def test_exception_after_finish_still_fails_the_run(make_tracker: MakeTracker) -> None:
    tracker = make_tracker()

    def run() -> None:
        with tracker:
            tracker.start({}, {})
            tracker.finish()
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        run()
    assert stored(tracker).info.status == "FAILED"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(3)])
def test_interrupt_ends_the_run_as_killed(make_tracker: MakeTracker, stop: BaseException) -> None:
    tracker = make_tracker(upload=False)
    with pytest.raises(type(stop)):
        run_that_raises(tracker, stop)
    run = stored(tracker)
    assert run.info.status == "KILLED"
    assert run.data.tags["error"].startswith(type(stop).__name__)
    assert artifacts(tracker) == set()  # tracking.upload=false
    assert (tracker.output_dir / "traceback.txt").is_file()


def test_sigterm_ends_the_run_as_killed_and_the_handler_is_put_back(make_tracker: MakeTracker) -> None:
    before = signal.getsignal(signal.SIGTERM)
    tracker = make_tracker()

    def run() -> None:
        with tracker:
            tracker.start({}, {})
            tracker.log_metrics(1, {"loss": 4.0})
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(5)
            pytest.fail("the signal did not end the block")

    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    run = stored(tracker)
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"loss": 4.0}


def test_a_signal_ends_the_run_as_killed_whatever_error_takes_its_place(tmp_path: Path) -> None:
    """A library's clean-up that the signal interrupts may fail in turn, as omegaconf's does."""
    tracker = NullTracker(tmp_path)

    def run() -> None:
        with tracker:
            tracker.start({}, {})
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(5)
            finally:
                raise AttributeError("half made")

    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 128 + signal.SIGTERM
    record = json.loads((tmp_path / "tracking.json").read_text())
    assert record["status"] == "KILLED"
    assert record["error"] == "AttributeError: half made"


def test_a_thread_may_track_although_it_cannot_set_a_signal_handler(tmp_path: Path) -> None:
    def work() -> None:
        with NullTracker(tmp_path) as tracker:
            tracker.log_metrics(1, {"loss": 1.0})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert rows(tmp_path)[0]["loss"] == 1.0


def test_resumed_run_goes_on_and_keeps_its_params(
    make_tracker: MakeTracker, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_tracker()
    with pytest.raises(SystemExit):
        run_that_raises(first, SystemExit(1), {"lr": 0.1, "seed": 0})
    again = make_tracker(run_id=first.run_id, experiment="another")
    with again:
        again.start({"lr": 0.2, "seed": 0, "new": 1}, {})
        again.log_metrics(2, {"loss": 3.0})
    run = stored(again)
    assert again.run_id == first.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "seed": "0", "new": "1"}
    assert "keeps param lr=0.1; it is now 0.2" in caplog.text
    assert "error" not in run.data.tags  # of the first part
    assert not (again.output_dir / "traceback.txt").exists()
    assert [row["step"] for row in rows(again.output_dir)] == [1, 2]
    assert f"experiments/{run.info.experiment_id}/runs" in str(again.run_url())


def test_resuming_an_unknown_run_is_one_sentence(make_tracker: MakeTracker) -> None:
    with pytest.raises(ConfigError, match=r"does not take the run.*deadbeef"):
        make_tracker(run_id="deadbeef").start({}, {})


def test_store_that_stops_answering_neither_ends_nor_holds_up_the_run(
    make_tracker: MakeTracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = make_tracker()
    asked, answer = threading.Event(), threading.Event()

    def refuse(*args: object, **kwargs: object) -> None:
        asked.set()
        answer.wait(10)
        raise MlflowException("the server is gone")

    monkeypatch.setattr(mlflow_sender, "_INTERVAL", 0.01)
    with tracker:
        tracker.start({}, {})
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_batch", refuse)
            tracker.log_metrics(0, {f"m{i}": 1.0 for i in range(600)})
            assert asked.wait(5)
            tracker.log_metrics(1, {"m0": 2.0})  # while the store has not answered the first
            answer.set()
            while "did not take" not in caplog.text:
                time.sleep(0.01)
    assert "did not take metrics (MlflowException: the server is gone)" in caplog.text
    assert len(stored(tracker).data.metrics) == 600
    history = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "m0")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 2.0)]


def test_ids_in_the_environment_override_nothing(
    make_tracker: MakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "0" * 32)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = make_tracker(parent="1" * 32)
    with tracker:
        tracker.start({}, {})
        tracker.log_metrics(1, {"loss": 1.0})
        tracker.log_artifacts(tracker.output_dir)
    assert tracker.run_id != "0" * 32
    run = stored(tracker)
    assert run.data.tags["mlflow.parentRunId"] == "1" * 32
    assert run.data.metrics == {"loss": 1.0}
    assert artifacts(tracker) == {"metrics.jsonl"}


def test_a_run_is_named_after_what_it_trains_where_its_directory_says_only_when(
    make_tracker: MakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py"])
    tracker = make_tracker("2026-11-22/10-20-30-123456")
    with tracker:
        tracker.start({"model.name": "gpt2-mini", "data.kind": "interpreter"}, {"git.commit": "abc"})
    run = stored(tracker)
    assert run.info.run_name == "10-20-30 gpt2-mini interpreter"
    assert run.data.tags["mlflow.source.name"] == "run.py"
    assert run.data.tags["mlflow.source.git.commit"] == "abc"


def test_a_description_and_the_data_are_shown(make_tracker: MakeTracker) -> None:
    tracker = make_tracker()
    with tracker:
        tracker.start({"data.kind": "digits"}, {"data.fingerprint": "f" * 64})
        tracker.describe("**Validation loss** 0.3")
    run = stored(tracker)
    assert run.data.tags["mlflow.note.content"] == "**Validation loss** 0.3"
    assert [(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs] == [
        ("digits", "f" * 12)
    ]


def test_disabled_tracker_never_imports_mlflow(tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from omegaconf import OmegaConf
        from runners.tracking import NullTracker, build_tracker
        tracker = build_tracker(OmegaConf.create({{"enabled": False}}), Path({str(tmp_path)!r}), Path.cwd())
        assert type(tracker) is NullTracker
        with tracker:
            tracker.start({{"a": 1}}, {{}})
            tracker.log_metrics(1, {{"loss": 2.0}})
            tracker.log_artifacts(Path("."))
            tracker.finish()
            assert tracker.ui_command() is None and tracker.run_url() is None and tracker.run_id is None
        assert "mlflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=Path(__file__).parents[2])
    assert rows(tmp_path)[0]["loss"] == 2.0


def test_build_tracker_hands_on_the_ids(tracked_cwd: Path) -> None:
    tracker = build_tracker(config(), tracked_cwd, tracked_cwd, run_id="a", parent_run_id="b")
    assert isinstance(tracker, Tracker)
    assert tracker.run_id == "a"


def test_flatten_gives_command_line_keys() -> None:
    nested = {"seed": 0, "model": {"config": {"n_layer": 2}, "hidden": [4, 4]}}
    assert flatten(nested) == {"seed": 0, "model.config.n_layer": 2, "model.hidden": [4, 4]}


def test_command_and_link_open_the_store(make_tracker: MakeTracker, tracked_cwd: Path) -> None:
    tracker = make_tracker()
    assert tracker.run_url() is None
    with tracker:
        tracker.start({}, {})
    command = str(tracker.ui_command())
    assert f"mlflow ui --backend-store-uri sqlite:///{tracked_cwd}/mlflow.db " in command
    assert command.endswith("--workers 1 --host 127.0.0.1 --port 5000")
    experiment = stored(tracker).info.experiment_id
    page = f"http://127.0.0.1:5000/#/experiments/{experiment}/runs/{tracker.run_id}"
    assert tracker.run_url() == f"{page}?workflowType=machine_learning"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "http://[bad"])
def test_server_that_is_not_there_is_one_sentence(
    make_tracker: MakeTracker, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = make_tracker(uri=uri)
    with pytest.raises(ConfigError, match="cannot be used as a tracking store"), tracker:
        tracker.start({}, {})
    assert not (tracker.output_dir / "traceback.txt").exists()
