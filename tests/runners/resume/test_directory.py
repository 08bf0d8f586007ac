"""What a command may do in a directory that has a run: go on with its own, and nothing else."""

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from conf.command import MISTAKE
from tests.runners.resume.harness import DIGITS, Started, assert_same_runs, last_checkpoint, metrics

Start = Callable[..., Started]

RUN = [*DIGITS, "tracking=none"]


def last_line(command: Started, before: int = 0) -> str:
    return command.said[before:].splitlines()[-1]


@pytest.fixture
def killed(start: Start, tmp_path: Path) -> Path:
    """A run that was killed behind its second checkpoint."""
    run = tmp_path / "run"
    command = start(*RUN, "trainer.max_steps=200", "hydra.run.dir=run")
    command.until(lambda: (run / "checkpoints" / "step-00000004").exists())
    command.send(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    return run


def test_one_directory_one_run_one_config(start: Start, tmp_path: Path, killed: Path) -> None:
    other = start(*RUN, "trainer.max_steps=300", "seed=3", "hydra.run.dir=run")
    assert other.wait() == MISTAKE
    said = last_line(other)
    assert "unfinished run with another config, seed=3 (was 0), trainer.max_steps=300 (was 200)" in said

    for what in ("dry_run=true", "verify=true"):
        assert start(*RUN, "trainer.max_steps=200", what, "hydra.run.dir=run").wait() == MISTAKE

    # What decides nothing may change; two at once may not be.
    first = start(f"resume={killed}", "data.num_workers=1", "trainer.checkpoint_every=50")
    first.until(lambda: (killed / "checkpoints" / "step-00000050").exists())
    second = start(f"resume={killed}")
    assert second.wait() == MISTAKE
    assert f"hydra.run.dir={killed} is in use by another process: wait for it or stop it" in second.said
    assert first.wait() == 0, first.said

    assert start(*RUN, "trainer.max_steps=200", "hydra.run.dir=run").wait() == MISTAKE
    assert "holds an earlier run, which has finished: choose another directory" in last_line(first)
    again = start(f"resume={killed}")
    assert again.wait() == MISTAKE
    assert f"the run has finished; to run it again, type experiment={killed}/config.yaml" in last_line(again)

    assert (
        start(*RUN, "trainer.max_steps=200", "hydra.run.dir=whole", "trainer.checkpoint_every=50").wait() == 0
    )
    assert_same_runs(tmp_path / "whole", killed)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    start: Start, tmp_path: Path, killed: Path
) -> None:
    newest = last_checkpoint(killed)
    content = bytearray((newest / "training.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "training.pt").write_bytes(content)
    command = start(f"resume={killed}")
    assert command.wait() == 0
    assert f"The checkpoint {newest} is damaged (training.pt is not what was written)" in command.said
    assert start(*RUN, "trainer.max_steps=200", "hydra.run.dir=whole").wait() == 0
    assert_same_runs(tmp_path / "whole", killed)


def test_without_a_whole_checkpoint_nothing_is_touched(start: Start, killed: Path) -> None:
    for folder in (killed / "checkpoints").glob("step-*"):
        (folder / "rank-00000.pt").unlink()
    before = metrics(killed)
    command = start(f"resume={killed}")
    assert command.wait() == MISTAKE
    assert "has no checkpoint that is whole, so the run cannot go on: restore one" in last_line(command)
    assert metrics(killed) == before


def test_another_number_of_processes_is_refused(start: Start, killed: Path) -> None:
    folder = last_checkpoint(killed)
    facts = json.loads((folder / "checkpoint.json").read_text()) | {"world_size": 2}
    old = hashlib.sha256((folder / "checkpoint.json").read_bytes()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(facts))
    new = hashlib.sha256((folder / "checkpoint.json").read_bytes()).hexdigest()
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(old, new))
    command = start(f"resume={killed}")
    assert command.wait() == MISTAKE
    assert "was written by world_size=2 processes, and this run has world_size=1" in last_line(command)


def test_a_config_or_data_that_were_changed_are_refused(start: Start, killed: Path) -> None:
    config = killed / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("max_steps: 200", "max_steps: 400"))
    command = start(f"resume={killed}")
    assert command.wait() == MISTAKE
    assert f"{config} has been changed since the run's checkpoints were written" in last_line(command)
    config.write_text(text)
    environment = killed / "environment.json"
    environment.write_text(environment.read_text().replace('"data.fingerprint": "', '"data.fingerprint": "0'))
    assert start(f"resume={killed}").wait() == MISTAKE
    assert "have changed since its run was begun" in last_line(command)


def test_a_run_without_a_checkpoint_starts_again_in_its_mlflow_run(
    start: Start, tmp_path: Path, tracked: Path
) -> None:
    run, arguments = tmp_path / "run", [*DIGITS, "trainer.max_steps=60", "trainer.checkpoint_every=null"]
    command = start(*arguments, "hydra.run.dir=run")
    command.until(lambda: len(list((run / "scores").glob("shard-*.pt"))) > 2)
    command.send(signal.SIGKILL)
    command.wait()
    client = MlflowClient(f"sqlite:///{tracked}")
    experiment = client.get_experiment_by_name("ghostrunner")
    assert experiment is not None
    (entry,) = client.search_runs([experiment.experiment_id])

    again = start(f"resume={entry.info.run_id}")
    assert again.wait() == 0, again.said
    assert "unfinished run without a checkpoint: starting again at step 0" in again.said
    (entry,) = client.search_runs([experiment.experiment_id])
    assert entry.info.status == "FINISHED"
    assert start(*arguments, "hydra.run.dir=whole", "tracking=none").wait() == 0
    assert metrics(run) == metrics(tmp_path / "whole")


RESUME_MISTAKES = {
    "resume=nowhere": "resume=nowhere is no directory and no MLflow run id",
    "resume=.": "resume=. holds no run: a run directory has a config.yaml",
    f"resume={'0' * 32}": "there is no tracking store",
}


@pytest.mark.parametrize("argument", RESUME_MISTAKES)
def test_mistakes_in_resume_are_one_sentence(argument: str, start: Start) -> None:
    command = start(argument)
    assert command.wait() == MISTAKE
    assert RESUME_MISTAKES[argument] in command.said
    assert command.said.count("\n") == 1


def test_resume_says_all_that_it_decides_itself(start: Start, killed: Path) -> None:
    for other in ("experiment=digits", "hydra.run.dir=elsewhere", "-m"):
        command = start(f"resume={killed}", other)
        assert command.wait() == MISTAKE
        assert f"resume={killed}" in last_line(command)
