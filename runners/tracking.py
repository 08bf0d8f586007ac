"""One run's record: `metrics.jsonl` beside its other files always, an MLflow run where tracking is on."""

import logging
import shlex
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from omegaconf import DictConfig

from analysis.tracking_store import one_line, resolve_uri, without_password
from conf.errors import ConfigError
from runners.metrics_log import MetricsLog
from runners.mlflow_metrics import MetricsFeed, known_steps
from runners.mlflow_page import DESCRIPTION, default_run_name, run_url, ui_command, ui_tags
from runners.mlflow_run import MlflowRun
from runners.mlflow_sender import Operation, Sender
from runners.mlflow_store import open_store
from runners.resume.signals import ExitOnSignal
from runners.tracking_record import (
    MODEL_FOLDER,
    RECORD_FILE,
    RUNNING,
    STORE_FOLDER,
    Record,
    artifacts_in,
    store_artifact,
)

log = logging.getLogger(__name__)

_NAMED = 4  # of what a store lacks


def build_tracker(
    tracking_cfg: DictConfig,
    output_dir: Path,
    cwd: Path,
    *,
    run_id: str | None = None,
    parent_run_id: str | None = None,
) -> "NullTracker":
    """The tracker that `tracking.enabled` asks for; arguments as for `Tracker`."""
    if not tracking_cfg.enabled:
        return NullTracker(output_dir)
    return Tracker(tracking_cfg, output_dir, cwd, run_id=run_id, parent_run_id=parent_run_id)


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one level with dotted keys, the way they are typed on the command line."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def param_texts(config: Mapping[str, object]) -> dict[str, str]:
    """A flattened config as MLflow keeps it, without the passwords of addresses."""
    return {name: without_password(str(value)) for name, value in config.items()}


class NullTracker:
    """Keeps `metrics.jsonl`, `tracking.json`, and `traceback.txt` of a run that fails, in the run directory.

    A context manager around the run. A termination signal inside the block becomes SystemExit, so that
    whatever the run holds open is written and closed as after any other exception.
    """

    run_id: str | None = None

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._metrics = MetricsLog(output_dir)
        self._record: Record | None = None
        self._scope = ExitStack()
        self._exit_on_signal = ExitOnSignal()

    def __enter__(self) -> Self:
        self._scope.enter_context(self._exit_on_signal)
        self._scope.callback(self._metrics.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._scope:
            if error is None:
                self.finish()
            elif self._record is not None:
                self._abort(error)
        end = self._exit_on_signal.end
        if error is not None and end is not None and end is not error:
            raise end from error

    def start(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Begin the run with its flattened config and its tags.

        Raises:
            ConfigError: the tracking store cannot be used.
        """
        texts, name = param_texts(params), default_run_name(params, self.output_dir)
        self._begin(Record(texts, {**ui_tags(tags), **tags}, texts.get("tracking.experiment"), name))

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of one step; NaN and infinities are kept as what they are.

        Raises:
            ValueError: a metric is named "step", "time" or "non_finite", which `metrics.jsonl` needs.
        """
        self._metrics.append(step, {name: float(value) for name, value in values.items()})

    def metrics_bytes(self) -> int:
        """Length of `metrics.jsonl`, whose lines are safe on disk."""
        return self._metrics.safe_bytes()

    def go_back(self, metrics_bytes: int) -> None:
        """Cut `metrics.jsonl` to an earlier length; the tracking store keeps what it has."""
        self._metrics.go_back(metrics_bytes)

    def describe(self, text: str) -> None:
        """Give the run a description, in Markdown."""
        self._begun().tags[DESCRIPTION] = text

    def add_tags(self, tags: Mapping[str, str]) -> None:
        """Tag the run with what turned out only after its start; tags of the same names are replaced."""
        self._begun().tags.update(tags)

    def log_artifacts(self, directory: Path) -> None:
        """Copy a directory's files to the run's artifacts, but for checkpoints, stores of projections and,
        unless `tracking.upload_large` asks for them, saved weights.
        """
        self._begun().add_artifacts(directory, self.output_dir)

    def log_store(self, directory: Path) -> None:
        """Copy a store's manifest to the artifacts' folder `projections`; with `tracking.upload_large` all
        of it.
        """
        self._begun().add_store(directory, self.output_dir)

    def finish(self) -> None:
        """End the run as FINISHED; a second call does nothing."""
        if self._record is not None and self._record.status == RUNNING:
            self._end(self._record, "FINISHED", None)

    def ui_command(self) -> str | None:
        """The shell command that serves the run's page; None where a server does, or nothing is tracked."""
        return None

    def run_url(self) -> str | None:
        """The address of the run's page; None before `start` and where nothing is tracked."""
        return None

    def _begin(self, record: Record) -> None:
        self._record = record
        record.write(self.output_dir)
        (self.output_dir / "traceback.txt").unlink(missing_ok=True)  # of an attempt that this one mends

    def _begun(self) -> Record:
        if self._record is None:
            raise RuntimeError("Tracker.start comes before anything is logged")
        return self._record

    def _end(self, record: Record, status: str, error: BaseException | None) -> None:
        """Note the end on disk, whatever becomes of the store."""
        record.end(status, None if error is None else one_line(error))
        try:
            record.write(self.output_dir)
        except OSError as refused:  # a full disk may be what ended the run: its error must still get through
            log.error("%s could not be written: %s", RECORD_FILE, refused)

    def _abort(self, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        try:
            (self.output_dir / "traceback.txt").write_text(text, encoding="utf-8")
        except OSError as refused:
            log.error("traceback.txt could not be written: %s", refused)
        stopped = self._exit_on_signal.end is not None or isinstance(error, KeyboardInterrupt | SystemExit)
        self._end(self._begun(), "KILLED" if stopped else "FAILED", error)


class Tracker(NullTracker):
    """The same record, and an MLflow run beside it.

    The run ends as FINISHED, as FAILED with the traceback as artifact `traceback.txt` and the tag `error`,
    or as KILLED on SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C and SystemExit. MLflow is imported by `start`, which
    alone waits for the store; after it a thread sends, and only the end waits for that.
    """

    def __init__(
        self,
        tracking_cfg: DictConfig,
        output_dir: Path,
        cwd: Path,
        *,
        run_id: str | None = None,
        parent_run_id: str | None = None,
    ) -> None:
        """Prepare; nothing is opened before `start`.

        Args:
            tracking_cfg: the config's `tracking` node.
            output_dir: the run directory.
            cwd: the directory that the user started from; the default store lies there.
            run_id: an existing run to go on with, instead of a new one.
            parent_run_id: the run that the new one is shown under.

        Raises:
            ConfigError: `tracking.uri` is of no kind that can hold runs.
        """
        super().__init__(output_dir)
        self.uri = resolve_uri(tracking_cfg.uri, cwd)
        self.run_id = run_id
        self._cfg = tracking_cfg
        self._parent_run_id = parent_run_id
        self._run: MlflowRun | None = None
        self._sender: Sender | None = None

    def start(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the store, create the run or take up the given one, and log its params and tags.

        Params longer than 6,000 characters are cut; a resumed run keeps the params that it began with, and
        the metrics that the store has. What `metrics.jsonl` has beyond those is sent as well, so it must be
        cut back to the checkpoint before anything is logged.

        Raises:
            ConfigError: the store cannot be used, or holds no run of the given id.
        """
        texts, tags = param_texts(params), {**ui_tags(tags), **tags}
        name = self._cfg.run_name or default_run_name(params, self.output_dir)
        store = open_store(self.uri, self._cfg.experiment)
        from mlflow.exceptions import MlflowException

        shown = without_password(self.uri)
        try:
            if self.run_id:
                run = MlflowRun.resume(store, self.run_id)
                known = known_steps(run)
            else:
                run, known = MlflowRun.create(store, name, self._parent_run_id), {}
            self.run_id, self._run = run.run_id, run
            self._sender = Sender(Operation("metrics", MetricsFeed(run, self.output_dir, known).send))
            record = Record(
                texts, tags, self._cfg.experiment, run.name, shown, run.run_id, run.parent_run_id,
                self._cfg.upload, self._cfg.upload_large,
            )  # fmt: skip
            self._begin(record)
            run.begin(texts, tags)
        except MlflowException as error:
            raise ConfigError(f"tracking.uri={shown} does not take the run: {one_line(error)}") from error

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of one step; the store gets them every 5 seconds.

        Raises:
            ValueError: a metric is named "step", "time" or "non_finite", which `metrics.jsonl` needs.
        """
        super().log_metrics(step, values)
        self._sending().start()

    def describe(self, text: str) -> None:
        super().describe(text)
        self._sending().add("its description", partial(self._running().set_tags, {DESCRIPTION: text}))

    def add_tags(self, tags: Mapping[str, str]) -> None:
        super().add_tags(tags)
        self._sending().add("its tags", partial(self._running().set_tags, dict(tags)))

    def log_artifacts(self, directory: Path) -> None:
        """Upload a directory's files to the run; with `tracking.upload=false` they stay where they are."""
        super().log_artifacts(directory)
        if not self._cfg.upload:
            log.info("tracking.upload=false: the artifacts stay in %s", directory)
            return
        for path, folder in artifacts_in(directory, self._cfg.upload_large):
            self._upload(path, folder)
        if not self._cfg.upload_large and (directory / MODEL_FOLDER).is_dir():
            log.info("tracking.upload_large=false: the weights stay in %s", directory / MODEL_FOLDER)

    def log_store(self, directory: Path) -> None:
        super().log_store(directory)
        if self._cfg.upload:
            self._upload(store_artifact(directory, self._cfg.upload_large), STORE_FOLDER)

    def ui_command(self) -> str | None:
        """The shell command that serves the run's page on this machine only, with few processes."""
        return ui_command(self.uri)

    def run_url(self) -> str | None:
        """The address of the run's page, on the tracking server or where `ui_command` serves it."""
        run = self._run
        return None if run is None else run_url(self.uri, run.store.experiment_id, run.run_id)

    def _running(self) -> MlflowRun:
        if self._run is None:
            raise RuntimeError("Tracker.start comes before anything is logged")
        return self._run

    def _sending(self) -> Sender:
        if self._sender is None:
            raise RuntimeError("Tracker.start comes before anything is logged")
        return self._sender

    def _upload(self, path: Path, folder: str | None = None) -> None:
        self._sending().add(path.name, partial(self._running().upload, path, folder))

    def _end(self, record: Record, status: str, error: BaseException | None) -> None:
        """Close the run, and wait until the store has all, or has failed for a while."""
        super()._end(record, status, error)
        if error is not None and self._cfg.upload:
            self._upload(self.output_dir / "traceback.txt")
        sender = self._sending()
        sender.add(f"its end as {status}", partial(self._running().end, status, record.error))
        if missing := sender.drain():
            log.error(
                "the tracking store lacks %s of run %s. Nothing is lost: when the store is back, type %s",
                _enumerated(missing),
                self.run_id,
                shlex.join(["python", "-m", "runners.upload", f"run={self.output_dir}"]),
            )


def _enumerated(names: Sequence[str]) -> str:
    """The first few names, and how many there are besides."""
    shown, more = names[:_NAMED], len(names) - _NAMED
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
