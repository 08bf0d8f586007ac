"""Sweeps through submitit on a real SLURM: what comes of jobs that end well, fail, or are ended."""

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from conf.command import FAILED, INTERRUPTED

pytestmark = pytest.mark.slow

RUN_PY = Path(__file__).resolve().parents[2] / "run.py"
SHORT = (
    *("model=mlp", "data=digits", "optimizer=sgd", "hardware.threads=1", "trainer.overhead_probes=0"),
    *("trainer.batch_size=8", "engine.val_batch_size=8", "trainer.max_steps=4", "tracking.upload=false"),
    *("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.sweep.dir=sweep"),
)
ENDLESS = "trainer.max_steps=1000000"
PATIENCE = 240.0  # seconds; four jobs that start at once share two CPUs with other tests


@pytest.fixture
def folder(tmp_path: Path, ready_store: Path) -> Path:
    """Where sweeps are typed; it has a tracking store."""
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    return tmp_path


Sweep = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def sweep(folder: Path, slurm: dict[str, str]) -> Iterator[Sweep]:
    """Starts a sweep; its jobs are cancelled when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, str(RUN_PY), "-m", *SHORT, *arguments]
        started.append(
            subprocess.Popen(
                command, cwd=folder, env=slurm, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
        return started[-1]

    yield start
    subprocess.run(["scancel", "--user=root"], env=slurm, check=True)
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def tracked(folder: Path) -> tuple[Run, list[Run]]:
    """The sweep's parent run and the runs below it."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ghostrunner")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1
    return parent, children


def statuses(folder: Path) -> list[str]:
    """The closing table's column."""
    with (folder / "sweep" / "summary" / "jobs.csv").open(encoding="utf-8") as file:
        return [row["status"] for row in csv.DictReader(file)]


def until(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    """Waits for the condition while the sweep runs."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.2)


def steps_logged(folder: Path, job: int = 0) -> int:
    path = folder / "sweep" / str(job) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def only_job(slurm: dict[str, str]) -> str:
    """The id of the one job that SLURM has."""
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i"],
        env=slurm,
        capture_output=True,
        text=True,
        check=True,
    )
    (job,) = done.stdout.split()
    return job


def control(slurm: dict[str, str], *command: str) -> None:
    subprocess.run(command, env=slurm, check=True)


def test_a_sweep_of_four_jobs_is_one_parent_with_four_runs(folder: Path, sweep: Sweep) -> None:
    process = sweep("seed=0,1", "optimizer.lr=0.1,0.2")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    parent, children = tracked(folder)
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"seed": "0,1", "optimizer.lr": "0.1,0.2"}
    assert sorted((run.data.params["seed"], run.data.params["optimizer.lr"]) for run in children) == [
        *(("0", "0.1"), ("0", "0.2"), ("1", "0.1"), ("1", "0.2")),
    ]
    assert {run.info.status for run in children} == {"FINISHED"}
    assert statuses(folder) == ["finished"] * 4
    assert "4 jobs: 4 finished" in output


def test_a_failed_job_is_failed_everywhere(folder: Path, sweep: Sweep) -> None:
    process = sweep("engine.val_sets=domain", "engine.val_batch_size=8,64")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0, output
    assert statuses(folder) == ["finished", "failed"]
    assert "job 1 failed: engine.val_batch_size=64 is more than" in output
    assert "engine.val_batch_size=64 is more than" in (folder / "sweep" / "1" / "run.log").read_text()
    parent, children = tracked(folder)
    assert parent.info.status == "FAILED"
    assert {run.data.params["engine.val_batch_size"]: run.info.status for run in children} == {
        "8": "FINISHED",
        "64": "FAILED",
    }
    (said,) = (folder / "sweep" / ".submitit").glob("*_1/*_log.err")
    assert "completed successfully" not in said.read_text()


def test_a_cancelled_job_is_killed_everywhere(folder: Path, sweep: Sweep, slurm: dict[str, str]) -> None:
    process = sweep(ENDLESS, "seed=0")
    until(lambda: steps_logged(folder) > 3, process)
    control(slurm, "scancel", only_job(slurm))
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == FAILED, output
    assert "job 0 killed: SLURM says CANCELLED" in output
    assert statuses(folder) == ["killed"]
    parent, (child,) = tracked(folder)
    assert child.info.status == "KILLED"
    assert parent.info.status == "FAILED"


def test_an_interrupted_sweep_ends_its_jobs(folder: Path, sweep: Sweep, slurm: dict[str, str]) -> None:
    process = sweep(ENDLESS, "seed=0,1")
    until(lambda: steps_logged(folder, 0) > 3 and steps_logged(folder, 1) > 3, process)
    control(slurm, "kill", "-INT", str(process.pid))
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == INTERRUPTED, output
    assert statuses(folder) == ["killed", "killed"]
    parent, children = tracked(folder)
    assert [run.info.status for run in (parent, *children)] == ["KILLED"] * 3
    running = subprocess.run(["squeue", "--noheader"], env=slurm, capture_output=True, text=True, check=True)
    assert not running.stdout


@pytest.mark.parametrize(
    "preemption",
    [("scancel", "--signal=USR2"), ("scontrol", "requeue")],
    ids=["a signal before the end", "at once"],
)
def test_a_preempted_job_goes_on_in_its_directory_and_run(
    preemption: Sequence[str], folder: Path, sweep: Sweep, slurm: dict[str, str]
) -> None:
    process = sweep("trainer.max_steps=1500", "trainer.eval_every=50", "seed=0")
    until(lambda: steps_logged(folder) > 20, process)
    environment = folder / "sweep" / "0" / "environment.json"
    run_id = json.loads(environment.read_text())["mlflow.run_id"]
    job = only_job(slurm)
    control(slurm, *preemption, job)
    until(lambda: has_restarted(slurm, job), process)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert statuses(folder) == ["finished"]
    parent, (child,) = tracked(folder)
    assert (child.info.run_id, child.info.status, parent.info.status) == (run_id, "FINISHED", "FINISHED")


def test_two_processes_of_one_job_are_one_run(folder: Path, sweep: Sweep) -> None:
    process = sweep("hardware=slurm_cpu_ddp", "hardware.threads=1", "seed=0")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert statuses(folder) == ["finished"]
    assert len(list((folder / "sweep" / "0" / "scores").glob("shard-00000-rank0000[01].pt"))) == 2
    parent, (child,) = tracked(folder)
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")


def has_restarted(slurm: dict[str, str], job: str) -> bool:
    """Whether the job has run a second time; SLURM would hold it back for two minutes."""
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=slurm, capture_output=True)
    command = ["scontrol", "show", "job", job]
    shown = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stdout
    return "Restarts=1" in shown and "JobState=RUNNING" in shown


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (
            "hydra.launcher.partition=nowhere",
            "SLURM does not take the sweep: invalid partition specified: nowhere",
        ),
        ("hydra.launcher.gpus_per_node=3", "SLURM does not take the sweep: "),
    ],
)
def test_a_request_that_slurm_cannot_meet_is_one_sentence(
    request_: str, said: str, sweep: Sweep, folder: Path
) -> None:
    process = sweep("seed=0,1", "tracking=none", request_)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert said in output
    assert "Traceback" not in output
    assert not (folder / "sweep" / "0" / "run.log").exists()


def test_a_dry_run_shows_the_script_and_submits_nothing(sweep: Sweep, slurm: dict[str, str]) -> None:
    process = sweep("seed=0,1", "dry_run=true", "hydra.launcher.gpus_per_node=1")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert "#SBATCH --array=0-1%2" in output
    assert "#SBATCH --gpus-per-node=1" in output
    assert output.count("dry run: nothing was trained") == 2
    running = subprocess.run(["squeue", "--noheader"], env=slurm, capture_output=True, text=True, check=True)
    assert not running.stdout
