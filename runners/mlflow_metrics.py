"""From `metrics.jsonl` to MLflow: the run's own file is the queue, so that an outage costs no memory and no
number.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runners.metrics_log import FILE_NAME, RESERVED
from runners.mlflow_run import MlflowRun, mlflow_name

if TYPE_CHECKING:
    from mlflow.entities import Metric

_METRICS_PER_BATCH = 1000  # MLflow's limit


class MetricsFeed:
    """Sends the lines of a run directory's `metrics.jsonl` that the store does not have yet.

    A point that the store has keeps its value: a run that went on from a checkpoint repeats some steps, and
    MLflow would show both.
    """

    def __init__(
        self, run: MlflowRun, directory: Path, known: Mapping[str, frozenset[int]] | None = None
    ) -> None:
        """Prepare; nothing is read before `send`.

        Args:
            known: Steps that the store has, by metric; None: it has none.
        """
        self._run = run
        self._path = directory / FILE_NAME
        self._known = known or {}
        self._offset = 0  # bytes of the file that the store has

    def send(self) -> None:
        """Send all whole lines behind those that the store has; after an error the next call goes on there.

        Raises:
            MlflowException, OSError: the store takes no more, or the file cannot be read.
        """
        for metrics, end in self._batches():
            self._run.store.refuse_lost()
            for first in range(0, len(metrics), _METRICS_PER_BATCH):
                self._run.store.client.log_batch(
                    self._run.run_id, metrics=metrics[first : first + _METRICS_PER_BATCH]
                )
            self._offset = end

    def _batches(self) -> Iterator[tuple[list["Metric"], int]]:
        """Points of some lines each, and where in the file the last of these ends."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            end = file.seek(self._offset)
            batch: list[Metric] = []
            for line in file:
                if not line.endswith(b"\n"):  # it is being written, or was when its writer was killed
                    break
                end += len(line)
                batch += self._points(json.loads(line))
                if len(batch) >= _METRICS_PER_BATCH:
                    yield batch, end
                    batch = []
            if batch:
                yield batch, end

    def _points(self, row: Mapping[str, Any]) -> Iterator["Metric"]:
        """The numbers of one line that the store does not have, at the line's time."""
        from mlflow.entities import Metric

        step, moment = int(row["step"]), round(row["time"] * 1000)  # milliseconds, MLflow's unit
        strange = row.get("non_finite", {})
        for name in row.keys() - RESERVED:
            allowed = mlflow_name(name)
            if step not in self._known.get(allowed, ()):
                yield Metric(allowed, float(strange.get(name, row[name])), moment, step)


def known_steps(run: MlflowRun) -> dict[str, frozenset[int]]:
    """The steps that the store has of each of the run's metrics.

    Raises:
        MlflowException: the store does not tell.
    """
    client = run.store.client
    names = client.get_run(run.run_id).data.metrics
    return {
        name: frozenset(point.step for point in client.get_metric_history(run.run_id, name)) for name in names
    }
