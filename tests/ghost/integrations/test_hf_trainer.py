"""The real `Trainer`, held against a training written out by hand, one backward a sample, in float64."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from ghost import GhostEngineManager
from ghost.integrations.hf_trainer import GhostTrainer
from tests.ghost import reference
from tests.ghost.harness import assert_near
from tests.ghost.integrations.hf_trainers import (
    ROWS,
    arguments,
    assert_replayed,
    drawn_rows,
    is_put_back,
    rows,
    scored_trainer,
    seeded_gpt2,
    shards,
    stacked,
    trained,
)
from tests.ghost.models import tiny_gpt2

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_scores_and_training_are_those_of_a_training_by_hand(tmp_path: Path, accumulation: int) -> None:
    torch.manual_seed(1)
    train, val, by_hand = rows(ROWS), rows(3), tiny_gpt2()
    model = tiny_gpt2()
    model.load_state_dict(by_hand.state_dict())
    trainer = scored_trainer(tmp_path, model, train, val, gradient_accumulation_steps=accumulation)
    trainer.train()
    found = shards(tmp_path)
    epoch = found["sample"].reshape(2, ROWS)
    assert epoch.sort(1).values.tolist() == [list(range(ROWS))] * 2
    assert epoch[0].tolist() != epoch[1].tolist() != list(range(ROWS))  # shuffled
    assert len(found["step"].unique()) == {1: 10, 3: 4}[accumulation]  # 5 micro-batches an epoch: 3, then 2
    assert_replayed(by_hand, model, train, val, found, max_norm=0.05)
    assert is_put_back(model)


@pytest.mark.parametrize(("bitwise", "bf16"), [(True, False), (True, True), (False, False)])
def test_training_is_what_it_was(tmp_path: Path, bitwise: bool, bf16: bool) -> None:
    train, val = rows(ROWS), rows(3)
    given: dict[str, Any] = {
        "optim": "adamw_torch" if bitwise else "sgd", "learning_rate": 0.01, "lr_scheduler_type": "cosine",
        "warmup_steps": 2, "bf16": bf16, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0,
        "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    plain = Trainer(
        model=seeded_gpt2(),
        args=arguments(tmp_path / "plain", **given),
        train_dataset=train,
        eval_dataset=val,
    )
    expected = trained(plain)  # making a Trainer seeds, training does not
    scored = GhostTrainer(
        model=seeded_gpt2(), args=arguments(tmp_path / "scored", **given), train_dataset=train,
        eval_dataset=val, ghost={"bitwise": bitwise}, val_data=val,
    )  # fmt: skip
    found = trained(scored)
    losses = [
        [log["eval_loss"] for log in t.state.log_history if "eval_loss" in log] for t in (plain, scored)
    ]
    assert len(losses[0]) == 3
    if bitwise:
        assert losses[0] == losses[1]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    else:
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_the_validation_pass_behind_an_evaluation_is_in_training_mode(tmp_path: Path) -> None:
    modes = []

    def loss_fn(model: nn.Module, X: Any, Y: Tensor) -> Tensor:
        modes.append(model.training)
        return reference.own_loss(model, X, Y)

    given = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    GhostTrainer(
        model=seeded_gpt2(), args=arguments(tmp_path, **given), train_dataset=rows(4), eval_dataset=rows(2),
        ghost={}, val_data=rows(2), loss_fn=loss_fn,
    ).train()  # fmt: skip
    assert modes == [True] * 4


def test_the_model_s_own_loss_under_autocast(tmp_path: Path) -> None:
    """Scores in bfloat16 are those of the manager in a loop of one's own."""
    train, val = rows(4), rows(3)
    model, by_hand = seeded_gpt2(dropout=0.0), seeded_gpt2(dropout=0.0)
    given: dict[str, Any] = {"bf16": True, "max_steps": 1, "max_grad_norm": 0.0}
    trainer = GhostTrainer(
        model=model, args=arguments(tmp_path, per_device_train_batch_size=4, **given), train_dataset=train,
        ghost={"result_dir": str(tmp_path / "scores")}, val_data=stacked(val),
    )  # fmt: skip
    trainer.train()
    found = shards(tmp_path)

    def loss_fn(of: nn.Module, X: Any, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return reference.own_loss(of, X, Y)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    manager = GhostEngineManager(
        {"val_mode": "separate"}, by_hand, optimizer, val_data=stacked(val), loss_fn=loss_fn
    )
    order = found["sample"].tolist()
    X, Y = stacked([train[i] for i in order])
    with manager.step(X, Y, batch_idx=order, iteration=0) as step:
        step.backward(loss_fn(by_hand, step.X, step.Y))
    assert_near(found["score"], step.scores, 1e-6)
    assert found["clip"].tolist() == pytest.approx([1.0] * 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [{"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}],
    ids=["checkpointing", "compile"],
)
def test_scores_are_the_same_with(tmp_path: Path, given: dict[str, Any]) -> None:
    train, val = rows(ROWS), rows(3)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name, options in (("plain", {}), ("other", given)):
        GhostTrainer(
            model=seeded_gpt2(dropout=0.0), args=arguments(tmp_path / name, **options), train_dataset=train,
            ghost={"result_dir": str(tmp_path / name / "scores")}, val_data=val,
        ).train()  # fmt: skip
    found, expected = shards(tmp_path / "other"), shards(tmp_path / "plain")
    assert found["sample"].tolist() == expected["sample"].tolist()
    assert_near(found["score"], expected["score"], 1e-5)
    if "torch_compile" in given:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    """Under DistributedDataParallel, as the Trainer sets it up: each rank scores its own samples."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(Path(__file__).with_name("hf_trainer_worker.py")), str(tmp_path)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    train, val = drawn_rows()
    torch.manual_seed(0)
    by_hand, model = tiny_gpt2(), tiny_gpt2()
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    found = shards(tmp_path)
    # Ten rows: eight in the first step; two, and two of the beginning again, in the second.
    assert [int((found["step"] == step).sum()) for step in (0, 1)] == [8, 4]
    assert_replayed(by_hand, model, train, val, found, max_norm=0.05)
    table = pq.read_table(tmp_path / "scores" / "values.parquet")
    assert sum(table["times_seen"].to_pylist()) == 12


@pytest.mark.parametrize("counted", [True, False])
def test_shares_of_micro_batches_add_up_to_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    """What policies weigh rows by: tokens where the Trainer counts them, else micro-batches."""
    shares: dict[int, list[tuple[float, int]]] = defaultdict(list)
    attach = GhostEngineManager.attach_train_batch

    def noted(manager: GhostEngineManager, X: Any, Y: Tensor, step: int, index: Tensor, share: Any) -> None:
        shares[step].append((float(share), int((Y[:, 1:] != -100).sum())))
        attach(manager, X, Y, step, index, share)

    monkeypatch.setattr(GhostEngineManager, "attach_train_batch", noted)
    model = seeded_gpt2()
    model.accepts_loss_kwargs = counted
    GhostTrainer(
        model=model, args=arguments(tmp_path, gradient_accumulation_steps=3), train_dataset=rows(ROWS),
        ghost={"policy": "all"}, val_data=rows(2),
    ).train()  # fmt: skip
    assert [len(found) for found in shares.values()] == [3, 2, 3, 2]
    for found in shares.values():
        tokens = sum(n for _, n in found)
        expected = [n / tokens if counted else 1 / len(found) for _, n in found]
        assert [share for share, _ in found] == pytest.approx(expected, rel=1e-12)
