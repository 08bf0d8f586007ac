"""`python -m runners.fidelity`: points are measured once and recorded; mistakes are refused."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.fidelity.reading import read_points
from conf.command import FAILED, MISTAKE
from runners.fidelity import command
from runners.fidelity.experiment import Measured, Point
from runners.fidelity.lds import LDS
from tests.runners.fidelity.conftest import TINY_LDS, TINY_STEP, composed

Fidelity = Callable[..., int]
OUT = "hydra.run.dir=out"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The points that are measured, in place of the work."""
    names: list[str] = []

    def measure(self: LDS, point: Point, folder: Path) -> Measured:
        names.append(point.name)
        (folder / "on-the-way.txt").write_text("a file")
        metrics = {"lds/first_order": 0.5 + point.seed / 10, "lds/random": 0.0, "spread": 2.0}
        return Measured(metrics, {"table": {"number": [1, 2]}}, {"data.fingerprint": "abc"})

    monkeypatch.setattr(LDS, "measure", measure)
    return names


def test_a_point_leaves_its_numbers_and_is_not_measured_again(
    fidelity: Fidelity, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fidelity=lds", "tracking=none", OUT]
    assert fidelity(*arguments, "fidelity.seeds=[0,1]") == 0
    assert measured == ["seed0", "seed1"]
    folder = Path("out/seed1")
    assert {path.name for path in folder.iterdir()} == {
        "finished.json", "measured.json", "metrics.jsonl", "on-the-way.txt", "run.log", "table.parquet",
        "tracking.json",
    }  # fmt: skip
    record = json.loads((folder / "measured.json").read_text())
    assert record["metrics"]["lds/first_order"] == 0.6
    assert record["facts"] == {"data.fingerprint": "abc"}
    assert json.loads((folder / "tracking.json").read_text())["tags"]["data.fingerprint"] == "abc"
    assert "0.550 ± 0.635" in capsys.readouterr().out  # t-interval of two: 12.7 · 0.05
    assert fidelity(*arguments, "fidelity.seeds=[0,1,2]") == 0
    assert measured == ["seed0", "seed1", "seed2"]


def test_other_settings_are_refused_in_the_same_directory(
    fidelity: Fidelity, measured: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fidelity=lds", "tracking=none", OUT, "fidelity.seeds=[0]"]
    assert fidelity(*arguments) == 0
    assert fidelity(*arguments, "fidelity.lr=0.2") == MISTAKE
    assert "fidelity.lr=0.2 is not what hydra.run.dir=" in capfd.readouterr().err
    assert measured == ["seed0"]


def test_a_number_that_is_none_is_refused_by_name(
    fidelity: Fidelity, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nothing = Measured({"lds/first_order": float("nan")}, {}, {})
    monkeypatch.setattr(LDS, "measure", lambda self, point, folder: nothing)
    assert fidelity("fidelity=lds", "tracking=none", OUT, "fidelity.seeds=[0]") == MISTAKE
    assert "lds/first_order of seed0 is nan: the run diverged" in capfd.readouterr().err
    assert not Path("out/seed0/finished.json").exists()


def test_points_that_mlflow_does_not_have_are_named(fidelity: Fidelity, measured: list[str]) -> None:
    arguments = ["fidelity=lds", OUT, "fidelity.seeds=[0]"]
    assert fidelity(*arguments, "tracking=none") == 0
    assert fidelity(*arguments) == 0
    assert measured == ["seed0"]
    said = Path("out/run.log").read_text()
    assert "1 finished points were measured with tracking=none (seed0 first)" in said


def test_an_unfinished_point_is_done_again(fidelity: Fidelity, measured: list[str]) -> None:
    arguments = ["fidelity=lds", "tracking=none", OUT, "fidelity.seeds=[0,1]"]
    assert fidelity(*arguments) == 0
    Path("out/seed0/finished.json").unlink()
    Path("out/seed0/left-over.txt").write_text("of an earlier attempt")
    assert fidelity(*arguments) == 0
    assert measured == ["seed0", "seed1", "seed0"]
    assert not Path("out/seed0/left-over.txt").exists()


def test_a_damaged_record_is_named(
    fidelity: Fidelity, measured: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fidelity=lds", "tracking=none", OUT, "fidelity.seeds=[0]"]
    assert fidelity(*arguments) == 0
    Path("out/seed0/measured.json").write_text("{")
    assert fidelity(*arguments) == MISTAKE
    assert "seed0 is damaged" in capfd.readouterr().err


def test_a_point_that_fails_keeps_those_before_it(
    fidelity: Fidelity, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["fidelity=lds", "tracking=none", OUT, "fidelity.seeds=[0,1]"]
    whole = LDS.measure

    def fails(self: LDS, point: Point, folder: Path) -> Measured:
        if point.seed == 1:
            raise RuntimeError("broken")
        return whole(self, point, folder)

    with monkeypatch.context() as patch:
        patch.setattr(LDS, "measure", fails)
        assert fidelity(*arguments) == FAILED
    assert "broken" in Path("out/seed1/traceback.txt").read_text()
    assert fidelity(*arguments) == 0
    assert measured == ["seed0", "seed1"]


def test_mlflow_has_a_run_for_the_experiment_and_one_below_it_for_each_point(
    tracked_cwd: Path, fidelity: Fidelity, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fidelity("fidelity=lds", OUT, "fidelity.seeds=[1,2]") == 0
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tracked_cwd / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("ghostrunner-fidelity").experiment_id])
    runs = {run.info.run_name: run for run in found}
    parent = runs.pop(next(name for name in runs if not name.startswith("seed")))
    assert set(runs) == {"seed1", "seed2"}
    for run in runs.values():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["fidelity.experiment"] == "lds"
        assert run.data.params["fidelity.subsets"] == "100"
        assert run.data.tags["data.fingerprint"] == "abc"
    assert runs["seed2"].data.params["point.seed"] == "2"
    artifacts = {one.path for one in client.list_artifacts(runs["seed2"].info.run_id)}
    assert {"measured.json", "table.parquet", "on-the-way.txt"} <= artifacts
    points = read_points(None, "ghostrunner-fidelity", tracked_cwd)["lds"]
    assert (len(points.measurements), points.planned, points.left_out) == (2, 5, 0)
    assert points.measurements[1].coordinates == {"seed": "2"}
    assert points.measurements[1].metrics["lds/first_order"] == pytest.approx(0.7)
    # The same command with more seeds belongs to the same experiment's run.
    assert fidelity("fidelity=lds", OUT, "fidelity.seeds=[1,2,3]") == 0
    assert len(client.search_runs([parent.info.experiment_id])) == 4
    # Other sizes never come to stand on the page.
    assert fidelity("fidelity=lds", "hydra.run.dir=other", "fidelity.lr=0.2", "fidelity.seeds=[1]") == 0
    points = read_points(None, "ghostrunner-fidelity", tracked_cwd)["lds"]
    assert (len(points.measurements), points.planned, points.left_out) == (3, 5, 1)
    with sqlite3.connect(tracked_cwd / "mlflow.db") as store:
        assert store.execute("select count(*) from runs where status = 'RUNNING'").fetchone() == (0,)


def test_what_adds_points_leaves_the_committed_sizes() -> None:
    assert command.at_committed_sizes(["fidelity=lds", "fidelity.seeds=[0]", "jobs=2", "hardware=cuda"])
    assert command.at_committed_sizes(["fidelity=mislabel", "fidelity.ratings=folder"])
    for override in ("fidelity.lr=0.2", "+fidelity.x=1", "model@fidelity.model=mlp", "~fidelity.lr"):
        assert not command.at_committed_sizes(["fidelity=lds", override]), override


def test_the_plan_is_that_of_the_committed_seeds() -> None:
    assert command.planned_points(composed("fidelity=lds", "fidelity.seeds=[0]")) == 5
    assert command.planned_points(composed("fidelity=one_step", "fidelity.seeds=[0,1,2,3,4,5,6]")) == 40
    assert command.planned_points(composed("fidelity=one_step", "fidelity.sgd_lr=[0.1]")) == 20


def test_the_closing_line_goes_on_in_the_directory_that_was_typed(
    fidelity: Fidelity, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fidelity=lds", "tracking=none", "fidelity.seeds=[0]"]
    assert fidelity(*arguments, OUT) == 0
    assert "fidelity=lds tracking=none 'fidelity.seeds=[0]' hydra.run.dir=out" in capsys.readouterr().out
    assert fidelity(*arguments) == 0
    assert "hydra.run.dir" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("jobs=0", "jobs=0 is too small: type jobs=1 or more"),
        ("fidelity.seeds=[]", "fidelity.seeds=[] must list one or more seeds"),
        ("fidelity.seeds=[1,1]", "fidelity.seeds=[1,1] must list one or more seeds"),
        ("fidelity.seeds=[-1]", "fidelity.seeds=[-1] must list one or more seeds"),
        ("fidelity.step=3", "step"),
        ("+fidelity.step=3", "fidelity.step: there is no such key: did you mean fidelity.steps?"),
        (
            "fidelity.name=one_step",
            "fidelity.name=one_step is what tells experiments apart: type fidelity=lds",
        ),
        ("hardware.strategy=ddp", "hardware.strategy=ddp has no use here"),
        ("fidelity=ldss", "lds"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    fidelity: Fidelity, override: str, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fidelity("fidelity=lds", "tracking=none", OUT, override) == MISTAKE
    error = capfd.readouterr().err
    assert why in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_help_names_every_key(fidelity: Fidelity, capfd: pytest.CaptureFixture[str]) -> None:
    assert fidelity("--help") == 0
    text = capfd.readouterr().out
    assert "fidelity.permutations=1000" in text
    assert "random orders that the true values are means over" in text


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(fidelity: Fidelity) -> None:
    arguments = [*TINY_LDS, "tracking=none", "fidelity.seeds=[0,1]"]
    assert fidelity(*arguments, "hydra.run.dir=one") == 0
    assert fidelity(*arguments, "hydra.run.dir=two", "jobs=2") == 0
    for name in ("seed0", "seed1"):
        one, two = (json.loads((Path(out) / name / "measured.json").read_text()) for out in ("one", "two"))
        assert one == two
    assert "Digits: " in Path("two/seed0/run.log").read_text()


@pytest.mark.slow
def test_a_tiny_one_step_runs_to_its_end(fidelity: Fidelity, capfd: pytest.CaptureFixture[str]) -> None:
    assert fidelity(*TINY_STEP, "tracking=none", OUT, "fidelity.seeds=[0]", "fidelity.sgd_lr=[0.1]") == 0
    assert len(list(Path("out").glob("*/finished.json"))) == 4
    assert "linear_utility" in capfd.readouterr().out
