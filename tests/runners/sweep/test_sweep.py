"""A sweep in one process: jobs are checked and frozen before the first starts, and told of when all ended."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import runners.sweep.work
from conf.command import FAILED, INTERRUPTED, MISTAKE
from runners.environment import GitState
from tests.runners.conftest import Line
from tests.runners.sweep.conftest import Trained

MODEL = ("model=mlp", "data=digits", "optimizer=sgd", "tracking=none", "hydra.sweep.dir=sweep")
Ends = dict[int, Callable[[], None]]


def fails() -> None:
    raise ValueError("surprise")


def interrupts() -> None:
    raise KeyboardInterrupt


def table(folder: Path = Path("sweep")) -> list[dict[str, str]]:
    with (folder / "summary" / "jobs.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_job_is_in_the_table(line: Line, trained: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    assert line("-m", *MODEL, "seed=3,4") == 0
    assert [cfg.seed for cfg in trained] == [3, 4]
    rows = table()
    assert [(row["job"], row["status"], row["val_loss"]) for row in rows] == [
        ("0", "finished", "3.0"),
        ("1", "finished", "4.0"),
    ]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert rows[1]["overrides"].endswith("seed=4")
    out = capfd.readouterr().out
    assert "2 jobs: 2 finished" in out
    assert "seed=4" in out
    assert "model=mlp │" not in out, "what all jobs share is not repeated in the table"


def test_a_failed_job_fails_the_sweep_and_stops_no_other(
    line: Line, trained: Trained, ends: Ends, capfd: pytest.CaptureFixture[str]
) -> None:
    ends[1] = fails
    assert line("-m", *MODEL, "seed=1,2") == FAILED
    assert [row["status"] for row in table()] == ["failed", "finished"]
    assert "ValueError: surprise" in Path("sweep/0/run.log").read_text()
    assert "job 0 failed: surprise: see" in capfd.readouterr().out


def test_an_interrupted_sweep_ends_there(line: Line, trained: Trained, ends: Ends) -> None:
    ends[1] = interrupts
    assert line("-m", *MODEL, "seed=0,1,2") == INTERRUPTED
    assert [row["status"] for row in table()] == ["finished", "killed", "unstarted"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["seed=0,1", "optimizer.lr=0.1,-1"], "job 1 (seed=0 optimizer.lr=-1): optimizer.lr=-1.0 must be"),
        (["engine.val_batch_size=4,500"], "job 1 (engine.val_batch_size=500): engine.val_batch_size=500 is"),
        (
            ["seed=0,1", "hydra.sweep.subdir=one"],
            "hydra.sweep.subdir=one is the directory of job 0 (seed=0)",
        ),
        (["tracking.experiment=a,b"], "tracking.experiment=a,b would record the jobs in different places"),
    ],
)
def test_what_cannot_work_is_found_before_a_job_starts(
    typed: list[str], said: str, line: Line, trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    assert line("-m", *MODEL, *typed) == MISTAKE
    err = capfd.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not trained
    assert not list(Path("sweep").glob("*/"))


def test_jobs_keep_the_config_that_they_were_submitted_with(
    line: Line, trained: Trained, ends: Ends, tmp_path: Path
) -> None:
    experiment = tmp_path / "mine.yaml"
    experiment.write_text("trainer:\n  max_steps: 5\n")

    def edit() -> None:
        experiment.write_text("trainer:\n  max_steps: 6\n")

    ends[0] = edit
    assert line("-m", *MODEL, "experiment=mine.yaml", "seed=0,1") == 0
    assert [cfg.trainer.max_steps for cfg in trained] == [5, 5]


def test_the_frozen_config_has_every_value_in_place(
    line: Line, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATE", "0.25")
    assert line("-m", *MODEL, "optimizer.lr=${oc.env:RATE}", "seed=7") == 0
    frozen = yaml.safe_load(Path("sweep/0/config.frozen.yaml").read_text())
    assert (frozen["optimizer"]["lr"], frozen["seed"]) == (0.25, 7)
    assert frozen["output_dir"] == "${hydra:runtime.output_dir}"
    (cfg,) = trained
    assert cfg.output_dir == str(Path("sweep/0").absolute())


# ---------------------------------------------------------------- the second time


def test_what_has_finished_is_skipped_and_what_has_failed_runs_again(
    line: Line, trained: Trained, ends: Ends, capfd: pytest.CaptureFixture[str]
) -> None:
    ends[1] = fails
    assert line("-m", *MODEL, "seed=0,1") == FAILED
    ends.clear()
    capfd.readouterr()
    assert line("-m", *MODEL, "seed=0,1") == 0
    assert [cfg.seed for cfg in trained] == [0, 1, 1]
    rows = table()
    assert [row["status"] for row in rows] == ["skipped", "finished"]
    assert rows[0]["val_loss"] == "0.0"
    captured = capfd.readouterr()
    assert "job 0 (seed=0) is skipped: " in captured.out + captured.err


def test_what_has_finished_needs_another_directory_to_run_again(
    line: Line, trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    assert line("-m", *MODEL, "seed=0") == 0
    assert line("-m", *MODEL, "seed=0", "sweep.skip_finished=false") == MISTAKE
    assert "sweep.skip_finished=false would run job 0" in capfd.readouterr().err
    assert len(trained) == 1


def test_a_single_run_has_nothing_to_skip(
    line: Line, trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    assert line("model=mlp", "data=digits", "sweep.skip_finished=false") == MISTAKE
    assert "sweep.skip_finished=false has no effect without -m" in capfd.readouterr().err


def test_a_directory_of_other_runs_is_refused(
    line: Line, trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    assert line("-m", *MODEL, "seed=0,1") == 0
    assert line("-m", *MODEL, "seed=0,2") == MISTAKE
    assert "holds another run where job 1 (seed=2) belongs (seed=2 (was 1))" in capfd.readouterr().err
    assert len(trained) == 2


def test_a_record_without_a_run_is_no_finished_run(line: Line, trained: Trained) -> None:
    assert line("-m", *MODEL, "seed=0") == 0
    Path("sweep/0/config.yaml").unlink()  # as verify=true leaves it
    assert line("-m", *MODEL, "seed=0") == 0
    assert len(trained) == 2


def test_another_commit_is_said(
    line: Line, trained: Trained, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move_on() -> None:
        monkeypatch.setattr(runners.sweep.work, "git_state", lambda _: GitState("b" * 40, False, ""))

    ends[0] = move_on
    assert line("-m", *MODEL, "seed=0,1") == 0
    commit = json.loads(Path("sweep/sweep.json").read_text())["commit"]
    assert "commit" not in Path("sweep/0/run.log").read_text()
    said = Path("sweep/1/run.log").read_text()
    assert f"submitted at commit {commit}; this job runs the code of commit {'b' * 40}" in said


# ---------------------------------------------------------------- launchers


@pytest.mark.slow
def test_jobs_in_parallel_processes(line: Line, capfd: pytest.CaptureFixture[str]) -> None:
    typed = (
        "trainer.max_steps=2",
        "trainer.overhead_probes=0",
        "hardware.threads=1",
        "trainer.eval_only=true",
    )
    parallel = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert line("-m", *MODEL, *typed, *parallel, "seed=0,1") == 0
    rows = table()
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert rows[0]["val_loss"] != rows[1]["val_loss"]
    assert all(math.isfinite(float(row["val_loss"])) for row in rows)


def test_a_launcher_that_keeps_no_record_is_refused(
    line: Line, trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other" / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "ray.yaml").write_text("_target_: hydra_plugins.ray.RayLauncher\n")
    searched = f"hydra.searchpath=[{tmp_path / 'other'}]"
    assert line("-m", *MODEL, searched, "hydra/launcher=ray", "seed=0,1") == MISTAKE
    assert (
        "hydra/launcher=ray keeps no record of a sweep: type one of basic, joblib" in capfd.readouterr().err
    )
    assert not trained


def test_a_dry_run_submits_and_records_nothing(line: Line, capfd: pytest.CaptureFixture[str]) -> None:
    assert line("-m", *MODEL, "seed=0,1", "dry_run=true") == 0
    out = capfd.readouterr().out
    assert out.count("dry run: nothing was trained") == 2
    assert "jobs:" not in out
    assert not Path("sweep/sweep.json").exists()
