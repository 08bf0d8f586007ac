"""What a run leaves for its reader: `report.html`, and before it what only the running process knows."""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from analysis.errors import AnalysisError
from analysis.report import run_headline, write_run_report
from analysis.runs import ENVIRONMENT_FILE, load_run
from ghost.atomic import written_beside

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"


def record_environment(
    out: Path, tags: Mapping[str, str], run_id: str | None, earlier: Mapping[str, str]
) -> None:
    """Write code state, versions, device and MLflow run to `environment.json`, as names and texts.

    Args:
        earlier: What it said of an unfinished run that this one goes on with; empty for none. That stays,
            with an entry of what is new.
    """
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    found = {"started": now, **tags} | ({} if run_id is None else {"mlflow.run_id": run_id})
    if earlier:
        changed = [f"{name}={text}" for name, text in tags.items() if earlier.get(name, text) != text]
        for line in changed:
            log.warning("%s is new: the last digits of what follows may be others.", line)
        number = 1 + sum(name.startswith("resumed.") for name in earlier)
        found |= {**earlier, f"resumed.{number}": " ".join([now, *changed])}
    with written_beside(out / ENVIRONMENT_FILE) as partial:
        partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def read_environment(directory: Path) -> dict[str, str]:
    """What the run in the directory noted of itself when it started; empty where none has."""
    path = directory / ENVIRONMENT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def leave_report(out: Path, previews: Mapping[str, str] | None) -> None:
    """Write `report.html` into the run directory; that it cannot be written is logged and ends no run.

    Args:
        previews: From sample ids to their first words; None shows none.
    """
    try:
        write_run_report(load_run(out), out / REPORT_FILE, previews)
    except (AnalysisError, OSError, ValueError) as error:  # numbers that cannot be drawn, a full disk
        log.error("The report could not be written: %s", error)


def headline(out: Path) -> str:
    """The run in a few lines of Markdown; empty, with a line in the log, where its files do not give them."""
    try:
        return run_headline(load_run(out))
    except (AnalysisError, OSError, ValueError) as error:
        log.error("The run's description could not be made: %s", error)
        return ""
