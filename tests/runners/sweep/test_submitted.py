"""What SLURM says, read; the real one is asked in tests/slurm."""

import subprocess
import sys
from pathlib import Path

import pytest

from runners.sweep import submitted
from tests.runners.conftest import Line
from tests.runners.sweep.test_sweep import MODEL, table


@pytest.fixture
def squeue(monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    """What the next `squeue` answers."""
    answer = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    return answer


def test_states_by_job(squeue: subprocess.CompletedProcess[str]) -> None:
    squeue.stdout = "7_0 RUNNING\n7_1 COMPLETED\n8 CANCELLED\n"
    states = submitted.slurm_states(["7_0", "7_1", "8"])
    assert states == {"7_0": "RUNNING", "7_1": "COMPLETED", "8": "CANCELLED"}


def test_jobs_that_slurm_has_forgotten(squeue: subprocess.CompletedProcess[str]) -> None:
    squeue.returncode, squeue.stderr = 1, "slurm_load_jobs error: Invalid job id specified\n"
    assert submitted.slurm_states(["7_0"]) == {}


def test_a_slurm_that_does_not_answer_ends_no_job(
    squeue: subprocess.CompletedProcess[str], caplog: pytest.LogCaptureFixture
) -> None:
    squeue.returncode, squeue.stderr = 1, "slurm_load_jobs error: Unable to contact slurm controller\n"
    assert submitted.slurm_states(["7_0"]) is None
    assert "squeue does not answer, the jobs may go on" in caplog.text


def test_a_machine_without_slurm(
    line: Line, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert line("-m", *MODEL, "hydra/launcher=submitit_slurm", "seed=0,1") == 2
    assert "needs SLURM's sbatch and srun, which are not here" in capfd.readouterr().err


def test_processes_and_tasks_agree(line: Line, capfd: pytest.CaptureFixture[str]) -> None:
    typed = ("hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "seed=0,1")
    assert line("-m", *MODEL, *typed) == 2
    err = capfd.readouterr().err
    assert "hardware.processes=null is not hydra.launcher.nodes × hydra.launcher.tasks_per_node=2" in err


@pytest.mark.slow
def test_jobs_that_submitit_starts_here(line: Line, capfd: pytest.CaptureFixture[str]) -> None:
    short = ("hydra/launcher=submitit_local", "trainer.eval_only=true", "hardware.threads=1")
    assert line("-m", *MODEL, *short, "hardware.device=cpu,cuda") != 0
    assert [row["status"] for row in table()] == ["finished", "failed"]
    assert (
        "job 1 failed: hardware.device=cuda, but PyTorch sees no CUDA device here" in capfd.readouterr().out
    )
