"""A search for hyperparameters: each trial is a job of one sweep."""

import pytest

from tests.runners.conftest import Line
from tests.runners.sweep.conftest import Trained
from tests.runners.sweep.test_sweep import MODEL, table

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install 'ghostrunner[optuna]'")


def test_trials_are_jobs_of_one_sweep(
    line: Line, trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    trials = ("hparams_search=optuna_lr", "hydra.sweeper.n_trials=3")
    assert line(*MODEL, *trials) == 0
    rates = [cfg.optimizer.lr for cfg in trained]
    assert len(set(rates)) == 3
    assert all(1e-3 <= rate <= 1 for rate in rates)
    assert {cfg.trainer.batch_size for cfg in trained} <= {8, 16, 32}
    assert [(row["job"], row["status"]) for row in table()] == [
        *(("0", "finished"), ("1", "finished"), ("2", "finished")),
    ]
    assert "3 jobs: 3 finished" in capfd.readouterr().out
