"""`python -m runners.retrain`: its runs are run.py's, it goes on where it ended, and it refuses up front."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from analysis.lists import read_list
from conf.command import CONF_DIR, FAILED, MISTAKE
from runners import cli, retrain, retrain_runs, train
from runners.cli import main as run_py
from runners.memory.estimate import NoEstimateError
from runners.tracking import Tracker
from runners.tracking_record import Record
from tests.runners.conftest import Line
from tests.runners.test_train import saved_config, series, shards, values

# Two runs that give values, two seeds of three runs each.
DIGITS = [
    "experiment=digits", "model.hidden=[8]", "hardware.threads=1", "tracking=none", "trainer.max_steps=6",
    "data.val_samples=80", "engine.val_batch_size=20", "trainer.eval_every=3",
]  # fmt: skip
FEW = ["retrain.score_seeds=[0,1]", "retrain.seeds=[2,3]", "retrain.evaluations=3"]
NAMES = [
    "score/seed-0", "score/seed-1",
    "full/seed-2", "dropped/seed-2", "random-0/seed-2", "full/seed-3", "dropped/seed-3", "random-0/seed-3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "plot_run", lambda _: [])
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def command(line: Line, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """Runs the command's own line in this process and returns the exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(cli, "main", retrain.main)
        try:
            return line(*arguments)
        finally:
            monkeypatch.setattr(cli, "main", run_py)

    return run  # type: ignore[return-value]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished command, made once and read only."""
    folder = tmp_path_factory.mktemp("retrain") / "made"
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "0")  # set by `main`; put back at the end
        patch.setattr(train, "plot_run", lambda _: [])
        patch.setattr(sys, "argv", ["retrain.py", *DIGITS, *FEW, f"hydra.run.dir={folder}"])
        assert retrain.main() == 0
    root.handlers[:], root.level = handlers, level
    return folder


def comparison(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results" / "comparison.json").read_text())
    return found


def test_its_runs_have_the_keys_and_values_of_run_py() -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        mine, other = (OmegaConf.to_container(compose(name)) for name in ("retrain", "config"))
    assert isinstance(mine, dict)
    del mine["retrain"]
    assert mine == other


def test_it_scores_drops_trains_again_and_compares(made: Path) -> None:
    assert (made / "finished.txt").read_text().splitlines() == NAMES
    for name in NAMES:
        assert {path.name for path in (made / name).iterdir()} >= {
            "config.yaml", "run.log", "samples.parquet", "metrics.jsonl",
        }  # fmt: skip
        assert "labels are wrong on purpose" in (made / name / "run.log").read_text()
    found = comparison(made)
    assert (found["metric"], found["baseline"]) == ("test/loss", "full")
    assert [(group["name"], len(group["runs"])) for group in found["groups"]] == [
        ("full", 2), ("dropped", 2), ("random", 2),
    ]  # fmt: skip
    assert [run["run"] for run in found["groups"][2]["runs"]] == ["random-0/seed-2", "random-0/seed-3"]
    assert [(one["group"], one["against"], one["pairs"]) for one in found["contrasts"]] == [
        ("dropped", "full", 2), ("random", "full", 2), ("dropped", "random", 2),
    ]  # fmt: skip


def test_the_lists_are_what_the_runs_were_trained_without(made: Path) -> None:
    results = made / "results"
    dropped = read_list(results / "drop.parquet")
    table = pq.read_table(results / "aggregate" / "values.parquet").to_pydict()
    mean = dict(zip(table["sample_id"], table["value"], strict=True))
    runs = [values(made / name) for name in NAMES[:2]]
    for name, value in mean.items():
        own = [run[name] for run in runs if name in run]
        assert value == pytest.approx(sum(own) / len(own))
    assert len(dropped) == len(mean) // 10
    assert max(mean[name] for name in dropped) <= min(
        value for name, value in mean.items() if name not in dropped
    )
    everyone = trained_on(made / "full/seed-2")
    assert trained_on(made / "dropped/seed-2") == everyone - set(dropped)
    controls = [set(read_list(results / f"random-0-seed-{seed}.parquet")) for seed in (2, 3)]
    assert trained_on(made / "random-0/seed-3") == everyone - controls[1]
    assert controls[0] != controls[1]
    assert len(controls[0]) == len(controls[1]) == len(dropped)


def trained_on(folder: Path) -> set[str]:
    table = pq.read_table(folder / "samples.parquet").to_pydict()
    return {name for name, split in zip(table["sample_id"], table["split"], strict=True) if split == "train"}


def test_its_runs_are_those_of_run_py_to_the_last_bit(made: Path, line: Line, tmp_path: Path) -> None:
    assert line(*DIGITS, "data.test_samples=40", "seed=1", "hydra.run.dir=scored") == 0
    # An experiment that sets keys of one engine goes with no other: the run's own config has its keys.
    assert line(f"experiment={made / 'dropped/seed-3/config.yaml'}", "hydra.run.dir=again") == 0
    again = saved_config(tmp_path / "again")
    assert (again.engine.name, again.seed, again.trainer.eval_every) == ("regular", 3, 2)
    assert again.data.drop == str(made / "results" / "drop.parquet")
    for name, other in (("score/seed-1", "scored"), ("dropped/seed-3", "again")):
        for metric in ("train/loss", "val/loss", "test/loss"):
            assert series(made / name, metric) == series(tmp_path / other, metric) != {}
        configs = [saved_config(folder) for folder in (made / name, tmp_path / other)]
        for one in configs:
            del one["output_dir"]
        assert configs[0] == configs[1]
    assert values(made / "score/seed-1") == values(tmp_path / "scored")
    rows = [shards(folder) for folder in (made / "score/seed-1", tmp_path / "scored")]
    assert all(rows[0][key].equal(rows[1][key]) for key in rows[0])


@pytest.mark.slow
def test_a_killed_command_typed_again_goes_on_where_it_ended(
    command: Line, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = retrain_runs.recorded_run

    def killed(cfg: Any, *arguments: Any) -> Any:
        if cfg.output_dir.endswith("dropped/seed-2"):
            (Path(cfg.output_dir) / "half.txt").write_text("written before the end")
            raise SystemExit(143)
        return recorded(cfg, *arguments)

    monkeypatch.setattr(retrain_runs, "recorded_run", killed)
    assert command(*DIGITS, *FEW, "hydra.run.dir=cut") == 143
    cut = tmp_path / "cut"
    assert (cut / "finished.txt").read_text().splitlines() == NAMES[:3]
    old = {name: (cut / name / "metrics.jsonl").stat().st_mtime_ns for name in NAMES[:3]}

    monkeypatch.setattr(retrain_runs, "recorded_run", recorded)
    assert command(*DIGITS, *FEW, "hydra.run.dir=cut") == 0
    assert {name: (cut / name / "metrics.jsonl").stat().st_mtime_ns for name in NAMES[:3]} == old
    assert (cut / "unfinished" / "dropped-seed-2-0" / "half.txt").read_text() == "written before the end"
    assert (cut / "finished.txt").read_text().splitlines() == NAMES
    assert without_paths(comparison(cut)) == without_paths(comparison(made))


def without_paths(found: dict[str, Any]) -> dict[str, Any]:
    for group in found["groups"]:
        for run in group["runs"]:
            del run["directory"]
    return found


def test_another_config_in_the_same_directory_is_refused_by_name(
    command: Line, made: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made / "results").iterdir()}
    assert command(*DIGITS, *FEW, "optimizer.lr=0.2", f"hydra.run.dir={made}") == MISTAKE
    said = capfd.readouterr().err
    assert "optimizer.lr=0.2 is not what hydra.run.dir=" in said
    assert "type optimizer.lr=0.3, or choose another directory" in said
    assert {path: path.stat().st_mtime_ns for path in (made / "results").iterdir()} == before


def test_a_run_that_fails_fails_the_command_and_leaves_its_traceback(
    command: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no more")

    monkeypatch.setattr(train, "train", broken)
    assert command(*DIGITS, *FEW, "hydra.run.dir=made") == FAILED
    assert "no more" in (tmp_path / "made/score/seed-0/traceback.txt").read_text()


def test_runs_can_be_scored_again_and_compared_on_what_scores_saw(command: Line, tmp_path: Path) -> None:
    keys = ["retrain.engine=scored", "retrain.test_share=0", "layers.families=[other]", "retrain.controls=2"]
    assert command(*DIGITS, *FEW[:1], "retrain.seeds=[5]", *keys, "hydra.run.dir=made") == 0
    folder = tmp_path / "made"
    assert values(folder / "random-1/seed-5")
    found = comparison(folder)
    assert found["metric"] == "val/loss"
    assert any("values are computed against" in note for note in found["notes"])
    assert {one["pairs"] for one in found["contrasts"]} == {1}
    assert {one["low"] for one in found["contrasts"]} == {None}


def test_an_experiment_can_be_a_file(
    command: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n- override /model: mlp\n- override /data: digits\n"
        "trainer: {max_steps: 7}\nretrain: {controls: 3}\n"
    )
    assert command("experiment=mine.yaml", "dry_run=true", "hydra.run.dir=made") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "5 seeds × (full, dropped, 3 random)" in shown
    assert "196" in shown  # steps of 28 runs


def test_a_dry_run_shows_the_plan_and_makes_nothing(
    command: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*DIGITS, *FEW, "dry_run=true", "hydra.run.dir=made") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "2 seeds × (full, dropped, 1 random)",
        "8, one after another",
        "48",
        "40 to score with, 40 to",
    ):
        assert part in shown
    assert not (tmp_path / "made" / "retrain.yaml").exists()


def test_a_dry_run_says_why_there_is_no_estimate(
    command: Line, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise NoEstimateError("memory cannot be estimated: no such value.")

    monkeypatch.setattr("runners.dryrun.estimate_memory", without)
    assert command(*DIGITS, *FEW, "dry_run=true", "hydra.run.dir=made") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "memory of a scored run │ memory cannot be estimated" in shown
    assert "output directory" in shown


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["engine=regular", "experiment=null"], "engine=regular gives no values to choose by"),
        (["verify=true"], "verify=true has no use in runners.retrain: type verify=false"),
        (["trainer.eval_only=true"], "trainer.eval_only=true has no use"),
        (["seed=4"], "seed=4 is no run's seed here"),
        (["data.drop=x.txt"], "data.drop=x.txt does not go with runners.retrain"),
        (["retrain.seeds=[]"], "retrain.seeds=[] must list one or more seeds"),
        (["retrain.score_seeds=[1,1]"], "retrain.score_seeds=[1,1] must list"),
        (["retrain.controls=0"], "retrain.controls=0 is too small"),
        (["retrain.test_share=1"], "retrain.test_share=1.0 is no share"),
        (["retrain.test_share=0.001"], "retrain.test_share=0.001 is no sample of data.val_samples=80"),
        (["retrain.test_share=0.9"], "engine.val_batch_size=20 is more than data.val_samples=80 less"),
        (["retrain.select.k=3"], "retrain.select.k=3 has no effect with method=quantile"),
        (
            ["retrain.select.method=sign", "retrain.select.quantile=null", "retrain.select.negative_share=1",
             "retrain.score_seeds=[0]"],
            "retrain.score_seeds=[0] is one run, and method=sign needs two or more",
        ),
        (["optimizer.lr=-1"], "optimizer.lr=-1.0 must be a number greater than 0"),
        (["+retrain.more=1"], "retrain.more"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_made(
    command: Line, tmp_path: Path, keys: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    start = [] if "experiment=null" in keys else DIGITS
    assert (
        command(*start, *[key for key in keys if key != "experiment=null"], "hydra.run.dir=made") == MISTAKE
    )
    assert said in capfd.readouterr().err
    assert not (tmp_path / "made").exists()


def test_mlflow_shows_the_runs_under_one(
    command: Line, tracked_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    keys = [key for key in DIGITS if key != "tracking=none"]
    one_each = [
        "retrain.score_seeds=[0]",
        "retrain.seeds=[2]",
        "retrain.evaluations=3",
        "tracking.run_name=mine",
    ]
    recorded = retrain_runs.recorded_run

    def killed(cfg: Any, *arguments: Any) -> Any:
        if "dropped" in cfg.output_dir:
            raise SystemExit(143)
        return recorded(cfg, *arguments)

    monkeypatch.setattr(retrain_runs, "recorded_run", killed)
    assert command(*keys, *one_each, "hydra.run.dir=made") == 143
    monkeypatch.setattr(retrain_runs, "recorded_run", recorded)
    assert command(*keys, *one_each, "hydra.run.dir=made") == 0

    client = MlflowClient(f"sqlite:///{tracked_cwd / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("ghostrunner").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert (parent.info.run_name, parent.info.status) == ("mine", "FINISHED")
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert sorted((run.data.tags["retrain.group"], run.info.run_name) for run in children) == [
        ("dropped", "dropped/seed-2"), ("full", "full/seed-2"), ("random-0", "random-0/seed-2"),
        ("score", "score/seed-0"),
    ]  # fmt: skip
    assert "comparison/dropped_against_full/final_loss" in parent.data.metrics
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert names - {"traceback.txt"} == {
        "aggregate",
        "comparison.json",
        "drop.parquet",
        "report.html",
        "random-0-seed-2.parquet",
    }


def test_seeds_that_gave_the_values_are_named(caplog: pytest.LogCaptureFixture) -> None:
    seeds = {"score_seeds": [0, 1, 2], "seeds": [3, 4]}
    retrain.say_shared_seeds(OmegaConf.create({"retrain": seeds}))
    assert not caplog.messages
    retrain.say_shared_seeds(OmegaConf.create({"retrain": seeds | {"seeds": [2, 3]}}))
    assert caplog.messages[0].startswith("retrain.seeds has 2 of retrain.score_seeds")


def test_the_mlflow_run_of_a_killed_attempt_is_ended_by_the_next(
    tracked_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    folder = tracked_cwd / "out" / "full" / "seed-1"
    folder.mkdir(parents=True)
    tracking = {"enabled": True, "uri": None, "experiment": "e", "run_name": None}
    cfg = OmegaConf.create({"output_dir": "", "tracking": tracking | {"upload": True, "upload_large": False}})
    killed = Tracker(cfg.tracking, folder, tracked_cwd, parent_run_id="0" * 32)
    killed.start({}, {})
    replace(Record.read(folder), process_started=0.0).write(folder)  # of a process that is no more
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "train/loss": 2.0}\n')

    def stop(*_: Any) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(retrain_runs, "recorded_run", stop)
    with pytest.raises(SystemExit):
        retrain_runs.Runs(tracked_cwd / "out", tracked_cwd, 1, "0" * 32).made("full", 1, cfg)
    run = MlflowClient(killed.uri).get_run(str(killed.run_id))
    assert (run.info.status, run.data.metrics) == ("KILLED", {"train/loss": 2.0})
