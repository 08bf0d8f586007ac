"""A run that is killed again and again ends with the numbers of one that was not."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.runners.resume.harness import DIGITS, Started, assert_same_runs

Start = Callable[..., Started]

KINDS = {
    "adamw, accumulation, warm-up": [
        *DIGITS, "optimizer=adamw", "trainer.gradient_accumulation_steps=2", "trainer.warmup_steps=3",
        "trainer.lr_schedule=cosine", "trainer.clip_grad_norm=0.5",
    ],
    "momentum, separate, every third step": [
        *DIGITS, "optimizer=sgd", "optimizer.momentum=0.9", "engine.val_mode=separate", "engine.val_every=3",
    ],
    "validation rows in turn": [*DIGITS, "engine.val_batch_size=3", "engine.resolution=layer"],
    "dropout": [
        "debug=smoke", "hardware.threads=1", "trainer.max_steps=6", "trainer.checkpoint_every=2",
        "model.config.resid_pdrop=0.3", "model.config.embd_pdrop=0.3",
    ],
    "second order": [*DIGITS, "optimizer=sgd", "engine.val_mode=separate", "engine.order=2"],
    "regular, workers": [*DIGITS, "engine=regular", "data.num_workers=1"],
    "float16": [*DIGITS, "dtype=fp16_mixed"],
}  # fmt: skip


FAST = "validation rows in turn"


@pytest.mark.parametrize(
    "kind", [kind if kind == FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_killed_run_goes_on_bit_for_bit(kind: str, start: Start, tmp_path: Path) -> None:
    arguments = [*KINDS[kind], "tracking=none"]
    whole = start(*arguments, "hydra.run.dir=whole")
    assert whole.wait() == 0, whole.said
    events, draw = whole.changes, random.Random(kind)
    kills = 0
    # A kill may come when all is written: there is nothing to go on with then.
    while not (tmp_path / "killed" / "finished.json").exists():
        run = start(*arguments, "hydra.run.dir=killed", kill_at=draw.randint(2, events))
        status = run.wait()
        assert status in (0, -signal.SIGKILL), run.said
        kills += status != 0
    assert kills
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_kill_right_before_any_change_on_disk_loses_nothing(start: Start, tmp_path: Path) -> None:
    arguments = [*DIGITS, "tracking=none", "engine.resolution=layer"]  # shards with a second file
    whole = start(*arguments, "hydra.run.dir=whole")
    assert whole.wait() == 0
    for change in range(1, whole.changes + 1):
        run = f"killed{change}"
        assert start(*arguments, f"hydra.run.dir={run}", kill_at=change).wait() == -signal.SIGKILL
        if not (tmp_path / run / "finished.json").exists():
            again = start(*arguments, f"hydra.run.dir={run}")
            assert again.wait() == 0, again.said
        assert_same_runs(tmp_path / "whole", tmp_path / run)


@pytest.mark.slow
def test_signals_at_any_time_and_the_same_command_again(start: Start, tmp_path: Path, tracked: Path) -> None:
    """As a scheduler does it: the same command in the same directory, until it is done."""
    draw = random.Random(0)
    arguments = [
        "debug=smoke", "hardware.threads=1", "trainer.max_steps=30", "trainer.checkpoint_every=3",
        "trainer.flush_every=4", "model.config.attn_pdrop=0.2", "optimizer=sgd", "optimizer.momentum=0.9",
    ]  # fmt: skip
    run, ends = tmp_path / "killed", []
    while not ends or ends[-1] != 0:
        goal = lines(run) + draw.randint(4, 12)
        command = start(*arguments, "hydra.run.dir=killed")
        if goal < 30:
            command.until(lambda goal=goal: lines(run) >= goal)
            time.sleep(draw.random() * 0.05)
            command.send(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2]))
        ends.append(command.wait())
        assert ends[-1] in (0, -9, 143, 140), command.said
    assert len(ends) > 2
    whole = start(*arguments, "hydra.run.dir=whole")
    assert whole.wait() == 0
    assert_same_runs(tmp_path / "whole", run)
    client = MlflowClient(f"sqlite:///{tracked}")
    experiment = client.get_experiment_by_name("ghostrunner")
    assert experiment is not None
    assert [found.info.status for found in client.search_runs([experiment.experiment_id])] == ["FINISHED"] * 2


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
