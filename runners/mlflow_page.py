"""How runs look in MLflow's pages: their names, what its own columns show, and how to get there."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis.tracking_store import without_password

_UI_PORT = 5000
_TRAINS = "run"  # run.py: what a run does unless its name says otherwise

DESCRIPTION = "mlflow.note.content"
"""The tag that MLflow shows as a run's description."""


def default_run_name(params: Mapping[str, object], output_dir: Path) -> str:
    """The last two parts of the run directory; of DAY/TIME and of a sweep's DAY/TIME/JOB what comes after the
    day, and what is done with what.
    """
    directory = output_dir.absolute()
    begun, job = time_of(directory), time_of(directory.parent)
    if begun is None and job is None:
        return "/".join(directory.parts[-2:])
    program = Path(sys.argv[0]).stem
    subject = (None if program == _TRAINS else program, params.get("model.name"), params.get("data.kind"))
    return " ".join([begun or f"{job}/{directory.name}", *(str(name) for name in subject if name)])


def sweep_name(keys: Sequence[str], directory: Path) -> str:
    """The last two parts of a sweep's directory; of DAY/TIME the time, and the keys that are swept."""
    begun = time_of(directory.absolute())
    if begun is None:
        return "/".join(directory.absolute().parts[-2:])
    return " ".join([begun, "sweep of", ", ".join(keys)]) if keys else f"{begun} sweep"


def time_of(directory: Path) -> str | None:
    """HH-MM-SS of a directory DAY/TIME, as runs and sweeps are made by default; None for another."""
    dated = re.fullmatch(r"(\d\d-\d\d-\d\d)(-\d+)?", directory.name)
    if dated is None or re.fullmatch(r"\d{4}-\d\d-\d\d", directory.parent.name) is None:
        return None
    return dated[1]


def ui_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """What MLflow's own columns show: who ran which program at which commit."""
    shown = {"mlflow.source.type": "LOCAL", "mlflow.source.name": Path(sys.argv[0]).name}
    commit = tags.get("git.commit")
    return shown | ({} if commit is None else {"mlflow.source.git.commit": commit})


def ui_command(uri: str) -> str | None:
    """The shell command that serves a store's pages on this machine only, with few processes; None for a
    server, which does so itself.
    """
    if uri.startswith("http"):
        return None
    settings = "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
    store = shlex.quote(without_password(uri))
    return f"{settings} mlflow ui --backend-store-uri {store} --workers 1 --host 127.0.0.1 --port {_UI_PORT}"


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page, on the tracking server or where `ui_command` serves it."""
    base = without_password(uri) if uri.startswith("http") else f"http://127.0.0.1:{_UI_PORT}"
    # The query belongs to the page's own router, so it stands behind the #; without it MLflow opens the view
    # for chat traces.
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
