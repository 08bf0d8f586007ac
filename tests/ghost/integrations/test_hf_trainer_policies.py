"""Policies in a `Trainer` with accumulation: its own step, reweighted, whatever it divides losses by."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer

from ghost.errors import GhostConfigError
from ghost.integrations.hf_trainer import GhostTrainer
from ghost.policies import StepSamples
from tests.ghost import reference
from tests.ghost.harness import assert_near
from tests.ghost.integrations.hf_trainers import ROWS, arguments, rows, stacked
from tests.ghost.models import VOCABULARY, tiny_gpt2

LR = 0.1
ROUNDING = 1e-6  # a model's own loss is in float32
ONE_STEP = {"num_train_epochs": 1, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
UNCLIPPED = {"max_grad_norm": 0.0, "learning_rate": LR, "lr_scheduler_type": "constant"}


def tiny_bert() -> Any:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).double()


def classified(number: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (5,)), "labels": torch.tensor(i % 3)}
        for i in range(number)
    ]


def texts(number: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    return rows(number)


def gpt2() -> Any:
    torch.manual_seed(1)
    return tiny_gpt2()


def trained(out: Path, model: nn.Module, train: Any, policy: Any) -> GhostTrainer:
    """After one step of two micro-batches, of six rows and of four."""
    trainer = GhostTrainer(
        model=model, args=arguments(out, **ONE_STEP, **UNCLIPPED), train_dataset=train,
        ghost={"policy": policy}, val_data=train[:2],
    )  # fmt: skip
    trainer.train()
    return trainer


def only(index: int) -> Callable[[StepSamples], Tensor]:
    """Keeps the sample of this index."""
    return lambda samples: (samples.indices == index).double()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


MODELS = pytest.mark.parametrize(
    ("made", "samples", "whole"),
    [(tiny_bert, classified, 2.0), (gpt2, texts, 1.0)],
    ids=["sum of two means", "mean over all tokens"],
)


@MODELS
def test_a_policy_that_keeps_all_trains_as_the_trainer_does(
    tmp_path: Path, made: Callable[[], Any], samples: Callable[[int], Any], whole: float
) -> None:
    train, plain = samples(ROWS), made()
    scored = copy.deepcopy(plain)
    args = arguments(tmp_path, **ONE_STEP, **UNCLIPPED)
    Trainer(model=plain, args=args, train_dataset=train).train()
    trained(tmp_path, scored, train, "all")
    assert_near(flat(scored), flat(plain), ROUNDING)


@MODELS
def test_one_sample_alone_stands_for_the_whole_step(
    tmp_path: Path, made: Callable[[], Any], samples: Callable[[int], Any], whole: float
) -> None:
    """Whichever micro-batch it was in, its gradient has the weight of all that it stands for."""
    train, start = samples(ROWS), made()
    for index in range(ROWS):
        model, alone = copy.deepcopy(start), copy.deepcopy(start)
        trained(tmp_path, model, train, only(index))
        batch = {key: value[None] for key, value in train[index].items()}
        alone(**batch).loss.backward()
        torch.optim.SGD(alone.parameters(), lr=whole * LR).step()
        assert_near(flat(model), flat(alone), ROUNDING)


class Doubled(GhostTrainer):
    """A trainer with a loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(model, inputs, *args, **kwargs)


class Odd(GhostTrainer):
    """A trainer whose loss is neither a mean nor a sum over what counts."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss / num_items_in_batch


def test_a_loss_that_is_neither_sum_nor_mean_is_refused(tmp_path: Path) -> None:
    trainer = Odd(
        model=gpt2(), args=arguments(tmp_path, **ONE_STEP), train_dataset=rows(ROWS), val_data=rows(2),
        ghost={"policy": "all", "loss_reduction": "causal_token_mean"}, loss_fn=reference.causal_loss,
    )  # fmt: skip
    with pytest.raises(GhostConfigError, match="a policy cannot weigh micro-batches whose loss goes from"):
        trainer.train()


class Renamed(GhostTrainer):
    """A trainer with none."""


def test_a_loss_that_is_computed_otherwise_has_to_be_described(tmp_path: Path) -> None:
    def make(kind: type[GhostTrainer], ghost: dict[str, Any], loss_fn: Any = None) -> GhostTrainer:
        return kind(
            model=gpt2(), args=arguments(tmp_path), train_dataset=rows(2), ghost=ghost, val_data=rows(2),
            loss_fn=loss_fn,
        )  # fmt: skip

    with pytest.raises(
        GhostConfigError, match=r"Doubled\.compute_loss changes the training loss.* give loss_fn"
    ):
        make(Doubled, {})
    with pytest.raises(GhostConfigError, match=r"loss_reduction=None with Doubled\.compute_loss"):
        make(Doubled, {"policy": "top_k"}, reference.causal_loss)
    make(Doubled, {"policy": "top_k", "loss_reduction": "causal_token_mean"}, reference.causal_loss)
    make(Doubled, {}, reference.causal_loss)
    make(Renamed, {"policy": "top_k"})


@pytest.mark.parametrize(("said", "share"), [(False, 1 / 2), (True, None)])
def test_what_a_trainer_says_of_its_loss_is_heeded(tmp_path: Path, said: bool, share: float | None) -> None:
    """`loss_is_scaled_for_ga`: a loss is divided by the number of micro-batches, or by what counts in all."""
    trainer = GhostTrainer(
        model=gpt2(), args=arguments(tmp_path, **ONE_STEP), train_dataset=rows(ROWS),
        ghost={"policy": "all"}, val_data=rows(2), loss_fn=reference.causal_loss,
    )  # fmt: skip
    trainer.loss_is_scaled_for_ga = said
    trainer.current_gradient_accumulation_steps = 2
    (X, Y) = stacked(rows(4))
    counted = float((Y[:, 1:] != -100).sum())
    found = trainer._micro_batch_share(X, Y, 40)
    assert found is not None
    assert float(found) == pytest.approx(counted / 40 if share is None else share)
