"""The engine on Hugging Face's unmodified GPT-2, against a batch-size-1 loop in float64."""

from typing import Any

import pytest
import torch
from torch import nn

from ghost import (
    BatchError,
    GhostConfig,
    GhostConfigError,
    GhostEngineManager,
    GradDotProdEngine,
    LossReduction,
    ProtocolError,
    Selection,
    UnsupportedModelError,
)
from tests.ghost import reference
from tests.ghost.harness import (
    EXACT,
    MODES,
    OWN_LOSS,
    assert_exact,
    assert_gradients,
    assert_near,
    grads_of,
    scored_step,
)
from tests.ghost.models import classes, mlp, table, tiny_gpt2, tokens, with_ignored
from tests.ghost.reference import causal_loss, class_loss, own_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
each_tie = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

CAUSAL = LossReduction.CAUSAL_TOKEN_MEAN
ALGEBRAS = ["auto", "token_token", "target", "fused"]


def rows(number: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and, as labels, the same."""
    ids = tokens(number, length)
    return ids, ids


@each_tie
@each_mode
@pytest.mark.parametrize("val_rows", [1, 3, 16])
def test_validation_batches_of_any_size(mode: dict[str, Any], tied: bool, val_rows: int) -> None:
    assert_exact(tiny_gpt2(tied=tied), mode, rows(4, 9), rows(val_rows, 9), causal_loss, CAUSAL)


@each_tie
@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize("length", [3, 40])
def test_each_algebra_in_a_joint_batch(tied: bool, algebra: str, length: int) -> None:
    config = {"algebra": algebra}
    assert_exact(tiny_gpt2(tied=tied), config, rows(4, length), rows(3, length), causal_loss, CAUSAL)


@each_tie
@pytest.mark.parametrize("algebra", ["auto", "target", "fused"])
@pytest.mark.parametrize("length", [3, 40])
def test_each_algebra_beside_a_separate_pass(tied: bool, algebra: str, length: int) -> None:
    config = {"val_mode": "separate", "algebra": algebra}
    assert_exact(tiny_gpt2(tied=tied), config, rows(4, length), rows(3, length), causal_loss, CAUSAL)


@each_tie
@each_mode
@pytest.mark.parametrize("form", ["short", "protocol"])
def test_ignored_labels_of_any_length(mode: dict[str, Any], tied: bool, form: str) -> None:
    X, V = tokens(5, 9), tokens(3, 9)
    train = X, with_ignored(X, [9, 2, 5, 0, 1])  # the last two: nothing is counted, labels are shifted
    val = V, with_ignored(V, [4, 9, 1])
    found = assert_exact(tiny_gpt2(tied=tied), mode, train, val, causal_loss, CAUSAL, form)
    assert found.scores[3:].eq(0).all()
    assert found.scores[:3].ne(0).all()


@each_tie
@each_mode
@pytest.mark.parametrize("form", ["short", "protocol"])
def test_the_models_own_loss(mode: dict[str, Any], tied: bool, form: str) -> None:
    X, V = tokens(4, 9), tokens(3, 9)
    train, val = (X, with_ignored(X, [9, 2, 5, 7])), (V, with_ignored(V, [4, 9, 6]))
    assert_exact(tiny_gpt2(tied=tied), mode, train, val, own_loss, CAUSAL, form, OWN_LOSS)


def test_the_default_loss_and_reduction_are_the_models_own() -> None:
    model, train, val = tiny_gpt2(), rows(4, 9), rows(3, 9)
    expected = reference.scores(model, own_loss, train, val, CAUSAL)
    for mode in MODES.values():
        manager = GhostEngineManager(mode, model, torch.optim.SGD(model.parameters(), lr=0.1), val_data=val)
        with manager.step(*train, batch_idx=range(4), iteration=0) as step:
            step.backward(model(**step.inputs).loss)
        manager.cleanup()
        assert_near(manager.scores, expected, OWN_LOSS)


@each_tie
@each_mode
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention(mode: dict[str, Any], tied: bool, attention: str) -> None:
    model = tiny_gpt2(tied=tied, attention=attention)
    assert model.config._attn_implementation == attention
    assert_exact(model, mode, rows(4, 9), rows(3, 9), causal_loss, CAUSAL)


@each_tie
@each_mode
@pytest.mark.parametrize(("train_length", "val_length"), [(5, 9), (9, 5)])
def test_lengths_that_differ_by_side(
    mode: dict[str, Any], tied: bool, train_length: int, val_length: int
) -> None:
    train, val = rows(4, train_length), rows(3, val_length)
    assert_exact(tiny_gpt2(tied=tied), mode, train, val, causal_loss, CAUSAL)


@each_mode
@pytest.mark.parametrize("masked", ["both", "train", "val"])
@pytest.mark.parametrize("length", [9, 6])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_attention_masks(mode: dict[str, Any], masked: str, length: int, dtype: torch.dtype) -> None:
    sides = {"train": tokens(4, 9), "val": tokens(3, length)}
    batches = {}
    for side, ids in sides.items():
        lengths = [ids.shape[1], 3, 5, 2][: len(ids)]
        inputs, labels = {"input_ids": ids}, ids
        if masked in (side, "both"):
            inputs["attention_mask"] = (with_ignored(ids, lengths) != -100).to(dtype)
            labels = with_ignored(ids, lengths)
        batches[side] = inputs, labels
    assert_exact(tiny_gpt2(), mode, batches["train"], batches["val"], causal_loss, CAUSAL)


@each_mode
def test_padding_on_the_left(mode: dict[str, Any]) -> None:
    ids, mask = tokens(4, 9), torch.ones(4, 9, dtype=torch.int64)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    train = {"input_ids": ids, "attention_mask": mask}, labels
    val = {"input_ids": (V := tokens(3, 7))}, V
    assert_exact(tiny_gpt2(), mode, train, val, causal_loss, CAUSAL)


@each_mode
def test_float32(mode: dict[str, Any]) -> None:
    assert_exact(tiny_gpt2().float(), mode, rows(4, 9), rows(3, 9), causal_loss, CAUSAL, rtol=1e-5)


@each_tie
def test_concat_equals_separate(tied: bool) -> None:
    model, train, val = tiny_gpt2(tied=tied), rows(4, 9), rows(3, 9)
    found = [
        scored_step(model, mode | {"loss_reduction": CAUSAL}, train, val, causal_loss)
        for mode in MODES.values()
    ]
    for other in found[1:]:
        assert_near(other.scores, found[0].scores)
        assert_gradients(other.grads, found[0].grads)


@pytest.mark.parametrize("mode", [MODES["separate"], MODES["bitwise"]], ids=["separate", "bitwise"])
def test_layers_are_scored_one_by_one(mode: dict[str, Any]) -> None:
    model, train, val = tiny_gpt2(tied=False), rows(4, 9), rows(3, 9)
    found = scored_step(model, mode, train, val, causal_loss)
    parts = reference.scores_by_parameter(model, causal_loss, train, val, CAUSAL)
    for layer, score in found.by_layer.items():
        own = [part for name, part in parts.items() if name.rpartition(".")[0] == layer]
        assert_near(score, torch.stack(own).sum(0))


@each_mode
def test_only_selected_layers_are_scored_and_all_are_trained(mode: dict[str, Any]) -> None:
    model, train, val = tiny_gpt2(tied=False), rows(4, 9), rows(3, 9)
    config = mode | {"selection": Selection(families=("mlp",)), "loss_reduction": CAUSAL}
    found = scored_step(model, config, train, val, causal_loss)
    parts = reference.scores_by_parameter(model, causal_loss, train, val, CAUSAL)
    assert_near(found.scores, torch.stack([p for name, p in parts.items() if ".mlp." in name]).sum(0))
    assert all(".mlp." in layer for layer in found.by_layer)
    assert_gradients(found.grads, reference.gradient(model, causal_loss(model, *train)))


@pytest.mark.parametrize("families", [("embed",), ("head",)])
def test_one_use_of_a_tied_matrix_in_a_joint_batch(families: tuple[str, ...]) -> None:
    """The two uses' scores add up to the matrix's, and each is the other mode's."""
    model, train, val = tiny_gpt2(tied=True), rows(4, 9), rows(3, 9)
    found = {
        name: scored_step(
            model, MODES[name] | {"selection": Selection(families=families), "loss_reduction": CAUSAL},
            train, val, causal_loss,
        )
        for name in ("concat", "separate")
    }  # fmt: skip
    assert found["concat"].by_layer.keys() == found["separate"].by_layer.keys()
    for layer, score in found["separate"].by_layer.items():
        assert_near(found["concat"].by_layer[layer], score)
    plain = reference.gradient(model, causal_loss(model, *train))
    assert_gradients(found["concat"].grads, plain)


@each_mode
def test_a_score_does_not_depend_on_the_rest_of_its_batch(mode: dict[str, Any]) -> None:
    model, (X, Y), val = tiny_gpt2(), rows(6, 9), rows(3, 9)
    config = mode | {"loss_reduction": CAUSAL}
    whole = scored_step(model, config, (X, Y), val, causal_loss).scores
    part = scored_step(model, config, (X[1:4], Y[1:4]), val, causal_loss).scores
    assert_near(whole[1:4] * 6, part * 3)
    alone = scored_step(model, config, (X[2:3], Y[2:3]), val, causal_loss).scores
    assert_near(whole[2:3] * 6, alone)


@each_mode
def test_scores_do_not_shrink_with_the_number_of_validation_rows(mode: dict[str, Any]) -> None:
    model, train, (V, W) = tiny_gpt2(), rows(4, 9), rows(2, 9)
    config = mode | {"loss_reduction": CAUSAL}
    once = scored_step(model, config, train, (V, W), causal_loss).scores
    repeated = scored_step(model, config, train, (V.repeat(5, 1), W.repeat(5, 1)), causal_loss).scores
    assert_near(repeated, once)


@each_tie
@each_mode
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_activation_checkpointing(mode: dict[str, Any], tied: bool) -> None:
    model = tiny_gpt2(tied=tied)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_exact(model, mode, rows(4, 9), rows(3, 9), causal_loss, CAUSAL)


def test_batch_norm_in_training_mode_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()
    config = {"val_mode": "separate"}
    with pytest.raises(UnsupportedModelError, match=r"'1' is a BatchNorm1d.*eval"):
        scored_step(model, config, table(6), table(3), class_loss)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False)).double().eval()
    with pytest.raises(UnsupportedModelError, match=r"'1' is a BatchNorm1d.*statistics"):
        scored_step(model, config, table(6), table(3), class_loss)


def test_batch_norm_in_eval_mode_is_an_affine_map() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 4)).double()
    model[1].eval()
    assert_exact(model, {}, table(6), table(3), class_loss, LossReduction.SAMPLE_MEAN)


def test_a_model_without_a_trainable_parameter_is_refused() -> None:
    model = mlp().requires_grad_(False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(UnsupportedModelError, match=r"Sequential has no trainable parameter"):
        GhostEngineManager({}, model, optimizer, val_data=table(3))


@each_mode
def test_a_layer_that_does_not_run_scores_nothing(mode: dict[str, Any]) -> None:
    model = mlp()
    model.add_module("spare", nn.Linear(4, 4).double())
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    found = scored_step(model, mode | {"loss_reduction": "sample_mean"}, table(6), table(3), class_loss)
    assert found.by_layer["spare"].eq(0).all()
    assert found.scores.ne(0).all()
    assert "forward" in vars(model)  # the model's own override is put back, not removed


class Flat(nn.Module):
    """Makes rows and positions one axis, row after row or position after position."""

    def __init__(self, by_row: bool) -> None:
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        self.by_row = by_row
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.inner(x)))
        order = x if self.by_row else x.transpose(0, 1)
        out = self.out(nn.functional.dropout(order, 0.2 * self.by_row, self.training).flatten(0, 1))
        return (
            out.unflatten(0, order.shape[:2])
            if self.by_row
            else out.unflatten(0, order.shape[:2]).transpose(0, 1)
        )


def flat_rows(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(number, 3, 5, dtype=torch.float64), classes(number)


@each_mode
def test_rows_and_positions_in_one_axis(mode: dict[str, Any]) -> None:
    model = Flat(by_row=True).eval()
    assert_exact(model, mode, flat_rows(4), flat_rows(2), class_loss, LossReduction.SAMPLE_MEAN)
    assert not model.training
    # Whether the order can be told does not depend on dropout.
    config = mode | {"loss_reduction": "sample_mean"}
    assert scored_step(model.train(), config, flat_rows(4), flat_rows(2), class_loss).scores.isfinite().all()
    assert model.out.training


@each_mode
def test_positions_before_rows_are_refused_by_name(mode: dict[str, Any]) -> None:
    config = mode | {"loss_reduction": "sample_mean"}
    with pytest.raises(UnsupportedModelError, match=r"'out' has rows and positions in one axis, but not row"):
        scored_step(Flat(by_row=False), config, flat_rows(4), flat_rows(2), class_loss)


class Cut(nn.Module):
    """Drops positions on its way, so that no axis is what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x[:, 1:].flatten(0, 1)).unflatten(0, (len(x), -1))


def test_rows_that_cannot_be_told_apart_are_refused_by_name() -> None:
    with pytest.raises(BatchError, match=r"'out' got an input of shape \(12, 5\).*6 rows"):
        scored_step(Cut().double(), {"loss_reduction": "sample_mean"}, flat_rows(4), flat_rows(2), class_loss)


# --- the engine without a manager ---------------------------------------------------------------------------


def test_usable_on_its_own() -> None:
    model, train, val = tiny_gpt2(), rows(4, 9), rows(2, 9)
    engine = GradDotProdEngine(model, GhostConfig(val_batch_size=2), val)
    engine.attach()
    engine.begin(*train, first=True, share=1.0)
    X, Y = engine.forward_inputs(*train)
    engine.scale_outputs()
    model(input_ids=X, labels=Y).loss.backward()
    scores = sum(part.sum(0) for part in engine.collect().values())  # [b, 1]
    engine.detach()
    assert isinstance(scores, torch.Tensor)
    assert_near(scores[:, 0], reference.scores(model, own_loss, train, val, CAUSAL), OWN_LOSS)
    assert_gradients(grads_of(model), reference.gradient(model, own_loss(model, *train)), OWN_LOSS)


def test_calls_out_of_order() -> None:
    engine = GradDotProdEngine(mlp(), GhostConfig(loss_reduction=LossReduction.SAMPLE_MEAN), table(2))
    with pytest.raises(ProtocolError, match=r"detached: call attach"):
        engine.begin(*table(4), first=True, share=1.0)
    engine.attach()
    with pytest.raises(ProtocolError, match=r"no step to collect"):
        engine.collect()
    engine.begin(*table(4), first=True, share=1.0)
    with pytest.raises(ProtocolError, match=r"found no gradient"):
        engine.collect()


# --- validation rows ----------------------------------------------------------------------------------------


def test_validation_rows_take_turns_in_a_joint_batch() -> None:
    model, train, (V, W) = tiny_gpt2(), rows(4, 9), rows(5, 9)
    config = {"val_batch_size": 2, "loss_reduction": CAUSAL}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager(config, model, optimizer, val_data=(V, W))
    found = []
    for t in range(4):
        with manager.step(*train, batch_idx=range(4), iteration=t) as step:
            step.backward(causal_loss(model, step.X, step.Y))
        found.append(manager.scores)
    manager.cleanup()
    for t, turn in enumerate(([0, 1], [2, 3], [4, 0], [1, 2])):
        assert_near(found[t], reference.scores(model, causal_loss, train, (V[turn], W[turn]), CAUSAL))


@pytest.mark.parametrize("micro", [1, 2, 5, 99])
def test_a_separate_pass_takes_all_rows_in_micro_batches(micro: int) -> None:
    model, train = tiny_gpt2(), rows(4, 9)
    V = tokens(5, 9)
    val = V, with_ignored(V, [9, 1, 4, 0, 6])  # two rows count nothing: their own mean loss is no number
    for mode in ("separate", "bitwise"):
        config = MODES[mode] | {"val_batch_size": micro}
        found = assert_exact(model, config, train, val, causal_loss, CAUSAL)
        assert found.scores.isfinite().all()


def test_a_separate_pass_every_few_steps() -> None:
    model, train, val = mlp(), table(6), table(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = {"val_mode": "separate", "val_every": 2}
    manager = GhostEngineManager(config, model, optimizer, val_data=val, loss_fn=class_loss)
    val_grads = []
    for t in range(3):
        val_grads.append(reference.gradient(model, class_loss(model, *val)))
        expected = val_grads[t - t % 2]
        grads = reference.sample_gradients(model, class_loss, *train, LossReduction.SAMPLE_MEAN)
        optimizer.zero_grad()
        with manager.step(*train, batch_idx=range(6), iteration=t) as step:
            step.backward(class_loss(model, step.X, step.Y))
        assert_near(manager.scores, torch.stack([reference.dot(expected, g) for g in grads]))
        optimizer.step()
    manager.cleanup()


@pytest.mark.parametrize("mode", [MODES["concat"], MODES["separate"]], ids=["concat", "separate"])
def test_validation_rows_that_count_nothing_are_refused(mode: dict[str, Any]) -> None:
    V = tokens(3, 9)
    config = mode | {"val_batch_size": 1}
    with pytest.raises(GhostConfigError, match=r"val_data has no label that the loss counts"):
        scored_step(tiny_gpt2(), config, rows(4, 9), (V, with_ignored(V, [0, 1, 0])), causal_loss)


@pytest.mark.parametrize("sets", [1, 2])
def test_one_separate_pass_that_counts_nothing_is_refused(sets: int) -> None:
    """Its gradient would be zero or not a number, and so would all scores."""
    model, V = tiny_gpt2(), tokens(3, 9)
    nothing = V, with_ignored(V, [0, 0, 0])
    val = nothing if sets == 1 else {"code": (V, V), "prose": nothing}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GhostConfigError, match=r"val_data has no label that the loss counts"):
        GhostEngineManager({"val_mode": "separate"}, model, optimizer, val_data=val)


def test_every_turn_of_the_validation_rows_is_looked_at() -> None:
    """Five rows by two: the third step has rows 4 and 0, the fourth rows 1 and 2, which count nothing."""
    V = tokens(5, 9)
    with pytest.raises(GhostConfigError, match=r"2 rows from row 1 on"):
        scored_step(
            tiny_gpt2(), {"val_batch_size": 2}, rows(4, 9), (V, with_ignored(V, [9, 0, 0, 9, 9])), causal_loss
        )


@each_mode
@pytest.mark.parametrize(
    ("val", "message"),
    [
        (None, r"val_data is missing"),
        (torch.zeros(3, 5), r"val_data should be \(X_val, Y_val\)"),
        ((torch.zeros(3, 5), torch.zeros(2)), r"3 input rows but 2 label rows"),
        ((torch.zeros(0, 5), torch.zeros(0)), r"val_data is empty"),
        (({"a": torch.zeros(3), "b": torch.zeros(2)}, torch.zeros(3)), r"different numbers of rows"),
        (([1, 2, 3], torch.zeros(3)), r"val_data is a list"),
        ((torch.zeros(3, 5), [0, 1, 2]), r"labels of val_data should be a tensor"),
    ],
)
def test_validation_data_that_cannot_work(mode: dict[str, Any], val: Any, message: str) -> None:
    model = mlp()
    with pytest.raises((GhostConfigError, BatchError), match=message):
        GhostEngineManager(
            mode | {"loss_reduction": "sample_mean"}, model,
            torch.optim.SGD(model.parameters(), lr=0.1), val_data=val,
        )  # fmt: skip
    assert "forward" not in vars(model)


class Packed:
    """An output that is neither tensor nor container."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


class PackedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 4)
        self.double()

    def forward(self, x: torch.Tensor) -> Packed:
        return Packed(self.out(x))


def test_outputs_that_hide_their_tensors_are_refused_where_they_must_be_weighed() -> None:
    def loss(model: nn.Module, X: Any, Y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(X).loss, Y)

    config = {"loss_reduction": "sample_mean"}
    with pytest.raises(UnsupportedModelError, match=r"Packed in which no tensor.*manager\.step"):
        scored_step(PackedModel(), config, table(6), table(3), loss, form="protocol")
    assert_exact(PackedModel(), {}, table(6), table(3), loss, LossReduction.SAMPLE_MEAN, rtol=EXACT)
