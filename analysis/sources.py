"""Where finished runs are: directories, folders of them, MLflow runs, sweeps and experiments."""

import json
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from analysis.errors import AnalysisError
from analysis.runs import CONFIG_FILE, ENVIRONMENT_FILE, Run, load_run
from analysis.tracking_store import (
    missing_database,
    one_line,
    prepare_mlflow,
    resolve_uri,
    sqlite_path,
    without_password,
)
from conf.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.entities import Run as TrackedRun
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

PARENT = "mlflow.parentRunId"
"""The tag with the id of the run that a run is shown under."""

_PAGE = 1000  # runs a request
_WEIGHTS = "model"  # the one artifact that no analysis reads, and the largest


@contextmanager
def open_runs(names: Sequence[str], uri: str | None, cwd: Path) -> Iterator[list[Run]]:
    """The runs that the names stand for, each once, in the order of the names.

    Runs whose artifacts are not on this machine are downloaded, and removed at the end of the block.

    Args:
        names: Each is a run directory; a folder with run directories anywhere below, such as a sweep's; the
            id of an MLflow run, also as `runs:/ID`, which stands for its finished children where it has some;
            or the name of an MLflow experiment, which stands for its finished runs.
        uri: The tracking store, as `tracking.uri`; None: `mlflow.db` in `cwd`.
        cwd: What relative paths are relative to.

    Raises:
        AnalysisError: A name is none of these, or a run's artifacts are not to be had.
        ConfigError: The tracking store cannot be read, or is given and not needed.
    """
    with tempfile.TemporaryDirectory(prefix="ghostrunner-") as downloads:
        refuse_idle_store(uri, [cwd / name for name in names])
        runs: dict[Path, Run] = {}
        for name in names:
            path = cwd / name
            found = _below(path) if path.is_dir() else _tracked(name, uri, cwd, Path(downloads))
            for run in found:
                runs.setdefault(run.directory.resolve(), run)
        yield _with_own_names(list(runs.values()))


def refuse_idle_store(uri: str | None, paths: Sequence[Path]) -> None:
    """Raises `ConfigError` for a tracking store that nothing is looked for in."""
    if uri is not None and paths and all(path.exists() for path in paths):
        raise ConfigError(
            f"tracking.uri={without_password(uri)} has no effect, since {paths[0]} is on this machine: leave "
            "it out, or type an MLflow run id or experiment"
        )


def _below(folder: Path) -> list[Run]:
    """The run in a directory, or all runs below it, in the order of their paths."""
    if (folder / CONFIG_FILE).is_file():
        return [load_run(folder)]
    found = []
    for path, folders, files in os.walk(folder):
        # Hydra keeps a config.yaml of its own in .hydra.
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_natural)
        if CONFIG_FILE in files:
            found.append(load_run(Path(path)))
            folders.clear()  # what lies in a run is not another run
    if not found:
        raise AnalysisError(f"{folder} holds no run: a run directory has a {CONFIG_FILE}.")
    return found


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts 2 before 10, as the jobs of a sweep are numbered."""
    return [
        (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)
    ]


def _with_own_names(runs: list[Run]) -> list[Run]:
    """The runs, each with a name that no other has: as much of its path or id as that takes."""
    names = [run.name for run in runs]
    for length in range(2, 2 + max((len(run.directory.parts) for run in runs), default=0)):
        often = Counter(names)
        names = [
            _longer_name(run, length) if often[name] > 1 else name
            for run, name in zip(runs, names, strict=True)
        ]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _longer_name(run: Run, length: int) -> str:
    if run.run_id is not None:
        return f"{run.name} {run.run_id[:8]}"
    return "/".join(run.directory.absolute().parts[-length:])


# ---------------------------------------------------------------- MLflow


def _tracked(name: str, uri: str | None, cwd: Path, downloads: Path) -> list[Run]:
    """The runs that MLflow knows by this name."""
    address = resolve_uri(uri, cwd)
    if database := missing_database(address):
        raise AnalysisError(
            f"{name} is no directory, and there is no tracking store {database} to find it in: give a run "
            "directory, or tracking.uri=STORE"
        )
    prepare_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=address)
        return [_open(run, client, downloads) for run in _find(name, client, without_password(address))]
    except MlflowException as error:
        raise AnalysisError(
            f"{name} cannot be read from {without_password(address)} ({one_line(error)}): give a run "
            "directory, "
            "or another tracking.uri=STORE"
        ) from error


def _find(name: str, client: "MlflowClient", address: str) -> list["TrackedRun"]:
    run_id = name.removeprefix("runs:/").rstrip("/")
    if re.fullmatch(r"[0-9a-f]{32}", run_id):
        run = client.get_run(run_id)
        children = _search(client, [run.info.experiment_id], f"tags.`{PARENT}` = '{run_id}'")
        return _finished(children, f"run {run_id}", address) if children else [run]
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise AnalysisError(
            f"{name} is no directory, no MLflow run id, and no experiment in {address}: give one of these"
        )
    runs = _search(client, [experiment.experiment_id], "")
    parents = {run.data.tags.get(PARENT) for run in runs}
    own = [run for run in runs if run.info.run_id not in parents]  # a sweep's parent trained nothing itself
    return _finished(own, f"experiment {name}", address)


def _finished(runs: list["TrackedRun"], source: str, address: str) -> list["TrackedRun"]:
    """Those that came to their end; the others are counted in a warning."""
    finished = [run for run in runs if run.info.status == "FINISHED"]
    if len(finished) < len(runs):
        log.warning(
            "%d of %d runs of %s have not finished, or failed: they are left out.",
            len(runs) - len(finished),
            len(runs),
            source,
        )
    if not finished:
        raise AnalysisError(f"{source} in {address} has no finished run: train some first")
    return finished


def _search(client: "MlflowClient", experiments: list[str], condition: str) -> list["TrackedRun"]:
    """All runs that meet the condition, oldest first."""
    found: list[TrackedRun] = []
    token = None
    while True:
        page = client.search_runs(
            experiments, condition, order_by=["start_time ASC"], max_results=_PAGE, page_token=token
        )
        found += page
        if not (token := page.token):
            return found


def _open(run: "TrackedRun", client: "MlflowClient", downloads: Path) -> Run:
    """The run's artifacts as a run directory, or the directory itself where they were not uploaded."""
    run_id = run.info.run_id
    name = run.info.run_name or run_id
    for candidate in (_local(run.info.artifact_uri), _directory(run)):
        if candidate is not None and (candidate / CONFIG_FILE).is_file():
            return Run(candidate, name, run_id)
    folder = downloads / run_id
    folder.mkdir()
    for artifact in client.list_artifacts(run_id):
        if artifact.path != _WEIGHTS:
            client.download_artifacts(run_id, artifact.path, str(folder))
    if not (folder / CONFIG_FILE).is_file():
        raise AnalysisError(
            f"MLflow run {run_id} has no artifact {CONFIG_FILE}, and its directory is not on this machine: "
            "give "
            "runs that were trained with tracking.upload=true"
        )
    return Run(folder, name, run_id)


def _directory(run: "TrackedRun") -> Path | None:
    """Where the run wrote its files; None where this is not known, or another run's files are there now."""
    folder = Path(run.data.params.get("output_dir", ""))
    if not folder.is_absolute() or not (folder / ENVIRONMENT_FILE).is_file():
        return None
    try:
        made_by = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8")).get("mlflow.run_id")
    except ValueError:
        return None
    return folder if made_by == run.info.run_id else None


def directory_of_tracked(run_id: str, address: str) -> Path:
    """Where the MLflow run of this id writes its files, on this machine.

    Args:
        address: The tracking store, resolved.

    Raises:
        ConfigError: The store has no such run, or the directory is not here.
    """
    database = sqlite_path(address)
    shown = without_password(address)
    if database is not None and not database.exists():  # MLflow would make an empty store and look in it
        raise ConfigError(f"run {run_id}: there is no tracking store {database}, give tracking.uri=STORE")
    prepare_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        run = MlflowClient(tracking_uri=address).get_run(run_id)
    except MlflowException as error:
        raise ConfigError(
            f"run {run_id} is not in {shown} ({one_line(error)}): give the id of a run in it, or "
            "tracking.uri=STORE"
        ) from error
    directory = _directory(run)
    if directory is None:
        raise ConfigError(
            f"run {run_id} of {shown} wrote to {run.data.params.get('output_dir')}, which is not on this "
            "machine or holds another run now: go on where it is"
        )
    return directory


def _local(uri: str) -> Path | None:
    """The folder of an artifact address on this machine; None for any other."""
    parsed = urlparse(uri)
    return Path(unquote(parsed.path)) if parsed.scheme in ("", "file") else None
