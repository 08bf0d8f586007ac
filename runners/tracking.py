"""One run's record: `metrics.jsonl` beside its other files always, an MLflow run where tracking is on."""

import logging
import shlex
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from omegaconf import DictConfig

from analysis.tracking_store import one_line, resolve_uri, without_password
from conf.errors import ConfigError
from runners.metrics_log import MetricsLog
from runners.mlflow_run import MlflowRun
from runners.mlflow_store import open_store
from runners.resume.files import FOLDER as CHECKPOINTS_FOLDER
from runners.resume.names import LOCK_FILE

log = logging.getLogger(__name__)

_UI_PORT = 5000

MODEL_FOLDER, STORE_FOLDER = "model", "projections"
"""Folders of a run directory that are not uploaded with its other files."""


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


class NullTracker:
    """Keeps `metrics.jsonl`, and `traceback.txt` of a run that fails, in the run directory; no MLflow.

    A context manager around the run. A termination signal inside the block becomes SystemExit, so that
    whatever the run holds open is written and closed as after any other exception.
    """

    run_id: str | None = None

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._metrics = MetricsLog(output_dir)
        self._started = False
        self._scope = ExitStack()

    def __enter__(self) -> Self:
        self._scope.enter_context(_termination_as_exit())
        self._scope.callback(self._metrics.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._scope:
            if error is None:
                self.finish()
            elif self._started:
                self._abort(error)

    def start(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Begin the run with its flattened config and its tags.

        Raises:
            ConfigError: the tracking store cannot be used.
        """
        self._started = True

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

    def log_artifacts(self, directory: Path) -> None:
        """Copy a directory's files to the run's artifacts, but for checkpoints, stores of projections and,
        unless `tracking.upload_large` asks for them, saved weights.
        """

    def log_store(self, directory: Path) -> None:
        """Copy a store's manifest to the artifacts' folder `projections`; with `tracking.upload_large` all
        of it.
        """

    def finish(self) -> None:
        """End the run as FINISHED; a second call does nothing."""

    def ui_command(self) -> str | None:
        """The shell command that serves the run's page; None where a server does, or nothing is tracked."""
        return None

    def run_url(self) -> str | None:
        """The address of the run's page; None before `start` and where nothing is tracked."""
        return None

    def _abort(self, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        try:
            (self.output_dir / "traceback.txt").write_text(text, encoding="utf-8")
        except OSError as refused:  # a full disk may be what ended the run: its error must still get through
            log.error("traceback.txt could not be written: %s", refused)


class Tracker(NullTracker):
    """The same record, and an MLflow run beside it.

    The run ends as FINISHED, as FAILED with the traceback as artifact `traceback.txt` and the tag `error`,
    or as KILLED on SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C and SystemExit. MLflow is imported by `start`.
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
        self._ended = False

    def start(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the store, create the run or take up the given one, and log its params and tags.

        Params longer than 6,000 characters are cut; a resumed run keeps the params that it began with.

        Raises:
            ConfigError: the store cannot be used, or holds no run of the given id.
        """
        store = open_store(self.uri, self._cfg.experiment)
        from mlflow.exceptions import MlflowException

        name = self._cfg.run_name or "/".join(self.output_dir.absolute().parts[-2:])
        try:
            if self.run_id:
                self._run = MlflowRun.resume(store, self.run_id)
            else:
                self._run = MlflowRun.create(store, name, self._parent_run_id)
            self.run_id = self._run.run_id
            self._started = True
            self._run.begin(params, tags)
        except MlflowException as error:
            shown = without_password(self.uri)
            raise ConfigError(f"tracking.uri={shown} does not take the run: {one_line(error)}") from error

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of one step; the store gets them every 5 seconds or 500 numbers.

        Raises:
            ValueError: a metric is named "step", "time" or "non_finite", which `metrics.jsonl` needs.
        """
        super().log_metrics(step, values)
        self._running().add_metrics(step, values)

    def log_artifacts(self, directory: Path) -> None:
        """Upload a directory's files to the run; with `tracking.upload=false` they stay where they are."""
        if not self._cfg.upload:
            log.info("tracking.upload=false: the artifacts stay in %s", directory)
            return
        left_out = {STORE_FOLDER, CHECKPOINTS_FOLDER, LOCK_FILE}
        if not self._cfg.upload_large:
            left_out.add(MODEL_FOLDER)
        for path in sorted(directory.iterdir()):
            if path.name not in left_out:
                self._running().upload(path, path.name if path.is_dir() else None)
            elif path.name == MODEL_FOLDER:
                log.info("tracking.upload_large=false: the weights stay in %s", path)

    def log_store(self, directory: Path) -> None:
        if self._cfg.upload:
            what = directory if self._cfg.upload_large else directory / "manifest.json"
            self._running().upload(what, STORE_FOLDER)

    def finish(self) -> None:
        """Send what is pending and end the run as FINISHED; a second call does nothing."""
        if self._started and not self._ended:
            self._running().end("FINISHED")
            self._ended = True

    def ui_command(self) -> str | None:
        """The shell command that serves the run's page on this machine only, with few processes."""
        if self.uri.startswith("http"):
            return None
        settings = "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
        store = shlex.quote(without_password(self.uri))
        return (
            f"{settings} mlflow ui --backend-store-uri {store} --workers 1 --host 127.0.0.1 --port {_UI_PORT}"
        )

    def run_url(self) -> str | None:
        """The address of the run's page, on the tracking server or where `ui_command` serves it."""
        if self._run is None:
            return None
        base = without_password(self.uri) if self.uri.startswith("http") else f"http://127.0.0.1:{_UI_PORT}"
        page = f"experiments/{self._run.store.experiment_id}/runs/{self._run.run_id}"
        # The query belongs to the page's own router, so it stands behind the #; without it MLflow opens the
        # view for chat traces.
        return f"{base}/#/{page}?workflowType=machine_learning"

    def _running(self) -> MlflowRun:
        if self._run is None:
            raise RuntimeError("Tracker.start comes before anything is logged")
        return self._run

    def _abort(self, error: BaseException) -> None:
        super()._abort(error)
        run = self._running()
        if self._cfg.upload:
            run.upload(self.output_dir / "traceback.txt")
        run.end("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED", error)
        self._ended = True


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143), the status that shells give to what signal 15 ended; and so SIGUSR1
    and SIGUSR2 where no scheduler's handler takes them.
    """
    # Python hands signals to the main thread alone, and lets no other set a handler.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    idle = [n for n in (signal.SIGUSR1, signal.SIGUSR2) if signal.getsignal(n) is signal.SIG_DFL]
    previous = {number: signal.signal(number, _exit_on_signal) for number in (signal.SIGTERM, *idle)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt the ending that this one starts.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
