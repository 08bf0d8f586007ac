"""Checkpoints of the real `Trainer`, and what is refused."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl

from ghost.errors import BatchError, GhostConfigError
from ghost.integrations.hf_trainer import GhostTrainer
from tests.ghost.harness import assert_gradients
from tests.ghost.integrations.hf_trainers import (
    ROWS,
    arguments,
    batch_loss,
    is_put_back,
    rows,
    scored_trainer,
    seeded_gpt2,
    shards,
    trained,
)
from tests.ghost.models import tiny_gpt2


def test_going_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Rows and model of a training that was stopped and went on are those of one that was not."""
    train, val = rows(ROWS), rows(3)
    ghost = {"val_every": 2, "save_interval": 1}

    def fresh(out: Path, **given: Any) -> GhostTrainer:
        given = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2} | given
        torch.manual_seed(5)
        return scored_trainer(out, tiny_gpt2(dropout=0.1), train, val, ghost=ghost, **given)

    whole = trained(fresh(tmp_path / "whole"))
    stopping = fresh(tmp_path / "parts")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    stopping.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        stopping.train()
    resumed = fresh(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    expected, found = shards(tmp_path / "whole"), shards(tmp_path / "parts")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert_gradients({name: p.detach() for name, p in resumed.model.named_parameters()}, whole)


def test_a_checkpoint_without_scores_is_refused(tmp_path: Path) -> None:
    train = rows(4)
    given = {"save_strategy": "steps", "save_steps": 1}
    Trainer(model=seeded_gpt2(), args=arguments(tmp_path, **given), train_dataset=train).train()
    trainer = GhostTrainer(
        model=seeded_gpt2(), args=arguments(tmp_path, **given), train_dataset=train, ghost={}, val_data=train
    )
    with pytest.raises(GhostConfigError, match=r"has no ghost\.pt"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        GhostTrainer(
            model=seeded_gpt2(),
            args=arguments(tmp_path / "other"),
            train_dataset=train,
            ghost={},
            val_data=train,
        ).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("given", "ghost", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1"),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size=True"),
        ({"optim": "lomo"}, {}, "optim="),
        ({}, {"val_mode": "concat"}, "val_mode='concat'"),
        ({}, {"engine": "gradprojlora", "val_mode": "concat"}, "engine='gradprojlora'"),
        (
            {"gradient_accumulation_steps": 3},
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2",
        ),
        ({}, {"val_every": 0}, "val_every=0"),
    ],
)
def test_what_cannot_be_right_is_refused(
    tmp_path: Path, given: dict[str, Any], ghost: dict[str, Any], message: str
) -> None:
    with pytest.raises(GhostConfigError, match=message):
        GhostTrainer(
            model=seeded_gpt2(),
            args=arguments(tmp_path, **given),
            train_dataset=rows(2),
            ghost=ghost,
            val_data=rows(2),
        )


def test_a_loss_of_one_s_own_needs_one_for_validation(tmp_path: Path) -> None:
    with pytest.raises(GhostConfigError, match=r"compute_loss_func .* give loss_fn"):
        GhostTrainer(
            model=seeded_gpt2(), args=arguments(tmp_path), train_dataset=rows(2), ghost={}, val_data=rows(2),
            compute_loss_func=batch_loss,
        )  # fmt: skip


def test_an_error_puts_the_model_back(tmp_path: Path) -> None:
    model = seeded_gpt2()
    trainer = GhostTrainer(
        model=model, args=arguments(tmp_path), train_dataset=rows(4), val_data=rows(2),
        ghost={"result_dir": str(tmp_path / "scores")}, manager_kwargs={"nonsense": 1},
    )  # fmt: skip
    with pytest.raises(TypeError, match="nonsense"):
        trainer.train()
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows(4)]
    for train, val in ((unlabelled, rows(2)), (rows(4), unlabelled)):
        with pytest.raises(BatchError, match="has no 'labels'"):
            GhostTrainer(
                model=model, args=arguments(tmp_path), train_dataset=train, ghost={}, val_data=val
            ).train()
        assert is_put_back(model)


@pytest.mark.parametrize("missing", ["transformers", "accelerate.optimizer"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "ghost.integrations.hf_trainer")
    with pytest.raises(ImportError, match=r"pip install 'ghostrunner\[trainer\]'"):
        importlib.import_module("ghost.integrations.hf_trainer")
