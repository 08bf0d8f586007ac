import json
import math
from pathlib import Path

import pytest
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from runners.metrics_log import MetricsLog
from runners.mlflow_metrics import MetricsFeed, known_steps
from runners.mlflow_run import MlflowRun
from runners.mlflow_store import open_store


@pytest.fixture
def run(tracked_cwd: Path) -> MlflowRun:
    return MlflowRun.create(open_store(f"sqlite:///{tracked_cwd}/mlflow.db", "x"), "one", None)


def points(run: MlflowRun, name: str) -> list[tuple[int, float]]:
    history: list[Metric] = run.store.client.get_metric_history(run.run_id, name)
    return sorted((point.step, point.value) for point in history)


def test_whole_lines_are_sent_once_at_their_own_time(run: MlflowRun, tmp_path: Path) -> None:
    metrics, feed = MetricsLog(tmp_path), MetricsFeed(run, tmp_path)
    feed.send()  # before there is a file
    metrics.append(1, {"loss": 3.0, "norm": math.inf, "val/loss[code]": math.nan})
    feed.send()
    with metrics.path.open("a") as file:
        file.write('{"step": 2, "time": 5.0, "lo')
    feed.send()
    with metrics.path.open("a") as file:
        file.write('ss": 2.5}\n')
    feed.send()
    feed.send()
    assert points(run, "loss") == [(1, 3.0), (2, 2.5)]
    assert math.isnan(points(run, "val/loss_code_")[0][1])
    assert points(run, "norm")[0][1] > 1e300  # MLflow's largest number
    written = [json.loads(line)["time"] for line in metrics.path.read_text().splitlines()]
    history = run.store.client.get_metric_history(run.run_id, "loss")
    assert sorted(point.timestamp for point in history) == sorted(round(1000 * moment) for moment in written)


def test_after_an_error_it_goes_on_where_the_store_stopped(
    run: MlflowRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, feed = MetricsLog(tmp_path), MetricsFeed(run, tmp_path)
    for step in range(5):
        metrics.append(step, {f"m{i}": float(step) for i in range(600)})
    takes, calls = MlflowClient.log_batch, []

    def stop_at_the_second(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
        calls.append(len(metrics))
        if len(calls) == 2:
            raise MlflowException("the server is gone")
        takes(client, run_id, metrics=metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", stop_at_the_second)
        with pytest.raises(MlflowException):
            feed.send()
    feed.send()
    for name in ("m0", "m599"):
        assert points(run, name) == [(step, float(step)) for step in range(5)]


def test_points_that_the_store_has_are_not_doubled_by_a_run_that_repeats_steps(
    run: MlflowRun, tmp_path: Path
) -> None:
    first = MetricsLog(tmp_path)
    for step in range(1, 7):
        first.append(step, {"loss": 1.0 / step})
    MetricsFeed(run, tmp_path).send()
    first.append(7, {"loss": 0.1})  # killed before this was sent
    first.close()
    # It goes on from a checkpoint at step 4, to which metrics.jsonl is cut back.
    lines = first.path.read_text().splitlines(keepends=True)
    first.path.write_text("".join(lines[:4]))
    feed = MetricsFeed(run, tmp_path, known_steps(run))
    again = MetricsLog(tmp_path)
    for step in range(5, 10):
        again.append(step, {"loss": 1.0 / step, "new": 1.0})
    feed.send()
    assert points(run, "loss") == [(step, 1.0 / step) for step in range(1, 10)]
    assert [step for step, _ in points(run, "new")] == [5, 6, 7, 8, 9]
