"""Trainers of Hugging Face's, scored and plain, on rows of text; and a training written out by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ghost.integrations.hf_trainer import GhostTrainer
from ghost.values import read_shards
from tests.ghost import reference
from tests.ghost.harness import EXACT, assert_gradients, assert_near
from tests.ghost.models import VOCABULARY, tiny_gpt2

ROWS, LENGTH = 10, 7
Row = dict[str, Tensor]


def rows(number: int) -> list[Row]:
    """Texts with labels, each counting a number of its own."""
    found = []
    for i in range(number):
        ids = torch.randint(0, VOCABULARY, (LENGTH,))
        labels = ids.clone()
        labels[2 + i % (LENGTH - 2) :] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def drawn_rows() -> tuple[list[Row], list[Row]]:
    """The same training and validation rows in every process."""
    torch.manual_seed(4)
    return rows(ROWS), rows(3)


def batch_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """The model's loss over the step's tokens, in its logits' own precision."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def arguments(out: Path, **given: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "output_dir": str(out), "per_device_train_batch_size": 2, "learning_rate": 0.1, "optim": "sgd",
        "num_train_epochs": 2, "max_grad_norm": 0.05, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**(usual | given))


def scored_trainer(out: Path, model: nn.Module, train: Any, val: Any, **given: Any) -> GhostTrainer:
    """A trainer whose losses are float64."""
    ghost = {"result_dir": str(out / "scores"), "save_interval": 2} | given.pop("ghost", {})
    return GhostTrainer(
        model=model, args=arguments(out, **given), train_dataset=train, compute_loss_func=batch_loss,
        ghost=ghost, val_data=val, loss_fn=reference.causal_loss,
    )  # fmt: skip


def shards(out: Path) -> dict[str, Tensor]:
    """All score rows."""
    found = list(read_shards(out / "scores" / "scores"))
    return {key: torch.cat([shard[key] for shard in found]) for key in found[0]}


def stacked(given: list[Row]) -> tuple[dict[str, Tensor], Tensor]:
    return (
        {"input_ids": torch.stack([row["input_ids"] for row in given])},
        torch.stack([row["labels"] for row in given]),
    )


def is_put_back(model: Any) -> bool:
    """Whether the layers have their own forwards; the whole model may have Accelerate's."""
    return not any("forward" in module.__dict__ for module in model.modules() if module is not model)


def assert_replayed(
    model: nn.Module, trained: nn.Module, train: list[Row], val: list[Row], found: Mapping[str, Tensor],
    max_norm: float, rtol: float = EXACT,
) -> None:  # fmt: skip
    """Training again by hand, on the samples that the shards name, gives their scores, coefficients and the
    trained model.
    """
    steps = int(found["step"].max()) + 1
    for step in range(steps):
        now = found["step"] == step
        X, Y = stacked([train[i] for i in found["sample"][now].tolist()])
        loss_fn, reduction = reference.causal_loss, reference.LossReduction.CAUSAL_TOKEN_MEAN
        expected = reference.scores(model, loss_fn, (X, Y), stacked(val), reduction)
        assert_near(found["score"][now], expected, rtol)
        grads = reference.gradient(model, loss_fn(model, X, Y))
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        assert_near(found["clip"][now], clip.expand(len(Y)), rtol)
        lr = 0.1 * (1 - step / steps)
        assert found["lr"][now].tolist() == pytest.approx([lr] * len(Y), rel=1e-12)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lr * clip * grads[name]
    assert_gradients(
        {name: p.detach() for name, p in trained.named_parameters()},
        {name: p.detach() for name, p in model.named_parameters()},
        rtol,
    )


def seeded_gpt2(**given: Any) -> Any:
    """The same float32 model each time."""
    torch.manual_seed(5)
    return tiny_gpt2(**{"dropout": 0.1} | given).float()


def trained(trainer: Trainer) -> dict[str, Tensor]:
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}  # type: ignore[union-attr]
