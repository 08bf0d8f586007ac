"""Parameters with several uses: every use's samples meet every use's validation gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from ghost import GhostEngineManager, LossReduction, Selection, UnsupportedModelError
from tests.ghost import reference
from tests.ghost.harness import MODES, OWN_LOSS, assert_exact, assert_near, scored_step
from tests.ghost.models import table, tokens
from tests.ghost.reference import class_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
SAMPLE_MEAN, TOKEN_MEAN = LossReduction.SAMPLE_MEAN, LossReduction.TOKEN_MEAN


class Siamese(nn.Module):
    """One layer, used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.out = nn.Linear(5, 5), nn.Linear(5, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.square(torch.tanh(self.square(x)))))


class Checkpointed(Siamese):
    """The same under activation checkpointing, each use on its own."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(lambda y: torch.tanh(self.square(y)), x, use_reentrant=self.reentrant)
        return self.out(x)


class Universal(nn.Module):
    """A block of several kinds of layers, used three times on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.mix, self.conv = nn.Linear(6, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.out = nn.Linear(6, 4)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.words((ids * 3 + 1) % 11)
        for _ in range(3):
            x = x + torch.tanh(self.mix(self.norm(x)))
            x = x + torch.tanh(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.out(x)


class SharedWeight(nn.Module):
    """Two linear layers that share a weight: no embedding is involved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.b.weight = self.a.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class ThreeTimesTied(nn.Module):
    """Two tables and a biased head of one matrix, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Embedding(11, 6), nn.Embedding(11, 6), nn.Linear(6, 11)
        self.right.weight = self.head.weight = self.left.weight
        self.mix = nn.Linear(6, 6)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.left(ids) + torch.tanh(self.right(ids.flip(1))) * self.right((ids + 1) % 11)
        return self.head(torch.tanh(self.mix(x)))


def token_loss(model: nn.Module, X: Tensor, Y: Tensor) -> Tensor:
    return F.cross_entropy(model(X).flatten(0, 1), Y.flatten())


def id_rows(rows: int, classes_of: int = 11) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, classes_of, (rows, 7))
    labels[0, 4:] = -100
    return torch.randint(0, 11, (rows, 7)), labels


@each_mode
def test_a_layer_used_twice(mode: dict[str, Any]) -> None:
    assert_exact(Siamese(), mode, table(6), table(3), class_loss, SAMPLE_MEAN)


@each_mode
def test_a_layer_used_twice_under_activation_checkpointing(mode: dict[str, Any]) -> None:
    assert_exact(Checkpointed(), mode, table(6), table(3), class_loss, SAMPLE_MEAN)


def test_a_layer_used_twice_under_reentrant_checkpointing_is_refused_in_a_joint_pass() -> None:
    model = Checkpointed()
    model.reentrant = True
    train, val = table(6), table(3)
    train[0].requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match=r"'square' .*use_reentrant=False"):
        scored_step(model, {"loss_reduction": "sample_mean"}, train, val, class_loss)


@each_mode
@pytest.mark.parametrize("val_rows", [1, 3])
def test_a_block_used_three_times(mode: dict[str, Any], val_rows: int) -> None:
    assert_exact(Universal(), mode, id_rows(5, 4), id_rows(val_rows, 4), token_loss, TOKEN_MEAN)


@each_mode
def test_two_layers_with_one_weight(mode: dict[str, Any]) -> None:
    found = assert_exact(SharedWeight(), mode, table(6), table(3), class_loss, SAMPLE_MEAN)
    assert set(found.by_layer) == {"a", "b", "out"}


@each_mode
def test_two_tables_and_a_biased_head_of_one_matrix(mode: dict[str, Any]) -> None:
    assert_exact(ThreeTimesTied(), mode, id_rows(5), id_rows(3), token_loss, TOKEN_MEAN)


def test_uses_in_different_micro_batches_do_not_meet() -> None:
    """Each micro-batch has its own validation gradient in it."""
    model, train, val = Siamese(), table(6), table(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"loss_reduction": "sample_mean", "gradient_accumulation_steps": 2}
    manager = GhostEngineManager(config, model, optimizer, val_data=val)
    for lo in (0, 3):
        X, Y = train[0][lo : lo + 3], train[1][lo : lo + 3]
        with manager.step(X, Y, batch_idx=range(lo, lo + 3), iteration=0, last=lo > 0) as step:
            step.backward(class_loss(model, step.X, step.Y))
    assert_near(manager.scores, reference.scores(model, class_loss, train, val, SAMPLE_MEAN))
    manager.cleanup()


def bert() -> Any:
    config = BertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def masked_loss(model: nn.Module, X: Any, Y: Tensor) -> Tensor:
    return F.cross_entropy(model(**X).logits.flatten(0, 1), Y.flatten())


def masked_batch(number: int) -> tuple[dict[str, Tensor], Tensor]:
    ids = tokens(number, 9).clamp_min(1)
    ids[0, 6:] = 0  # BERT's padding
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "token_type_ids": ids % 2}
    return inputs, ids.masked_fill(torch.rand(ids.shape) < 0.5, -100).masked_fill(ids == 0, -100)


@each_mode
def test_bert_whose_biased_head_is_tied_to_its_table(mode: dict[str, Any]) -> None:
    assert_exact(bert(), mode, masked_batch(4), masked_batch(3), masked_loss, TOKEN_MEAN)


def t5(**settings: Any) -> Any:
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, decoder_start_token_id=0, **settings,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).double().train()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def pairs(rows: int) -> tuple[dict[str, Tensor], Tensor]:
    ids, labels = torch.randint(1, 50, (rows, 7)), torch.randint(1, 50, (rows, 5))
    mask = torch.ones_like(ids)
    mask[0, 5:], labels[0, 3:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def pair_loss(model: nn.Module, X: Any, Y: Tensor) -> Tensor:
    return F.cross_entropy(model(**X, labels=Y).logits.flatten(0, 1), Y.flatten())


@each_mode
@pytest.mark.parametrize("settings", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}])
def test_t5(mode: dict[str, Any], settings: dict[str, Any]) -> None:
    """Three tables and a head of one matrix, tables of relative positions, norms in float32."""
    found = assert_exact(t5(**settings), mode, pairs(4), pairs(3), pair_loss, TOKEN_MEAN, rtol=OWN_LOSS)
    owners = [name for name in found.by_layer if name.endswith("SelfAttention")]
    assert owners == [f"{stack}.block.0.layer.0.SelfAttention" for stack in ("encoder", "decoder")]


def test_selecting_one_use_of_a_shared_weight_still_meets_the_others() -> None:
    model, train, val = Universal(), id_rows(5, 4), id_rows(3, 4)
    parts = reference.scores_by_parameter(model, token_loss, train, val, TOKEN_MEAN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"loss_reduction": "token_mean", "selection": Selection(include=("mix", "words"))}
    manager = GhostEngineManager(config, model, optimizer, val_data=val)
    with manager.step(*train, batch_idx=range(5), iteration=0) as step:
        step.backward(token_loss(model, step.X, step.Y))
    expected = parts["mix.weight"] + parts["mix.bias"] + parts["words.weight"]
    assert_near(manager.scores, expected)
    manager.cleanup()


def test_two_backwards_through_one_forward_are_refused_in_a_joint_pass() -> None:
    """Each would meet the validation gradient of its own loss alone."""
    model, train = SharedNothing(), table(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager({"loss_reduction": "sample_mean"}, model, optimizer, val_data=table(3))
    manager.attach_train_batch(*train, 0, range(6))
    loss = class_loss(model, *manager.prepare_forward_input(*train))
    (loss * 0.5).backward(retain_graph=True)
    with pytest.raises(UnsupportedModelError, match=r"differentiated more often than it ran"):
        (loss * 0.5).backward()
    manager.cleanup()


class SharedNothing(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
        self.double()


@pytest.mark.parametrize("name", ["concat", "separate"])
def test_a_parameter_in_the_loss_is_refused_by_name(name: str) -> None:
    """A penalty on a weight, or a head that the loss applies itself."""
    model, train = SharedNothing(), table(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = MODES[name] | {"loss_reduction": "sample_mean"}
    manager = GhostEngineManager(config, model, optimizer, val_data=table(3), loss_fn=class_loss)
    with (
        pytest.raises(UnsupportedModelError, match=r"'0\.weight' is used outside its layer"),
        manager.step(*train, batch_idx=range(6), iteration=0) as step,
    ):
        step.backward(class_loss(model, step.X, step.Y) + 0.1 * model[0].weight.square().sum())
    manager.cleanup()


def test_a_compiled_layer_that_runs_twice_is_refused_at_every_step() -> None:
    torch._dynamo.reset()
    model, train = Siamese(), table(6)
    compiled: Any = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager({"loss_reduction": "sample_mean"}, compiled, optimizer, val_data=table(3))
    for t in range(3):
        with (
            pytest.raises(UnsupportedModelError, match=r"'square' runs twice"),
            manager.step(*train, batch_idx=range(6), iteration=t) as step,
        ):
            step.backward(class_loss(compiled, step.X, step.Y))
    manager.cleanup()
    torch._dynamo.reset()
