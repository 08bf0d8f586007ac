"""Settings of experiments as their command line composes them, and the command in this process."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from conf.command import CONF_DIR
from runners import cli
from runners.cli import main as run_py
from runners.fidelity import command
from runners.fidelity.config import settings_of
from tests.runners.conftest import Line

TINY_STEP = [
    "fidelity=one_step", "fidelity.permutations=6", "fidelity.warm_up_steps=2", "fidelity.batch_size=4",
    "fidelity.data.train_samples=30", "fidelity.data.tokenizer=bytes", "fidelity.data.seq_len=12",
    "fidelity.model.config.vocab_size=null", "fidelity.model.config.n_embd=8",
    "fidelity.model.config.n_layer=1",
]  # fmt: skip
TINY_LDS = [
    "fidelity=lds", "fidelity.data.val_samples=4", "fidelity.model.hidden=[4]", "fidelity.steps=3",
    "fidelity.runs=1", "fidelity.subsets=4", "fidelity.retrainings=2", "fidelity.projected=16",
]  # fmt: skip


def composed(*overrides: str) -> Any:
    """The settings that the command line has with these overrides."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return settings_of(compose("fidelity", list(overrides)))


@pytest.fixture
def fidelity(line: Line, monkeypatch: pytest.MonkeyPatch) -> Line:
    """Runs `python -m runners.fidelity` in this process and returns the exit code."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(cli, "main", command.main)
        try:
            return line(*arguments)
        finally:
            monkeypatch.setattr(cli, "main", run_py)

    return run
