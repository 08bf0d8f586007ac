"""The points of experiments as MLflow has them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import AnalysisError
from analysis.fidelity.plan import planned_seeds
from analysis.fidelity.summary import SEED, Measurement
from analysis.fidelity.tags import COMMITTED, COORDINATES, COURSE, EXPERIMENT, PLANNED, POINT, SETTINGS
from analysis.tracking_store import missing_database, one_line, prepare_mlflow, resolve_uri, without_password

if TYPE_CHECKING:
    from mlflow.entities import Run as TrackedRun
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

_PAGE = 1000  # runs a request
_SHORT = 7  # digits of a commit, as git shows them


@dataclass(frozen=True)
class Found:
    """The points of one experiment at the sizes and of the seeds that its YAML file has.

    Attributes:
        planned: How many points the experiment has.
        left_out: Finished points of other sizes, of sizes that were committed earlier, or of other seeds.
        machines: Where the points were measured, and with what, in words.
        commits: Of the code that measured them, in words.
    """

    measurements: Sequence[Measurement]
    planned: int
    left_out: int
    machines: Sequence[str]
    commits: Sequence[str]


def read_points(uri: str | None, experiment: str, cwd: Path) -> dict[str, Found]:
    """The finished points by experiment, each point's newest run.

    Args:
        uri: The tracking store; None: `mlflow.db` in `cwd`.
        experiment: The MLflow experiment with the runs.

    Raises:
        ConfigError, AnalysisError: The store cannot be read, or has no such experiment.
    """
    address = resolve_uri(uri, cwd)
    if database := missing_database(address):
        raise AnalysisError(f"there is no tracking store {database}: give tracking.uri=STORE")
    prepare_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    shown = without_password(address)
    try:
        client = MlflowClient(tracking_uri=address)
        known = client.get_experiment_by_name(experiment)
        if known is None:
            raise AnalysisError(
                f"experiment={experiment} is not in {shown}: run python -m runners.fidelity first"
            )
        runs = list(_finished_points(client, known.experiment_id))
        names = dict.fromkeys(run.data.tags[EXPERIMENT] for run in runs)
        found = {
            name: _of_one(
                [run for run in runs if run.data.tags[EXPERIMENT] == name], planned_seeds(name), client
            )
            for name in names
        }
    except MlflowException as error:
        raise AnalysisError(
            f"{shown} cannot be read ({one_line(error)}): give another tracking.uri=STORE"
        ) from error
    return {name: one for name, one in found.items() if one is not None}


def _finished_points(client: "MlflowClient", experiment_id: str) -> Iterator["TrackedRun"]:
    """Oldest first."""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], "attributes.status = 'FINISHED'", order_by=["start_time ASC"], max_results=_PAGE,
            page_token=token,
        )  # fmt: skip
        yield from (run for run in page if POINT in run.data.tags)
        if not (token := page.token):
            return


def _of_one(runs: Sequence["TrackedRun"], seeds: Sequence[int], client: "MlflowClient") -> Found | None:
    """The points of one experiment; None where none is at committed sizes and of these seeds."""
    planned = [run for run in runs if int(run.data.params[f"point.{SEED}"]) in seeds]
    committed = [run for run in planned if run.data.tags[COMMITTED] == "true"]
    if not committed:
        return None
    settings = committed[-1].data.tags[SETTINGS]  # sizes that were committed last
    own = [run for run in planned if run.data.tags[SETTINGS] == settings]
    points = {run.data.tags[POINT]: run for run in own}
    return Found(
        [_measurement(run, client) for run in points.values()],
        max(int(run.data.tags[PLANNED]) for run in points.values()),
        len(runs) - len(own),
        list(dict.fromkeys(_machine(run.data.tags) for run in points.values())),
        list(dict.fromkeys(_code(run.data.tags) for run in points.values())),
    )


def _measurement(run: "TrackedRun", client: "MlflowClient") -> Measurement:
    names = run.data.tags[COORDINATES].split(",")
    courses = [name for name in run.data.metrics if name.startswith(COURSE)]
    return Measurement(
        {name: run.data.params[f"point.{name}"] for name in names},
        {name: number for name, number in sorted(run.data.metrics.items()) if name not in courses},
        {name.removeprefix(COURSE): _by_step(run, name, client) for name in courses},
    )


def _by_step(run: "TrackedRun", metric: str, client: "MlflowClient") -> dict[int, float]:
    return {one.step: one.value for one in client.get_metric_history(run.info.run_id, metric)}


def _machine(tags: Mapping[str, str]) -> str:
    return f"{tags['device']}, torch {tags['version.torch']}"


def _code(tags: Mapping[str, str]) -> str:
    commit = tags["git.commit"][:_SHORT]
    return f"{commit} (from a changed working tree)" if tags["git.dirty"] == "true" else commit
