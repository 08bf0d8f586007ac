"""`run.py` as users start it, alone and under torchrun: killed in the middle, gone on with by `resume=`."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.runners.resume.harness import ROOT, assert_same_runs

STEPS = 90
RUN = [
    "model=gpt2-tiny", "data=interpreter", "data.tokenizer=bytes", "model.config.vocab_size=256",
    "data.train_samples=64", "data.val_samples=8", "data.seq_len=32", "trainer.batch_size=2",
    f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=4", "trainer.gradient_accumulation_steps=2",
    "tracking=none", "hardware.threads=1", "hardware.device=cpu",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
LAUNCHES = {
    "alone": ([sys.executable], []),
    "ddp": (TORCHRUN, ["hardware=ddp"]),
    "fsdp": (TORCHRUN, ["hardware=fsdp"]),
}


def started(launch: str, folder: Path, *keys: str) -> subprocess.Popen[str]:
    command, own = LAUNCHES[launch]
    strategy = [] if keys[0].startswith("resume=") else [*RUN, *own]
    return subprocess.Popen(
        [*command, str(ROOT / "run.py"), *strategy, *keys],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def end_after(process: subprocess.Popen[str], run: Path, steps: int, number: signal.Signals) -> None:
    """Signal the command and all that it has started, some time after so many steps."""
    while steps_done(run) < steps:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    # torchrun passes a SIGTERM on; its workers are in sessions of their own and outlive its death.
    workers = psutil.Process(process.pid).children(recursive=True) if number is signal.SIGKILL else []
    process.send_signal(number)
    for worker in workers:
        worker.send_signal(number)
    process.communicate(timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("launch", list(LAUNCHES))
def test_commands_that_are_killed_go_on(launch: str, tmp_path: Path) -> None:
    draw = random.Random(launch)
    finish(started(launch, tmp_path, "hydra.run.dir=whole"))
    run = tmp_path / "killed"
    end_after(started(launch, tmp_path, f"hydra.run.dir={run}"), run, draw.randint(5, 12), signal.SIGKILL)
    end_after(started(launch, tmp_path, f"resume={run}"), run, draw.randint(14, 24), signal.SIGTERM)
    assert not (run / "finished.json").exists()
    finish(started(launch, tmp_path, f"resume={run}"))
    assert_same_runs(tmp_path / "whole", run)
