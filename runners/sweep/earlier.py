"""Whether a job of a sweep has been done before: by an earlier call in the same directory, or by any run of
the tracking store's experiment that computes the same.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from analysis.compare.outcomes import VAL_LOSS
from runners.mlflow_store import Store
from runners.report import read_environment
from runners.sweep.jobs import Job
from runners.sweep.record import Status, read_job

FINGERPRINT_TAG = "config.fingerprint"


@dataclass(frozen=True)
class EarlierRun:
    """A finished run: its MLflow id where it has one, final validation loss, directory, and code's commit."""

    run_id: str | None
    loss: float | None
    directory: Path | None
    commit: str | None


def earlier_run(job: Job, store: Store | None) -> EarlierRun | None:
    """The finished run that makes the job superfluous; None where there is none.

    Args:
        store: Where to look for it beside the job's own directory; None: nowhere.
    """
    found = _in_directory(job)
    # What a projection leaves is a store on disk, and MLflow does not say whether that is still there.
    if found is not None or store is None or job.cfg.engine.name == "gradprojlora":
        return found
    return _in_store(job, store)


def _in_directory(job: Job) -> EarlierRun | None:
    record = read_job(job.directory)
    ran = (job.directory / "config.yaml").exists()  # verify=true leaves a record too, and no run
    if record is None or not ran or record.status != Status.finished or record.fingerprint != job.fingerprint:
        return None
    noted = read_environment(job.directory)
    return EarlierRun(noted.get("mlflow.run_id"), record.loss, job.directory, noted.get("git.commit"))


def _in_store(job: Job, store: Store) -> EarlierRun | None:
    found = store.client.search_runs(
        [store.experiment_id],
        filter_string=f"attributes.status = 'FINISHED' and tags.`{FINGERPRINT_TAG}` = '{job.fingerprint}'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    if not found:
        return None
    run = found[0]
    directory = Path(run.data.params.get("output_dir", ""))
    loss = run.data.metrics.get(VAL_LOSS, math.nan)
    return EarlierRun(
        run.info.run_id,
        None if math.isnan(loss) else loss,
        directory if directory.is_dir() else None,
        run.data.tags.get("git.commit"),
    )
