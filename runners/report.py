"""What a run leaves for its reader: `report.html`, and before it what only the running process knows."""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from analysis.errors import AnalysisError
from analysis.report import write_run_report
from analysis.runs import ENVIRONMENT_FILE, load_run

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"


def record_environment(out: Path, tags: Mapping[str, str], run_id: str | None) -> None:
    """Write code state, versions, device and MLflow run to `environment.json`, as names and texts."""
    started = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    found = {"started": started, **tags} | ({} if run_id is None else {"mlflow.run_id": run_id})
    (out / ENVIRONMENT_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def leave_report(out: Path, previews: Mapping[str, str] | None) -> None:
    """Write `report.html` into the run directory; that it cannot be written is logged and ends no run.

    Args:
        previews: From sample ids to their first words; None shows none.
    """
    try:
        write_run_report(load_run(out), out / REPORT_FILE, previews)
    except (AnalysisError, OSError, ValueError) as error:  # numbers that cannot be drawn, a full disk
        log.error("The report could not be written: %s", error)
