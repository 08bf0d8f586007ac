"""Signals: the step in progress is finished, its state is kept, and the way on is said."""

import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from conf.command import INTERRUPTED
from ghost import ProjectionStore
from runners.resume.signals import StopSignals
from tests.runners.resume.harness import DIGITS, Started, last_checkpoint, metrics

Start = Callable[..., Started]

LONG = [
    *DIGITS, "trainer.max_steps=400", "trainer.eval_every=7", "trainer.checkpoint_every=1000",
    "engine.val_mode=separate", "data.num_workers=1",
]  # fmt: skip
"""So long that a busy machine, too, sends its signal in time."""


def runs_its_steps(run: Path) -> bool:
    """Whether some steps are logged, and some are to come."""
    path = run / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") > 5


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR2, 140)])
def test_a_signal_leaves_a_checkpoint_and_the_same_mlflow_run_goes_on(
    number: signal.Signals, status: int, start: Start, tmp_path: Path, tracked: Path
) -> None:
    run = tmp_path / "run"
    stopped = start(*LONG, "hydra.run.dir=run")
    stopped.until(lambda: runs_its_steps(run))
    stopped.send(number)  # to its loader too, as schedulers do
    assert stopped.wait() == status, stopped.said
    client = MlflowClient(f"sqlite:///{tracked}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "ghostrunner")
    (entry,) = client.search_runs([experiment.experiment_id])
    assert entry.info.status == "KILLED"
    step = int(last_checkpoint(run).name.removeprefix("step-"))
    assert [line["step"] for line in metrics(run)] == list(range(step + 1))

    (command,) = re.findall(r"Go on with: python run.py (.*)", stopped.said)
    went_on = start(*shlex.split(command))
    assert went_on.wait() == 0, went_on.said
    (entry,) = client.search_runs([experiment.experiment_id])
    assert entry.info.status == "FINISHED"
    assert "error" not in entry.data.tags

    whole = start(*LONG, "hydra.run.dir=whole", "tracking=none")
    assert whole.wait() == 0
    assert metrics(run) == metrics(tmp_path / "whole")


def test_ctrl_c_ends_at_once_and_says_the_way_on(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = start(
        *LONG, "tracking=none", "trainer.checkpoint_every=2", "data.num_workers=0", "hydra.run.dir=run"
    )
    command.until(lambda: (run / "checkpoints" / "step-00000004").exists())
    command.send(signal.SIGINT)
    assert command.wait() == INTERRUPTED
    assert f"Go on with: python run.py resume={run}" in command.said
    assert "Traceback" not in command.said


def test_a_signal_before_training_ends_the_run_at_once(start: Start, tmp_path: Path, tracked: Path) -> None:
    command = start(*LONG, "hydra.run.dir=run", "data.num_workers=0")
    command.until(lambda: "training labels" in command.said)
    command.send(signal.SIGUSR2)
    assert command.wait() == 128 + signal.SIGUSR2


def test_a_schedulers_handler_is_called_once_the_state_is_safe() -> None:
    calls: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR2)
            assert signals.noted
            assert not calls
            # The handler of a scheduler ends the process; where it does not, this does.
            with pytest.raises(SystemExit) as end:
                signals.end()
        assert calls == [signal.SIGUSR2]
        assert end.value.code == 128 + signal.SIGUSR2
    finally:
        signal.signal(signal.SIGUSR2, previous)


@pytest.mark.slow
def test_a_projection_stops_on_a_signal_and_goes_on_behind_its_last_shard(
    start: Start, tmp_path: Path
) -> None:
    arguments = [
        "engine=gradprojlora", "model=mlp", "data=digits", "trainer.batch_size=2", "engine.save_every=3",
        "engine.distortion_samples=0", "hardware.threads=1", "tracking=none", "hydra.run.dir=run",
    ]  # fmt: skip
    store = tmp_path / "run" / "projections"
    stopped = start(*arguments)
    stopped.until(lambda: len(list(store.glob("*.npy"))) > 8)
    stopped.send(signal.SIGUSR2)
    assert stopped.wait() == 128 + signal.SIGUSR2, stopped.said
    went_on = start(f"resume={tmp_path / 'run'}")
    assert went_on.wait() == 0, went_on.said
    assert "batches are in the store: going on behind them" in went_on.said
    opened = ProjectionStore.open(store)
    opened.verify()
    assert opened.complete
