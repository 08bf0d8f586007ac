"""The check of one's own model: right models pass in every setting, wrong layers are named."""

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghost
from ghost import (
    BatchError,
    GhostConfigError,
    LayerRule,
    LossReduction,
    Selection,
    UnsupportedModelError,
    register_layer,
)
from ghost.batch import Inputs
from ghost.gradients import Materialised, OuterProducts, SampleGradients
from ghost.layers import base
from ghost.plain import leaves_with, plain_uses, trainable_uses
from ghost.second_order import SecondOrderValidation
from ghost.verification import Deviation, score_deviation
from tests.ghost import reference
from tests.ghost.harness import MODES, assert_near, scored_step
from tests.ghost.models import VOCABULARY, classes, mlp, table, tiny_gpt2, tokens, with_ignored
from tests.ghost.reference import causal_loss, class_loss, class_loss_sum, own_loss, token_loss

CAUSAL = {"loss_reduction": "causal_token_mean"}
SAMPLES = {"loss_reduction": "sample_mean"}

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))


# --- right models -------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_right_model_passes(mode: dict[str, Any], tied: bool, steps: int) -> None:
    model, X, V = tiny_gpt2(tied=tied), tokens(7, 9), tokens(5, 9)
    config = mode | CAUSAL | {"gradient_accumulation_steps": steps, "val_batch_size": 2}
    found = ghost.verify(model, config, (X, X), (V, V), causal_loss)
    assert found.passed, str(found)
    assert (found.failed, found.unresolved, list(found.unscored)) == ([], [], [])
    assert (found.dtype, found.rows) == (torch.float64, 4)
    assert found.val_rows == (2 if mode["val_mode"] == "concat" else 4)
    assert found.total.relative < 1e-10
    assert all(layer.scores and layer.scores.relative < 1e-10 for layer in found.layers)
    assert all(layer.gradient.relative < 1e-10 for layer in found.layers)
    if mode.get("bitwise") and steps == 1:
        assert {layer.gradient.error for layer in found.layers} == {0.0}


@pytest.mark.parametrize("settings", [{}, {"bitwise": True}, {"pairwise": True}, {"val_batch_size": 2}])
def test_second_order_is_checked_too(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, X, V = tiny_gpt2(), tokens(7, 9), tokens(5, 9)
    config = {"val_mode": "separate", "order": 2, "gradient_accumulation_steps": 2} | CAUSAL | settings
    found = ghost.verify(model, config, (X, X), (V, V), causal_loss)
    assert found.passed, str(found)
    assert found.total.relative < 1e-10
    right = SecondOrderValidation.hessian_product

    def wrong(self: SecondOrderValidation, rates: Any) -> dict[str, Tensor]:
        return {name: product * (1 + 1e-6) for name, product in right(self, rates).items()}

    monkeypatch.setattr(SecondOrderValidation, "hessian_product", wrong)
    found = ghost.verify(model, config, (X, X), (V, V), causal_loss)
    assert len(found.failed) == len(found.layers)
    assert not found.total.passed


@each_mode
def test_the_plain_scores_are_those_of_the_reference(mode: dict[str, Any]) -> None:
    model, X, V = tiny_gpt2(), tokens(4, 9), tokens(4, 9)
    found = ghost.verify(model, mode | CAUSAL, (X, X), (V, V), causal_loss)
    expected = reference.scores(model, causal_loss, (X, X), (V, V), LossReduction.CAUSAL_TOKEN_MEAN)
    assert found.total.size == pytest.approx(float(expected.abs().max()), rel=1e-10)
    by_layer = scored_step(model, mode | CAUSAL, (X, X), (V, V), causal_loss).by_layer
    for layer in found.layers:
        assert layer.scores
        assert layer.scores.size == pytest.approx(float(by_layer[layer.name].abs().max()), rel=1e-10)


@each_mode
def test_rows_of_different_length_and_rows_without_a_label(mode: dict[str, Any]) -> None:
    model, X, V = tiny_gpt2(), tokens(4, 9), tokens(3, 7)
    Y = with_ignored(X, [9, 0, 4, 2])
    found = ghost.verify(model, mode | CAUSAL, (X, Y), (V, V), causal_loss)
    assert found.passed, str(found)


@each_mode
@pytest.mark.parametrize("loss", [class_loss, class_loss_sum], ids=["mean", "sum"])
def test_tables_images_and_sums(mode: dict[str, Any], loss: Any) -> None:
    reduction = "sum" if loss is class_loss_sum else "sample_mean"
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 4)).double()
    train, val = ((torch.randn(n, 1, 6, 6).double(), classes(n)) for n in (5, 4))
    config = mode | {"loss_reduction": reduction, "gradient_accumulation_steps": 2}
    assert ghost.verify(model, config, train, val, loss).passed


def test_the_models_own_loss_is_the_default_and_limits_the_precision() -> None:
    found = ghost.verify(tiny_gpt2(), {}, (tokens(4, 9),) * 2, (tokens(3, 9),) * 2)
    assert found.passed
    assert found.dtype == torch.float32


@each_mode
@pytest.mark.parametrize("chosen", ["transformer.wte", "lm_head", "transformer.h.0.*"])
def test_what_is_not_scored_is_listed_and_its_gradient_checked(mode: dict[str, Any], chosen: str) -> None:
    model, X, V = tiny_gpt2(), tokens(4, 9), tokens(3, 9)
    config = mode | CAUSAL | {"selection": Selection(include=(chosen,))}
    found = ghost.verify(model, config, (X, X), (V, V), causal_loss)
    assert found.passed, str(found)
    scored = {layer.name for layer in found.layers if layer.scores}
    assert scored == {layer.name for layer in found.layers if layer.name.startswith(chosen.rstrip("*"))}
    assert {name.rpartition(".")[0] for name in found.unscored} == {
        layer.name for layer in found.layers if layer.scores is None
    }
    assert "Not scored: " in str(found)


@each_mode
def test_a_layer_without_a_rule_of_its_own(mode: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(5, 5), Doubled(), nn.Linear(5, 4)).double()
    found = ghost.verify(model, mode | SAMPLES, table(5), table(3), class_loss)
    assert found.passed, str(found)
    assert [layer.kind for layer in found.layers] == ["Linear", "Doubled", "Linear"]


@each_mode
def test_a_layer_used_twice(mode: dict[str, Any]) -> None:
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(5, 4)).double()
    found = ghost.verify(model, mode | SAMPLES, table(5), table(3), class_loss)
    assert found.passed, str(found)


@each_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_single_attention_heads(mode: dict[str, Any], dtype: torch.dtype) -> None:
    model, X, V = tiny_gpt2().to(dtype), tokens(4, 9), tokens(3, 9)
    config = mode | CAUSAL | {"selection": Selection(include=("h.1.attn.head[1]", "*.ln_f"))}
    found = ghost.verify(model, config, (X, X), (V, V), causal_loss)
    assert found.passed, str(found)
    attn = "transformer.h.1.attn"
    assert [layer.name for layer in found.layers if layer.scores] == [
        f"{attn}.c_attn", f"{attn}.c_proj", "transformer.ln_f"
    ]  # fmt: skip
    assert f"{attn}.c_attn.weight" in found.unscored
    assert "transformer.ln_f.weight" not in found.unscored


@each_mode
@pytest.mark.parametrize("steps", [1, 2])
def test_pairs_and_validation_sets(mode: dict[str, Any], steps: int) -> None:
    model, X = tiny_gpt2(), tokens(5, 9)
    (V, W), Y = (tokens(3, 9), tokens(2, 9)), with_ignored(X, [9, 4, 9, 6, 5])
    config = mode | CAUSAL | {"gradient_accumulation_steps": steps}
    for extra, val in (
        ({"pairwise": True}, (V, with_ignored(V, [9, 3, 7]))),
        ({}, {"a": (V, V), "b": (W, W)}),
    ):
        found = ghost.verify(model, config | extra, (X, Y), val, causal_loss)
        assert found.passed, str(found)
        assert found.total.relative < 1e-10


def test_a_column_that_is_wrong_alone_is_found() -> None:
    model, train, val = mlp(), table(4), table(3)
    columns = [(1 / 3, (val[0][i : i + 1], val[1][i : i + 1])) for i in range(3)]
    everything = dict.fromkeys(trainable_uses(model))
    loss = partial(class_loss, model)
    uses = list(plain_uses(model, loss, train, [0.25] * 4, columns, everything, 1.0, 1e-16).values())
    right = torch.tensor([use.scores for use in uses], dtype=torch.float64).sum(0)  # [4, 3]
    wrong = right.clone()
    wrong[:, 2] *= 1.01
    assert score_deviation(right, uses, 1e-8, 1e-16).passed
    assert not score_deviation(wrong, uses, 1e-8, 1e-16).passed


@each_mode
def test_a_compiled_model(mode: dict[str, Any]) -> None:
    model = torch.compile(mlp(), backend="aot_eager")
    assert ghost.verify(model, mode | SAMPLES, table(5), table(3), class_loss).passed


class Doubled(nn.Module):
    """A layer that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ij,bj->bi", x, self.matrix, torch.tanh(x))


# --- precision ----------------------------------------------------------------------------------------------


def autocast(dtype: torch.dtype) -> Any:
    def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return causal_loss(model, X, Y)

    return loss


@each_mode
@pytest.mark.parametrize(
    ("weights", "loss", "dtype"),
    [
        (torch.float32, causal_loss, torch.float32), (torch.bfloat16, causal_loss, torch.bfloat16),
        (torch.float32, autocast(torch.bfloat16), torch.bfloat16),
        (torch.float32, autocast(torch.float16), torch.float16),
    ],
    ids=["float32", "bfloat16", "bfloat16-mixed", "float16-mixed"],
)  # fmt: skip
def test_every_precision_passes_by_its_own_tolerance(
    mode: dict[str, Any], weights: torch.dtype, loss: Any, dtype: torch.dtype
) -> None:
    model, X, V = tiny_gpt2().to(weights), tokens(4, 9), tokens(3, 9)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    found = ghost.verify(model, mode | CAUSAL, (X, X), (V, V), loss, scaler)
    assert found.passed, str(found)
    assert found.dtype == dtype
    assert not found.unresolved


@each_mode
def test_a_loss_scale_that_overflows_is_halved_until_it_does_not(mode: dict[str, Any]) -> None:
    model, X, V = tiny_gpt2().float(), tokens(4, 9), tokens(3, 9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    found = ghost.verify(model, mode | CAUSAL, (X, X), (V, V), autocast(torch.float16), scaler)
    assert found.passed, str(found)
    assert any("loss scale" in note for note in found.notes)
    assert scaler.get_scale() == 2.0**40


def test_a_tolerance_of_ones_own() -> None:
    model, X, V = tiny_gpt2().float(), tokens(4, 9), tokens(3, 9)
    loose = ghost.verify(model, CAUSAL, (X, X), (V, V), causal_loss)
    tight = ghost.verify(model, CAUSAL, (X, X), (V, V), causal_loss, tolerance=0.0)
    for a, b in zip(loose.layers, tight.layers, strict=True):
        assert a.scores
        assert b.scores
        assert a.scores.tolerance - b.scores.tolerance == pytest.approx(1e-4 * a.scores.size, rel=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_scores_that_drown_in_rounding_are_called_neither_right_nor_wrong(seed: int) -> None:
    """A layer whose gradient is zero but for rounding."""

    class Shifted(nn.Module):
        """A shift of all logits, which no softmax sees."""

        def __init__(self) -> None:
            super().__init__()
            self.logits, self.shift = nn.Linear(5, 4), nn.Linear(5, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.logits(x) + self.shift(x)

    torch.manual_seed(seed)
    model, (X, Y), (V, W) = Shifted(), table(4), table(3)
    found = ghost.verify(model, SAMPLES, (X.float(), Y), (V.float(), W), class_loss)
    assert found.passed, str(found)
    logits, shift = found.layers
    assert logits.verdict == "ok"
    assert shift.verdict in ("too small to tell", "zero on these rows")


# --- wrong layers -------------------------------------------------------------------------------------------


class Suspect(nn.Linear):
    """A linear layer under a rule that is wrong in one way."""


class SuspectRule(LayerRule):
    """What `nn.Linear`'s rule should be."""

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, params["weight"], params["bias"])

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        return {"weight": self.weight(x, grad), "bias": Materialised(grad.sum(1))}

    def weight(self, x: Tensor, grad: Tensor) -> SampleGradients:
        return OuterProducts(grad, x)


class OffByFactor(SuspectRule):
    def weight(self, x: Tensor, grad: Tensor) -> SampleGradients:
        return OuterProducts(grad * 1.5, x)


class Transposed(SuspectRule):
    def weight(self, x: Tensor, grad: Tensor) -> SampleGradients:
        return OuterProducts(x, grad)


class IgnoresPadding(SuspectRule):
    """Takes the last position out, padding or not."""

    def weight(self, x: Tensor, grad: Tensor) -> SampleGradients:
        return OuterProducts(grad[:, :-1], x[:, :-1])


class BiasForgotten(SuspectRule):
    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        return {"weight": self.weight(x, grad), "bias": Materialised(grad.sum(1) * 0)}


class SummedBeforeTheProduct(SuspectRule):
    """Sums activations and gradients over the validation batch before the product: right for one row."""

    def weight(self, x: Tensor, grad: Tensor) -> SampleGradients:
        return _SummedFirst(grad, x)


class _SummedFirst(OuterProducts):
    def sum_and_scores(self, val: Any, sizes: Any, how: Any) -> tuple[Tensor, Tensor]:
        one = OuterProducts(val.left.sum(0, keepdim=True), val.right.sum(0, keepdim=True))
        return self.sum(), self.dot(one.sum())[:, None]

    def dot(self, target: Tensor) -> Tensor:
        return super().dot(target) * 1.05

    def sum_and_dots(self, targets: Tensor, how: Any) -> tuple[Tensor, Tensor]:
        return self.sum(), torch.stack([self.dot(target) for target in targets], dim=1)


class ForwardWithoutBias(SuspectRule):
    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, params["weight"])


class Words(nn.Module):
    """A token model with a suspect in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6)
        self.suspect, self.head = Suspect(6, 6), nn.Linear(6, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.suspect(torch.tanh(self.first(self.table(ids))))))


def checked(rule: type[LayerRule], config: dict[str, Any], dtype: torch.dtype) -> ghost.Verification:
    register_layer(Suspect)(rule)
    X, V = tokens(5, 9), tokens(3, 9)
    Y = with_ignored(X, [9, 9, 4, 9, 5])
    model = Words().to(dtype)
    return ghost.verify(model, {"loss_reduction": "token_mean"} | config, (X, Y), (V, V), token_loss)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_mode
def test_the_right_rule_passes(mode: dict[str, Any], dtype: torch.dtype) -> None:
    found = checked(SuspectRule, mode, dtype)
    assert found.passed, str(found)
    assert not found.unresolved


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [OffByFactor, Transposed, IgnoresPadding, BiasForgotten])
@each_mode
def test_a_wrong_rule_is_named(rule: type[LayerRule], mode: dict[str, Any], dtype: torch.dtype) -> None:
    found = checked(rule, mode, dtype)
    assert found.failed == ["suspect"], str(found)
    assert not found.passed
    assert "plain autograd gives other numbers for 'suspect'" in found.summary()


@pytest.mark.usefixtures("registry")
@each_mode
def test_inner_products_alone_may_be_wrong(mode: dict[str, Any]) -> None:
    """The training gradient is right, and the scores are not."""
    found = checked(SummedBeforeTheProduct, mode, torch.float32)
    assert found.failed == ["suspect"], str(found)
    (suspect,) = [layer for layer in found.layers if layer.name == "suspect"]
    assert suspect.gradient.passed
    assert suspect.verdict == "FAILED"


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("mode", [MODES["concat"], MODES["separate"]], ids=["concat", "separate"])
def test_a_rule_with_another_forward_is_found_by_its_loss(mode: dict[str, Any]) -> None:
    found = checked(ForwardWithoutBias, mode, torch.float32)
    assert not found.passed
    assert not found.forward.passed
    assert "the forward of a layer rule" in found.summary()


def test_what_is_not_a_number_fails() -> None:
    assert not Deviation(1.0, float("nan"), 1.0).passed
    assert not Deviation(1.0, 0.0, float("nan")).passed
    assert Deviation(1.0, float("nan"), 1.0).severity == float("inf")
    assert Deviation(0.0, 0.0, 0.0).passed
    assert Deviation(0.0, 1.0, 0.0).relative == float("inf")


# --- what is refused, and what is left as it was ------------------------------------------------------------


def test_a_reduction_that_does_not_describe_the_loss_is_refused() -> None:
    X, V = tokens(4, 9), tokens(3, 9)
    Y = with_ignored(X, [9, 2, 4, 3])
    with pytest.raises(GhostConfigError, match=r"loss_reduction='sample_mean' does not describe the loss"):
        ghost.verify(tiny_gpt2(), SAMPLES, (X, Y), (V, V), causal_loss)


@pytest.mark.parametrize(
    ("config", "error", "parts"),
    [
        ({"engine": "regular"}, GhostConfigError, "engine='regular' .* engine='graddotprod'"),
        ({"gradient_accumulation_steps": 6}, BatchError, "5 rows, and gradient_accumulation_steps=6"),
        ({"loss_reduction": None}, GhostConfigError, "loss_reduction cannot be inferred for Sequential"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_refused(
    config: dict[str, Any], error: type[Exception], parts: str
) -> None:
    with pytest.raises(error, match=parts):
        ghost.verify(mlp(), SAMPLES | config, table(5), table(3), class_loss)


def test_a_batch_without_labels_is_refused() -> None:
    X, V = tokens(3, 9), tokens(3, 9)
    with pytest.raises(BatchError, match="none of the 3 training rows has a label"):
        ghost.verify(tiny_gpt2(), CAUSAL, (X, torch.full_like(X, -100)), (V, V), causal_loss)


def test_the_engines_own_refusals_come_through() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="BatchNorm1d"):
        ghost.verify(model, SAMPLES | {"val_mode": "separate"}, table(5), table(3), class_loss)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@each_mode
def test_dropout_is_put_to_rest_and_said(mode: dict[str, Any]) -> None:
    model, X, V = tiny_gpt2(dropout=0.3), tokens(4, 9), tokens(3, 9)
    found = ghost.verify(model, mode | CAUSAL, (X, X), (V, V), causal_loss)
    assert found.passed, str(found)
    assert any("evaluation mode" in note for note in found.notes)
    assert all(module.training for module in model.modules())


def test_a_loss_that_is_random_in_every_mode_is_refused() -> None:
    def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        return class_loss(model, F.dropout(X, 0.5), Y)  # type: ignore[arg-type]

    with pytest.raises(GhostConfigError, match="random even in evaluation mode"):
        ghost.verify(mlp(), SAMPLES, table(5), table(3), loss)


class Counting(nn.Module):
    """Counts its forwards in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@each_mode
def test_everything_is_left_as_it_was(mode: dict[str, Any]) -> None:
    model = nn.Sequential(mlp(), nn.Dropout(0.5), Counting(), nn.Linear(4, 4)).double()
    model[3].eval()
    model[0][0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    class_loss(model, *table(5)).backward()
    optimizer.step()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    grads = {
        name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
    }
    modes = [module.training for module in model.modules()]
    parameters = list(model.parameters())
    random_states = torch.get_rng_state(), random.getstate()
    assert ghost.verify(model, mode | SAMPLES, table(5), table(3), class_loss).passed
    assert not torch.equal(random_states[0], torch.get_rng_state())  # the tables of the line before
    torch.set_rng_state(random_states[0])
    batches = table(5), table(3)
    drawn = torch.get_rng_state()
    ghost.verify(model, mode | SAMPLES, *batches, class_loss)
    assert torch.equal(drawn, torch.get_rng_state())
    assert random_states[1] == random.getstate()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    for p, before in moments.items():
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in before.items())
    for name, p in model.named_parameters():
        same, value = grads[name]
        assert p.grad is same
        assert value is None or torch.equal(value, same)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failure_leaves_the_model_as_it_was_too() -> None:
    model = tiny_gpt2(dropout=0.3)
    calls = iter(range(100))

    def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        if next(calls) == 12:
            raise RuntimeError("enough")
        return causal_loss(model, X, Y)

    table_before, X = model.transformer.wte.weight, tokens(4, 9)
    with pytest.raises(RuntimeError, match="enough"):
        ghost.verify(model, CAUSAL, (X, X), (X, X), loss)
    assert model.training
    assert model.lm_head.weight is model.transformer.wte.weight is table_before
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_every_use_is_a_leaf_of_its_own_in_the_same_memory() -> None:
    model = tiny_gpt2()
    shared = model.lm_head.weight
    assert len(trainable_uses(model)) == len(list(model.parameters())) + 1
    with leaves_with(model, {id(p): p.detach() for p in model.parameters()}) as leaves:
        head, wte = leaves["lm_head.weight"], leaves["transformer.wte.weight"]
        assert head is not wte
        assert head.data_ptr() == wte.data_ptr() == shared.data_ptr()
        assert model.lm_head.weight is head
    assert model.lm_head.weight is model.transformer.wte.weight is shared


# --- the report ---------------------------------------------------------------------------------------------


def test_the_table_is_aligned_and_the_record_is_plain() -> None:
    import json

    X, V = tokens(4, 9), tokens(3, 9)
    found = ghost.verify(tiny_gpt2(), CAUSAL, (X, X), (V, V), causal_loss)
    lines = found.table().splitlines()
    assert len(lines) == 1 + len(found.layers)
    assert len({line.index(cell) for line, cell in zip(lines[1:], ["ok"] * 16, strict=True)}) == 1
    assert str(found).splitlines()[: len(lines)] == lines
    record = json.loads(json.dumps(found.to_dict()))
    assert record["passed"] is True
    assert [row["name"] for row in record["layers"]] == [layer.name for layer in found.layers]
    assert record["layers"][0]["scores"].keys() == {"size", "error", "tolerance", "relative"}


def test_scores_and_total_are_near_one_another() -> None:
    """The step that is checked is the manager's own."""
    model, X, V = tiny_gpt2(), tokens(4, 9), tokens(4, 9)
    step = scored_step(model, CAUSAL, (X, X), (V, V), own_loss)
    found = ghost.verify(model, CAUSAL, (X, X), (V, V))
    assert_near(torch.tensor(found.total.size), step.scores.abs().max(), 1e-5)
