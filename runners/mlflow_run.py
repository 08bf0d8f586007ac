"""One MLflow run as the tracker uses it: names and lengths that MLflow takes, batches, a patient queue."""

import logging
import posixpath
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.tracking_store import one_line
from runners.mlflow_store import Store

if TYPE_CHECKING:
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 5.0
_FLUSH_METRICS = 500
_RETRY_SECONDS = 60.0  # after a failed flush: each try against a dead server costs up to a minute
# Limits of MLflow's stores.
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000


class MlflowRun:
    """A run in an open store.

    A store that stops answering never ends the training run: what it did not take is logged as a warning,
    and metrics wait for the next try. `begin` alone raises.
    """

    def __init__(self, store: Store, run_id: str, params: Mapping[str, str]) -> None:
        self.store = store
        self.run_id = run_id
        self._logged_params = params
        self._pending: list[Metric] = []
        self._next_flush = time.monotonic() + _FLUSH_SECONDS
        self._store_failed = False
        self._renamed: set[str] = set()

    @classmethod
    def create(cls, store: Store, name: str, parent_run_id: str | None) -> "MlflowRun":
        """Start a new run, shown under its parent where there is one."""
        tags = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        run = store.client.create_run(store.experiment_id, run_name=name, tags=tags)
        return cls(store, run.info.run_id, {})

    @classmethod
    def resume(cls, store: Store, run_id: str) -> "MlflowRun":
        """Go on with a run that ended or was killed; it keeps the experiment that it was begun in."""
        run = store.client.get_run(run_id)
        store.client.update_run(run_id, status="RUNNING")
        if "error" in run.data.tags:
            store.client.delete_tag(run_id, "error")
        return cls(Store(store.uri, store.client, run.info.experiment_id), run_id, run.data.params)

    def begin(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Log params and tags; a resumed run keeps the params that it began with.

        Raises:
            MlflowException: the store does not take them.
        """
        from mlflow.entities import Param, RunTag

        texts = {self._name(key): self._cut(key, str(value)) for key, value in params.items()}
        new = [Param(name, text) for name, text in texts.items() if name not in self._logged_params]
        for name, old in self._logged_params.items():
            if texts.get(name, old) != old:
                log.warning("the resumed run keeps param %s=%s; it is now %s", name, old, texts[name])
        for first in range(0, len(new), _PARAMS_PER_BATCH):
            self.store.client.log_batch(self.run_id, params=new[first : first + _PARAMS_PER_BATCH])
        self.store.client.log_batch(self.run_id, tags=[RunTag(key, text) for key, text in tags.items()])

    def add_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Queue numbers of one step; every 5 seconds or 500 numbers the queue goes to the store."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)  # milliseconds, MLflow's unit
        self._pending += [Metric(self._name(name), float(v), now, int(step)) for name, v in values.items()]
        full = len(self._pending) >= _FLUSH_METRICS and not self._store_failed
        if full or time.monotonic() >= self._next_flush:
            self.flush()

    def flush(self) -> None:
        """Send the queued metrics now."""
        from mlflow.exceptions import MlflowException

        self._store_failed = False
        try:
            while self._pending:
                self.store.client.log_batch(self.run_id, metrics=self._pending[:_METRICS_PER_BATCH])
                del self._pending[:_METRICS_PER_BATCH]
        except MlflowException as error:
            self._store_failed = True
            log.warning(
                "the tracking store did not take %d metrics; they wait, and are in metrics.jsonl: %s",
                len(self._pending),
                one_line(error),
            )
        self._next_flush = time.monotonic() + (_RETRY_SECONDS if self._store_failed else _FLUSH_SECONDS)

    def upload(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a directory's files, to the run's artifacts, or to a folder of them."""
        from mlflow.exceptions import MlflowException

        send = self.store.client.log_artifacts if path.is_dir() else self.store.client.log_artifact
        try:
            send(self.run_id, str(path), folder)
        except (MlflowException, OSError) as error:
            log.error("not uploaded, but still in %s: %s", path, one_line(error))

    def end(self, status: str, error: BaseException | None = None) -> None:
        """Send what is queued and close the run as FINISHED, FAILED or KILLED, with the tag `error`."""
        from mlflow.exceptions import MlflowException

        self.flush()
        try:
            if error is not None:
                self.store.client.set_tag(self.run_id, "error", one_line(error))
            self.store.client.set_terminated(self.run_id, status)
        except MlflowException as refused:
            log.error("the tracking store still shows run %s as RUNNING: %s", self.run_id, one_line(refused))

    def _name(self, name: str) -> str:
        """The name as MLflow takes it: letters, digits and `_-. :/`, and a plain relative path."""
        allowed = posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name)).lstrip("./")
        if allowed != name and name not in self._renamed:
            self._renamed.add(name)
            log.warning("MLflow does not take the name %s; it is logged there as %s", name, allowed)
        return allowed

    def _cut(self, key: str, text: str) -> str:
        if len(text) > _PARAM_LENGTH:
            log.warning("param %s is cut at %d characters; config.yaml has it whole", key, _PARAM_LENGTH)
        return text[:_PARAM_LENGTH]
