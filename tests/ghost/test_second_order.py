"""Curvatures `⟨g_i, H_val Σ_j g_j⟩` against autograd's Hessian–vector product, and what second-order values
mean.
"""

import gc
import math
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghost import (
    GhostConfigError,
    GhostEngineManager,
    LossReduction,
    ProtocolError,
    Selection,
    UnsupportedModelError,
)
from ghost.batch import row_count
from ghost.scores import read_columns
from ghost.values import accumulate, accumulate_columns, read_shards, row_values
from tests.ghost import reference
from tests.ghost.harness import EXACT, assert_gradients, assert_near, grads_of, scored_step
from tests.ghost.models import mlp, table, tiny_gpt2, tokens, with_ignored
from tests.ghost.reference import LossFn, Rows, causal_loss, class_loss, class_loss_sum

CAUSAL, BY_SAMPLE = LossReduction.CAUSAL_TOKEN_MEAN, LossReduction.SAMPLE_MEAN
SECOND: dict[str, Any] = {"val_mode": "separate", "order": 2}

WAYS = {
    "whole": {},
    "in parts": {"val_batch_size": 2},
    "bitwise": {"bitwise": True},
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


@dataclass
class Loop:
    """A few lines of a training loop with second-order scores."""

    model: nn.Module
    loss_fn: LossFn
    val: Any
    reduction: LossReduction
    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self.optimizer = self.optimizer or torch.optim.SGD(self.model.parameters(), lr=0.1)
        config = {**SECOND, "loss_reduction": self.reduction, **self.settings}
        self.manager = GhostEngineManager(
            config, self.model, self.optimizer, val_data=self.val, loss_fn=self.loss_fn
        )

    def step(self, *parts: Rows, shares: tuple[float | None, ...] = (None,)) -> Tensor:
        """The step's curvatures; the optimizer is still to step."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        first = 0
        for number, ((X, Y), share) in enumerate(zip(parts, shares, strict=True), start=1):
            rows = range(first, first + row_count(X, "batch"))
            last = number == len(parts)
            with self.manager.step(X, Y, batch_idx=rows, iteration=0, share=share, last=last) as step:
                step.backward(self.loss_fn(self.model, step.X, step.Y))
            first = rows.stop
        return self.manager.curvatures

    def rows(self, folder: Path) -> dict[str, Tensor]:
        """Take the optimizer's step; the shard's rows."""
        assert self.optimizer is not None
        self.optimizer.step()
        self.manager.cleanup()
        (shard,) = read_shards(folder / "scores")
        return shard


class TinyConv(nn.Module):
    """A convolution, a group norm and a head on 5 × 5 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


class TinyAttention(nn.Module):
    """A class token, attention as one module, and a head: what has no formula of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:  # [b, T, 6]
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.head(attended[:, 0])


def images(rows: int) -> Rows:
    return torch.randn(rows, 2, 5, 5, dtype=torch.float64), torch.randint(0, 4, (rows,))


def sequences(rows: int) -> Rows:
    return torch.randn(rows, 3, 6, dtype=torch.float64), torch.randint(0, 4, (rows,))


def text(rows: int) -> Rows:
    ids = tokens(rows, 9)
    return ids, with_ignored(ids, [9 - row % 4 for row in range(rows)])


def checkpointed() -> Any:
    model = tiny_gpt2()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


CASES: dict[str, tuple[Any, Any, LossFn, LossReduction]] = {
    "mlp": (mlp, table, class_loss, BY_SAMPLE),
    "sum of losses": (mlp, table, class_loss_sum, LossReduction.SUM),
    "tied": (tiny_gpt2, text, causal_loss, CAUSAL),
    "untied": (lambda: tiny_gpt2(tied=False), text, causal_loss, CAUSAL),
    "checkpointed": (checkpointed, text, causal_loss, CAUSAL),
    "convolution": (lambda: TinyConv().double(), images, class_loss, BY_SAMPLE),
    "no formula": (lambda: TinyAttention().double(), sequences, class_loss, BY_SAMPLE),
}


@each_way
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_curvatures_are_those_of_plain_autograd(case: Any, way: dict[str, Any]) -> None:
    make, draw, loss_fn, reduction = case
    model, train, val = make(), draw(5), draw(3)
    expected = reference.curvatures(model, loss_fn, train, val, reduction)
    plain = reference.gradient(model, loss_fn(model, *train))
    loop = Loop(model, loss_fn, val, reduction, way)
    assert_near(loop.step(train), expected)
    assert_near(loop.manager.scores, reference.scores(model, loss_fn, train, val, reduction))
    assert_gradients(grads_of(model), plain)
    assert expected.abs().max() > 1e-3 * reference.dot(plain, plain)  # they are of a size that tells


@each_way
def test_micro_batches_are_scored_against_the_whole_steps_gradient(way: dict[str, Any]) -> None:
    model, train, val = tiny_gpt2(), text(5), text(2)
    expected = reference.curvatures(model, causal_loss, train, val, CAUSAL)
    X, Y = train
    counts = [int((part[:, 1:] != -100).sum()) for part in (Y[:2], Y[2:])]
    shares = tuple(count / sum(counts) for count in counts)
    loop = Loop(model, causal_loss, val, CAUSAL, {"gradient_accumulation_steps": 2, **way})
    for _ in range(2):  # a second step has nothing of the first
        assert_near(loop.step((X[:2], Y[:2]), (X[2:], Y[2:]), shares=shares), expected)


def test_the_long_form() -> None:
    model, (X, Y), val = mlp(), table(5), table(2)
    expected = reference.curvatures(model, class_loss, (X, Y), val, BY_SAMPLE)
    manager = Loop(model, class_loss, val, BY_SAMPLE).manager
    manager.attach_train_batch(X, Y, 0, range(5))
    class_loss(model, *manager.prepare_forward_input(X, Y)).backward()
    manager.prepare_gradients()
    assert_near(manager.curvatures, expected)
    manager.prepare_gradients()  # once more is no harm
    assert_near(manager.curvatures, expected)


@pytest.mark.parametrize("named", [True, False], ids=["sets", "pairs"])
def test_each_column_has_a_hessian_of_its_own(named: bool) -> None:
    model, train = tiny_gpt2(), text(4)
    ids = tokens(3, 9)  # rows with as many labels each, so that a pair's mean is a third of all rows'
    parts = [(ids[i : i + 1], ids[i : i + 1]) for i in range(3)]
    if named:
        loop = Loop(model, causal_loss, {str(i): part for i, part in enumerate(parts)}, CAUSAL)
    else:
        loop = Loop(model, causal_loss, (ids, ids), CAUSAL, {"pairwise": True})
    columns = [reference.curvatures(model, causal_loss, train, part, CAUSAL) for part in parts]
    assert_near(loop.step(train), torch.stack(columns, 1) / (1 if named else 3))


@pytest.mark.parametrize("resolution", ["layer", "family", "head"])
def test_parts_of_the_model_add_up_to_a_samples_value(resolution: str, tmp_path: Path) -> None:
    model, train, val = tiny_gpt2(), text(4), text(2)
    expected = reference.curvatures(model, causal_loss, train, val, CAUSAL)
    settings = {"result_dir": tmp_path, "resolution": resolution}
    loop = Loop(model, causal_loss, val, CAUSAL, settings)
    loop.step(train)
    shard = loop.rows(tmp_path)
    assert shard["curvature"].shape == shard["score"].shape
    assert shard["score"].shape[1] == len(read_columns(tmp_path / "scores/shard-00000.pt")) > 1
    assert_near(shard["curvature"].sum(1), expected)
    by_column = accumulate_columns(tmp_path / "scores")
    values = torch.stack([found.value for found in by_column.values()]).sum(0)
    assert_near(values, accumulate(read_shards(tmp_path / "scores")).value)


def test_a_selection_bounds_what_is_scored_and_not_what_moves() -> None:
    """The step moves all parameters, and the chosen ones feel the curvature of all."""
    model, train, val = mlp(), table(4), table(2)
    product = reference.hessian_product(
        model, class_loss, val, reference.gradient(model, class_loss(model, *train))
    )
    parts = reference.sample_gradients(model, class_loss, *train, BY_SAMPLE)
    expected = [sum((product[n] * g[n]).sum() for n in ("2.weight", "2.bias")) for g in parts]
    loop = Loop(model, class_loss, val, BY_SAMPLE, {"selection": Selection(include=["2"])})
    assert_near(loop.step(train), torch.stack([torch.as_tensor(e) for e in expected]))


# --- what the values mean -----------------------------------------------------------------------------------


def taylor(model: nn.Module, loss_fn: LossFn, val: Rows, update: dict[str, Tensor]) -> Tensor:
    """The fall of the validation loss when `update` is subtracted from the parameters, to second order."""
    slope = reference.gradient(model, loss_fn(model, *val))
    bent = reference.hessian_product(model, loss_fn, val, update)
    return reference.dot(slope, update) - reference.dot(bent, update) / 2


def test_values_add_up_to_the_second_order_fall_in_loss(tmp_path: Path) -> None:
    """Clipping included: its coefficient multiplies the whole step."""
    model, train, val = tiny_gpt2(), text(4), text(2)
    loop = Loop(model, causal_loss, val, CAUSAL, {"result_dir": tmp_path})
    loop.step(train)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    assert norm > 0.3
    update = {name: 0.1 * grad for name, grad in grads_of(model).items()}
    expected = taylor(model, causal_loss, val, update)
    assert_near(row_values(loop.rows(tmp_path)).sum(), expected)


def groups_of(model: nn.Module, rates: tuple[float, float]) -> torch.optim.SGD:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.SGD([{"params": p, "lr": lr} for p, lr in zip((matrices, others), rates, strict=True)])


@pytest.mark.parametrize("rates", [(0.1, 0.4), (0.1, 0.0), (0.0, 0.0)])
def test_groups_with_learning_rates_of_their_own(rates: tuple[float, float], tmp_path: Path) -> None:
    model, train, val = tiny_gpt2(), text(4), text(2)
    optimizer = groups_of(model, rates)
    loop = Loop(model, causal_loss, val, CAUSAL, {"result_dir": tmp_path}, optimizer)
    loop.step(train)
    lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    update = {name: lr[id(named[name])] * grad for name, grad in grads_of(model).items()}
    slope = reference.gradient(model, causal_loss(model, *val))
    bent = reference.hessian_product(model, causal_loss, val, update)
    expected = []
    for g in reference.sample_gradients(model, causal_loss, *train, CAUSAL):
        mine = {name: lr[id(named[name])] * part for name, part in g.items()}
        expected.append(reference.dot(slope, mine) - reference.dot(bent, mine) / 2)
    assert_near(row_values(loop.rows(tmp_path)), torch.stack(expected))


@pytest.mark.parametrize("rates", [(0.1, 0.4), (0.0, 0.0)])
def test_a_direction_that_turns_after_the_backward_is_refused(
    rates: tuple[float, float], tmp_path: Path
) -> None:
    model, train, val = mlp(), table(4), table(2)
    optimizer = groups_of(model, rates)
    loop = Loop(model, class_loss, val, BY_SAMPLE, {"result_dir": tmp_path}, optimizer)
    loop.step(train)
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(ProtocolError, match=rf"{rates[1]}\] and .*before the last backward"):
        loop.rows(tmp_path)


def test_all_rates_may_change_together(tmp_path: Path) -> None:
    model, train, val = mlp(), table(4), table(2)
    optimizer = groups_of(model, (0.1, 0.4))
    loop = Loop(model, class_loss, val, BY_SAMPLE, {"result_dir": tmp_path}, optimizer)
    loop.step(train)
    for group in optimizer.param_groups:
        group["lr"] /= 3
    update = {name: grad.clone() for name, grad in grads_of(model).items()}
    for name, p in model.named_parameters():
        update[name] *= (0.1 if p.dim() > 1 else 0.4) / 3
    expected = taylor(model, class_loss, val, update)
    assert_near(row_values(loop.rows(tmp_path)).sum(), expected)


def test_the_error_against_the_real_fall_in_loss_is_of_third_order(tmp_path: Path) -> None:
    """Half the step, an eighth of the error; of first-order values it is a quarter."""
    errors: dict[int, list[float]] = {1: [], 2: []}
    train, val = text(4), text(2)
    start = tiny_gpt2().state_dict()
    for number, rate in enumerate((0.02, 0.01)):
        model = tiny_gpt2()
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        folder = tmp_path / str(number)
        loop = Loop(model, causal_loss, val, CAUSAL, {"result_dir": folder}, optimizer)
        before = causal_loss(model, *val).item()
        loop.step(train)
        rows = loop.rows(folder)
        fall = before - causal_loss(model, *val).item()
        errors[1].append(abs(float(rate * rows["score"].sum()) - fall))
        errors[2].append(abs(float(row_values(rows).sum()) - fall))
    assert errors[2][0] < errors[1][0] / 3
    assert math.log2(errors[1][0] / errors[1][1]) == pytest.approx(2, abs=0.15)
    assert math.log2(errors[2][0] / errors[2][1]) == pytest.approx(3, abs=0.25)


def test_a_samples_copy_lowers_its_value(tmp_path: Path) -> None:
    """With a copy of sample 0 in the batch each of the two is worth `η G·g − η²/2 gᵀH(Σ + g)`: less than
    alone where `gᵀHg > 0`, while the first order sees no difference.
    """
    rate = 0.1
    model, (X, Y), val = mlp(), table(4), table(3)
    doubled = torch.cat([X, X[:1]]), torch.cat([Y, Y[:1]])
    values, scores = [], []
    for number, (inputs, labels) in enumerate([(X, Y), doubled]):
        folder = tmp_path / str(number)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        settings = {"result_dir": folder}
        loop = Loop(model, class_loss_sum, val, LossReduction.SUM, settings)
        loop.step((inputs, labels))
        rows = loop.rows(folder)
        model.load_state_dict(start)
        values.append(row_values(rows))
        scores.append(rows["score"])
    own = reference.gradient(model, class_loss_sum(model, X[:1], Y[:1]))
    whole = reference.gradient(model, class_loss_sum(model, X, Y))
    slope = reference.gradient(model, class_loss_sum(model, *val))
    with_copy = {name: whole[name] + own[name] for name in own}
    bent = reference.hessian_product(model, class_loss_sum, val, with_copy)
    expected = rate * reference.dot(slope, own) - rate**2 / 2 * reference.dot(bent, own)
    assert_near(values[1][[0, 4]], torch.stack([expected, expected]))
    of_itself = reference.dot(reference.hessian_product(model, class_loss_sum, val, own), own)
    assert_near(values[0][0] - values[1][0], rate**2 / 2 * of_itself, 1e-8)
    assert of_itself > 0
    assert values[1][0] < values[0][0]
    assert_near(scores[1][[0, 4]], scores[0][[0, 0]])


def test_a_step_that_is_not_taken_credits_nothing(tmp_path: Path) -> None:
    model, train, val = mlp(), table(4), table(2)
    loop = Loop(model, class_loss, val, BY_SAMPLE, {"result_dir": tmp_path})
    loop.step(train)
    loop.manager.cleanup()
    (shard,) = read_shards(tmp_path / "scores")
    assert shard["curvature"].abs().min() > 0
    assert row_values(shard).eq(0).all()


def test_random_numbers_that_training_draws_stay_the_same() -> None:
    model, train, val = tiny_gpt2(dropout=0.3), text(4), text(2)
    grads = []
    for order in (1, 2):
        torch.manual_seed(5)
        config = {"val_mode": "separate", "order": order, "loss_reduction": CAUSAL, "bitwise": True}
        grads.append(scored_step(model, config, train, val, causal_loss).grads)
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_compiled_models() -> None:
    """The taps run between the compiled graphs, and the validation pass without any."""
    torch._dynamo.reset()
    model, train, val = tiny_gpt2(), text(4), text(2)
    expected = reference.curvatures(model, causal_loss, train, val, CAUSAL)
    for block in model.transformer.h:
        block.compile(backend="aot_eager")
    compiled = torch.compile(model, backend="aot_eager")
    loop = Loop(compiled, causal_loss, val, CAUSAL)
    for _ in range(2):
        assert_near(loop.step(train), expected)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_other_dtypes_are_near(dtype: torch.dtype, rtol: float) -> None:
    model, train, val = tiny_gpt2(), text(4), text(2)
    expected = reference.curvatures(model, causal_loss, train, val, CAUSAL)
    assert_near(Loop(model.to(dtype), causal_loss, val, CAUSAL).step(train), expected, rtol)


def test_a_step_that_is_given_up_keeps_no_graph() -> None:
    model, seen = mlp(), []

    def loss_fn(model: Any, X: Any, Y: Tensor) -> Tensor:
        first, activation, second = model
        hidden = activation(first(X))
        seen.append(weakref.ref(hidden))
        return F.cross_entropy(second(hidden), Y)

    loop = Loop(model, loss_fn, table(3), BY_SAMPLE)
    X, Y = table(4)
    with pytest.raises(MemoryError), loop.manager.step(X, Y, batch_idx=range(4), iteration=0):
        raise MemoryError
    gc.collect()
    assert [hidden() for hidden in seen] == [None]
    assert loop.step((X, Y)).isfinite().all()


def test_autocast_is_near() -> None:
    model, train, val = tiny_gpt2().float(), text(4), text(2)
    expected = reference.curvatures(tiny_like(model), causal_loss, train, val, CAUSAL)

    def loss_fn(called: nn.Module, X: Any, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return causal_loss(called, X, Y)

    assert_near(Loop(model, loss_fn, val, CAUSAL).step(train), expected, 0.1)


def tiny_like(model: nn.Module) -> nn.Module:
    """The same in float64."""
    copy = tiny_gpt2()
    copy.load_state_dict(model.state_dict())
    return copy


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"order": 3}, "order=3 should be 1 or 2"),
        ({"order": True}, "order=True should be 1 or 2"),
        ({"val_mode": "concat"}, "order=2 needs val_mode='separate'"),
        ({"val_every": 4}, "val_every=4 saves nothing with order=2"),
        ({"engine": "gradprojlora", "val_mode": None}, "val_mode='separate'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(GhostConfigError, match=match):
        Loop(mlp(), class_loss, table(2), BY_SAMPLE, settings)


def test_a_loss_scale_is_refused() -> None:
    model = mlp()
    with pytest.raises(GhostConfigError, match="order=2 under a GradScaler"):
        GhostEngineManager(
            {**SECOND, "loss_reduction": BY_SAMPLE}, model, torch.optim.SGD(model.parameters(), lr=0.1),
            val_data=table(2), loss_fn=class_loss, scaler=torch.amp.GradScaler("cpu"),
        )  # fmt: skip


def test_gradients_of_an_earlier_step_are_refused() -> None:
    model, train, val = mlp(), table(4), table(2)
    loop = Loop(model, class_loss, val, BY_SAMPLE)
    loop.step(train)
    with pytest.raises(ProtocolError, match=r"0\.weight\.grad is not zero where a step begins"):
        loop.manager.attach_train_batch(*train, 1, range(4))
    model.zero_grad(set_to_none=False)
    loop.manager.attach_train_batch(*train, 1, range(4))


def test_a_batch_that_is_overwritten_is_noticed() -> None:
    model, (X, Y), val = mlp(), table(4), table(2)
    loop = Loop(model, class_loss, val, BY_SAMPLE, {"gradient_accumulation_steps": 2})
    manager = loop.manager
    with manager.step(X, Y, batch_idx=range(4), iteration=0, last=False) as step:
        step.backward(class_loss(model, step.X, step.Y))
    X.normal_()
    with pytest.raises(ProtocolError, match="an input of layer '0' was edited in place"):  # noqa: SIM117
        with manager.step(X, Y, batch_idx=range(4), iteration=0) as step:
            step.backward(class_loss(model, step.X, step.Y))
    X, Y = table(4)
    expected = reference.curvatures(model, class_loss, (X, Y), val, BY_SAMPLE)
    assert_near(loop.step((X[:2], Y[:2]), (X[2:], Y[2:]), shares=(None, None)), expected)


class _Once(torch.autograd.Function):
    """A doubling that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


def test_an_operation_without_a_second_derivative_is_named() -> None:
    class Once(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return _Once.apply(super().forward(x))

    model, train, val = Once(*mlp()).double(), table(4), table(2)
    loop = Loop(model, class_loss, val, BY_SAMPLE)
    with pytest.raises(UnsupportedModelError, match="loss of Once takes a function that has no second deriv"):
        loop.manager.attach_train_batch(*train, 0, range(4))


def test_fused_attention_of_ones_own_is_named() -> None:
    """Where a loss chooses the kernel itself, the plain one is not taken."""

    def fused(called: nn.Module, X: Any, Y: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return causal_loss(called, X, Y)

    loop = Loop(tiny_gpt2(), fused, text(2), CAUSAL)
    with pytest.raises(UnsupportedModelError, match="ScaledDotProductFlashAttention"):
        loop.step(text(3))


def test_curvatures_need_the_second_order() -> None:
    model, train, val = mlp(), table(4), table(2)
    loop = Loop(model, class_loss, val, BY_SAMPLE, {"order": 1})
    with pytest.raises(ProtocolError, match="no curvatures are known: they need order=2"):
        loop.step(train)


def test_a_loss_without_curvature() -> None:
    """Linear in all that is trained: every second-order term is zero."""
    model, train, val = nn.Linear(5, 4).double(), table(4), table(2)

    def linear(called: nn.Module, X: Any, Y: Tensor) -> Tensor:
        return (called(X) * F.one_hot(Y, 4)).sum(1).mean()

    assert Loop(model, linear, val, BY_SAMPLE).step(train).eq(0).all()


def test_scores_are_those_of_the_first_order() -> None:
    model, train, val = mlp(), table(4), table(2)
    config = {"val_mode": "separate", "loss_reduction": BY_SAMPLE}
    first = scored_step(model, config, train, val, class_loss)
    second = scored_step(model, {**config, "order": 2}, train, val, class_loss)
    assert_near(second.scores, first.scores, EXACT)
