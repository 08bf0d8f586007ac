"""One run in an MLflow store: names and lengths that MLflow takes, params, tags, files and its end."""

import logging
import posixpath
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from runners.mlflow_store import Store

log = logging.getLogger(__name__)

# Limits of MLflow's stores.
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_NAME_LENGTH = 250
_DIGEST_LENGTH = 12  # of the 36 that MLflow takes: its tables show all of it

_PARENT, _ERROR = "mlflow.parentRunId", "error"  # tags

_RENAMED: set[str] = set()  # names whose change has been logged


class MlflowRun:
    """A run in an open store; all that is asked of it goes to the store at once.

    Every method raises `MlflowException` or `OSError` for what the store does not take.
    """

    def __init__(
        self, store: Store, run_id: str, name: str, parent_run_id: str | None, params: Mapping[str, str]
    ) -> None:
        self.store = store
        self.run_id = run_id
        self.name = name
        self.parent_run_id = parent_run_id
        self._logged_params = params

    @classmethod
    def create(
        cls, store: Store, name: str, parent_run_id: str | None, started: int | None = None
    ) -> "MlflowRun":
        """Start a new run, shown under its parent where there is one; `started` in Unix milliseconds."""
        tags = {_PARENT: parent_run_id} if parent_run_id else {}
        run = store.client.create_run(store.experiment_id, started, tags, name)
        return cls(store, run.info.run_id, name, parent_run_id, {})

    @classmethod
    def resume(cls, store: Store, run_id: str) -> "MlflowRun":
        """Go on with a run that ended or was killed; it keeps the experiment that it was begun in."""
        found = cls.find(store, run_id)
        store.client.update_run(run_id, status="RUNNING")
        if _ERROR in store.client.get_run(run_id).data.tags:
            store.client.delete_tag(run_id, _ERROR)
        return found

    @classmethod
    def find(cls, store: Store, run_id: str) -> "MlflowRun":
        """The run of this id, left as it is."""
        run = store.client.get_run(run_id)
        return cls(
            replace(store, experiment_id=run.info.experiment_id), run_id, run.info.run_name or run_id,
            run.data.tags.get(_PARENT), run.data.params,
        )  # fmt: skip

    def begin(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Log params and tags; a run that has params keeps those."""
        from mlflow.entities import Param

        texts = {mlflow_name(key): _cut(key, str(value)) for key, value in params.items()}
        new = [Param(name, text) for name, text in texts.items() if name not in self._logged_params]
        for name, old in self._logged_params.items():
            if texts.get(name, old) != old:
                log.warning("the resumed run keeps param %s=%s; it is now %s", name, old, texts[name])
        for first in range(0, len(new), _PARAMS_PER_BATCH):
            self.store.client.log_batch(self.run_id, params=new[first : first + _PARAMS_PER_BATCH])
        self.set_tags(tags)
        if "data.kind" in texts and "data.fingerprint" in tags:
            self._set_dataset(texts["data.kind"], tags["data.fingerprint"])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; those of the same names are replaced."""
        from mlflow.entities import RunTag

        self.store.refuse_lost()
        self.store.client.log_batch(self.run_id, tags=[RunTag(key, text) for key, text in tags.items()])

    def _set_dataset(self, kind: str, fingerprint: str) -> None:
        """Name the data in the column that runs can be searched by."""
        from mlflow.entities import Dataset, DatasetInput

        found = Dataset(kind, fingerprint[:_DIGEST_LENGTH], source_type="local", source="{}")
        self.store.client.log_inputs(self.run_id, [DatasetInput(found)])

    def upload(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a directory's files, to the run's artifacts, or to a folder of them."""
        self.store.refuse_lost()
        send = self.store.client.log_artifacts if path.is_dir() else self.store.client.log_artifact
        send(self.run_id, str(path), folder)

    def end(self, status: str, error: str | None, ended: int | None = None) -> None:
        """Close the run as FINISHED, FAILED or KILLED, with the tag `error`; `ended` in Unix milliseconds."""
        self.store.refuse_lost()
        if error is not None:
            self.store.client.set_tag(self.run_id, _ERROR, error)
        self.store.client.set_terminated(self.run_id, status, ended)


def mlflow_name(name: str) -> str:
    """The name as MLflow takes it: 250 letters, digits and `_-. :/` at most, and a plain relative path."""
    allowed = posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name)).lstrip("./")[:_NAME_LENGTH]
    if allowed != name and name not in _RENAMED:
        _RENAMED.add(name)
        log.warning("MLflow does not take the name %s; it is logged there as %s", name, allowed)
    return allowed


def _cut(key: str, text: str) -> str:
    if len(text) > _PARAM_LENGTH:
        log.warning("param %s is cut at %d characters; config.yaml has it whole", key, _PARAM_LENGTH)
    return text[:_PARAM_LENGTH]
