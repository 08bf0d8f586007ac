"""Scores of the optimizer's own step, against the optimizer itself, run on parts of the gradient."""

import copy
import gc
import logging
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler

import ghost
from ghost import GhostEngineManager, LossReduction, weigher
from ghost.batch import row_count
from ghost.compiled import CompiledWhereItWorks
from ghost.errors import GhostConfigError, ProtocolError, UnsupportedModelError
from ghost.weighted import adam_sum_and_dots
from tests.ghost import models, reference
from tests.ghost.harness import assert_gradients, assert_near, grads_of
from tests.ghost.reference import Gradient, LossFn, Rows

Make = type[torch.optim.Optimizer]


def update_of(model: nn.Module, optimizer: torch.optim.Optimizer, grads: Gradient) -> Gradient:
    """What the optimizer takes from the weights for a gradient, over the learning rate."""
    model, optimizer = copy.deepcopy((model, optimizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = grads[name].clone()
    optimizer.step()
    lr = optimizer.param_groups[0]["lr"]
    return {name: (before[name] - p.detach()) / lr for name, p in model.named_parameters()}


def chord(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[Gradient], reach: float = 1.0
) -> Gradient:
    """The slope of the update between `h/2 − w` and `h/2 + w`, from two real steps."""
    low, high, width = {}, {}, {}
    for name in parts[0]:
        stacked = torch.stack([part[name] for part in parts])
        total, norm = stacked.sum(0) * reach, (stacked**2 * reach).sum(0).sqrt()
        half = torch.maximum(total.abs(), norm) / 2
        low[name], high[name], width[name] = total / 2 - half, total / 2 + half, 2 * half
    below, above = update_of(model, optimizer, low), update_of(model, optimizer, high)
    return {
        name: torch.where(w > 0, (above[name] - below[name]) / torch.where(w > 0, w, 1), 0)
        for name, w in width.items()
    }


def expected_scores(
    model: nn.Module, optimizer: torch.optim.Optimizer, train: Rows, val: Rows, loss_fn: LossFn,
    reduction: LossReduction,
) -> Tensor:  # fmt: skip
    """`⟨P ∘ ∇L_val, g_i⟩`."""
    parts = reference.sample_gradients(model, loss_fn, *train, reduction)
    val_grad = reference.gradient(model, loss_fn(model, *val))
    slopes = chord(model, optimizer, parts)
    weighted = {name: grad * slopes[name] for name, grad in val_grad.items()}
    return torch.stack([reference.dot(weighted, part) for part in parts])


def warmed(model: nn.Module, kind: Make, train: Rows, loss_fn: LossFn, steps: int, **settings: Any) -> Any:
    """An optimizer with some steps behind it."""
    optimizer = kind(model.parameters(), lr=1e-2, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, *train).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def scored(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], train: Rows, val: Rows,
    loss_fn: LossFn,
) -> GhostEngineManager:  # fmt: skip
    """A manager behind one step's backward, detached."""
    settings = {"preconditioner": "auto", "credit": "step", "loss_reduction": "causal_token_mean"} | config
    manager = GhostEngineManager(settings, model, optimizer, val_data=val, loss_fn=loss_fn)
    with manager.step(*train, batch_idx=range(row_count(train[0], "batch")), iteration=0) as step:
        step.backward(loss_fn(model, step.X, step.Y))
    manager.detach_for_evaluation()
    return manager


@pytest.fixture
def text() -> tuple[Rows, Rows]:
    """Training and validation rows for a tiny GPT-2."""
    train, val = models.tokens(5, 6), models.tokens(2, 6)
    return (train, train), (val, val)


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings", "steps"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1}, 0),
        (torch.optim.AdamW, {"weight_decay": 0.1}, 1),
        (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-4}, 5),
        (torch.optim.Adam, {"weight_decay": 0.1}, 3),
    ],
)
def test_slopes_are_those_of_real_steps(
    text: tuple[Rows, Rows], val_mode: str, tied: bool, kind: Make, settings: dict[str, Any], steps: int
) -> None:
    train, val = text
    model = models.tiny_gpt2(tied=tied).double()
    loss_fn = reference.causal_loss
    optimizer = warmed(model, kind, val, loss_fn, steps, **settings)
    expected = expected_scores(model, optimizer, train, val, loss_fn, LossReduction.CAUSAL_TOKEN_MEAN)
    plain = reference.gradient(model, loss_fn(model, *train))
    manager = scored(model, optimizer, {"val_mode": val_mode}, train, val, loss_fn)
    assert_near(manager.scores, expected)
    assert_gradients(grads_of(model), plain)
    layers = manager.scores_by_layer
    assert_near(torch.stack(list(layers.values())).sum(0), expected)


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_a_batch_of_one_is_credited_with_its_update(text: tuple[Rows, Rows], val_mode: str) -> None:
    """Also at rows of the table that no step has touched."""
    (X, Y), val = text
    train = X[:1], Y[:1]
    model = models.tiny_gpt2().double()
    loss_fn = reference.causal_loss
    optimizer = warmed(model, torch.optim.AdamW, val, loss_fn, 2, weight_decay=0.3)
    grads = reference.gradient(model, loss_fn(model, *train))
    nothing = {name: torch.zeros_like(grad) for name, grad in grads.items()}
    moved, idle = update_of(model, optimizer, grads), update_of(model, optimizer, nothing)
    val_grad = reference.gradient(model, loss_fn(model, *val))
    expected = reference.dot(val_grad, {name: moved[name] - idle[name] for name in moved})
    manager = scored(model, optimizer, {"val_mode": val_mode}, train, val, loss_fn)
    assert_near(manager.scores, expected[None])


@pytest.mark.parametrize("steps", [0, 4])
def test_no_sample_is_credited_more_than_the_range_of_updates(text: tuple[Rows, Rows], steps: int) -> None:
    """However the samples' gradients cancel: `|P g_i|` is at most a difference of two updates, of Adam's at
    most `2 / sqrt(1 − β₂)` or so of its learning rate an element.
    """
    (X, Y), val = text
    model = models.tiny_gpt2().double()
    loss_fn = reference.causal_loss
    optimizer = warmed(model, torch.optim.AdamW, val, loss_fn, steps)
    parts = reference.sample_gradients(model, loss_fn, X, Y, LossReduction.CAUSAL_TOKEN_MEAN)
    opposite = [{name: -grad * (1 - 1e-9) for name, grad in part.items()} for part in parts]
    slopes = chord(model, optimizer, parts + opposite)
    for part in parts:
        for name, grad in part.items():
            assert float((slopes[name] * grad).abs().max()) < 2 / math.sqrt(1 - 0.999)


def test_accumulation_takes_what_it_has_seen_for_the_step(text: tuple[Rows, Rows]) -> None:
    """The first of two micro-batches counts as half of the step; the second knows both."""
    (X, Y), val = text
    model = models.tiny_gpt2().double()
    loss_fn = reference.causal_loss
    optimizer = warmed(model, torch.optim.AdamW, val, loss_fn, 3)
    X, Y = X[:4], Y[:4]
    parts = reference.sample_gradients(model, loss_fn, X, Y, LossReduction.CAUSAL_TOKEN_MEAN)
    val_grad = reference.gradient(model, loss_fn(model, *val))
    expected = []
    for lo, seen, reach in ((0, 2, 2.0), (2, 4, 1.0)):
        slopes = chord(model, optimizer, parts[:seen], reach)
        weighted = {name: grad * slopes[name] for name, grad in val_grad.items()}
        expected += [reference.dot(weighted, part) for part in parts[lo : lo + 2]]
    config = {
        "preconditioner": "auto", "credit": "step", "loss_reduction": "causal_token_mean",
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    manager = GhostEngineManager(config, model, optimizer, val_data=val)
    for lo in (0, 2):
        rows = X[lo : lo + 2], Y[lo : lo + 2]
        with manager.step(*rows, batch_idx=[lo, lo + 1], iteration=0, last=lo == 2) as step:
            step.backward(loss_fn(model, step.X, step.Y))
    assert_near(manager.scores, torch.stack(expected))


@pytest.mark.parametrize(
    ("settings", "credit", "warm", "factor"),
    [
        ({}, "trajectory", 2, 1.0),
        ({"momentum": 0.9}, "step", 0, 1.0),
        ({"momentum": 0.9, "dampening": 0.5}, "step", 2, 0.5),
        ({"momentum": 0.9, "nesterov": True}, "step", 2, 1.9),
        ({"momentum": 0.9}, "trajectory", 2, 10.0),
        ({"momentum": 0.9, "dampening": 0.5}, "trajectory", 2, 5.0),
        ({"momentum": 0.9, "nesterov": True}, "trajectory", 0, 10.0),
    ],
)
def test_momentum_is_a_factor(
    text: tuple[Rows, Rows], settings: dict[str, Any], credit: str, warm: int, factor: float
) -> None:
    train, val = text
    model = models.tiny_gpt2().double()
    loss_fn = reference.causal_loss
    optimizer = warmed(model, torch.optim.SGD, val, loss_fn, warm, **settings)
    plain = reference.scores(model, loss_fn, train, val, LossReduction.CAUSAL_TOKEN_MEAN)
    manager = scored(model, optimizer, {"credit": credit}, train, val, loss_fn)
    assert_near(manager.scores, factor * plain)
    if credit == "step":  # one weight's steps with and without a gradient differ by the factor
        parts = reference.gradient(model, loss_fn(model, *train))
        nothing = {name: torch.zeros_like(grad) for name, grad in parts.items()}
        moved, idle = update_of(model, optimizer, parts), update_of(model, optimizer, nothing)
        for name, grad in parts.items():
            assert_near(moved[name] - idle[name], factor * grad)


def test_the_whole_effect_of_a_gradient_on_adam_sums_to_about_one(text: tuple[Rows, Rows]) -> None:
    """Trajectory credit divides by the step's share `(1 − β₁) / (1 − β₁ᵗ)`."""
    train, val = text
    for warm in (0, 3):
        model = models.tiny_gpt2().double()
        optimizer = warmed(model, torch.optim.AdamW, val, reference.causal_loss, warm)
        step = scored(model, optimizer, {"credit": "step"}, train, val, reference.causal_loss).scores
        model.zero_grad()
        whole = scored(model, optimizer, {"credit": "trajectory"}, train, val, reference.causal_loss).scores
        assert_near(whole, step * (1 - 0.9 ** (warm + 1)) / (1 - 0.9))


@pytest.mark.parametrize("resolution", ["layer", "head"])
@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_parts_and_sets_add_up(text: tuple[Rows, Rows], resolution: str, val_mode: str) -> None:
    (train, (X, Y)) = text
    model = models.tiny_gpt2().double()
    loss_fn = reference.causal_loss
    optimizer = warmed(model, torch.optim.AdamW, (X, Y), loss_fn, 2)
    sets = {"a": (X[:1], Y[:1]), "b": (X[1:], Y[1:])}
    expected = [
        expected_scores(model, optimizer, train, rows, loss_fn, LossReduction.CAUSAL_TOKEN_MEAN)
        for rows in sets.values()
    ]
    config = {"val_mode": val_mode, "resolution": resolution}
    manager = scored(model, optimizer, config, train, sets, loss_fn)
    assert_near(manager.scores, torch.stack(expected, dim=1))
    parts = manager.scores_by(resolution)
    assert len(parts) > 10
    assert_near(torch.stack(list(parts.values())).sum(0), manager.scores)


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_a_selection_still_sees_the_whole_gradient(text: tuple[Rows, Rows], val_mode: str) -> None:
    """A head that is left out shares its matrix with a table that is scored."""
    train, val = text
    model = models.tiny_gpt2().double()
    loss_fn = reference.causal_loss
    optimizer = warmed(model, torch.optim.AdamW, val, loss_fn, 2)
    whole = scored(model, optimizer, {"val_mode": val_mode}, train, val, loss_fn)
    by_layer, grads = whole.scores_by_layer, grads_of(model)
    model.zero_grad()
    selection = ghost.Selection(exclude=("lm_head",))
    part = scored(model, optimizer, {"val_mode": val_mode, "selection": selection}, train, val, loss_fn)
    assert_gradients(grads_of(model), grads)
    assert_near(part.scores, whole.scores - by_layer["lm_head"])


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_other_layers(val_mode: str) -> None:
    """Convolutions, a padded table, and several uses of one linear layer."""
    torch.manual_seed(0)
    for model, train, val in (_pictures(), _words()):
        loss_fn = reference.class_loss
        optimizer = warmed(model, torch.optim.AdamW, val, loss_fn, 2)
        expected = expected_scores(model, optimizer, train, val, loss_fn, LossReduction.SAMPLE_MEAN)
        plain = reference.gradient(model, loss_fn(model, *train))
        config = {"val_mode": val_mode, "loss_reduction": "sample_mean"}
        manager = scored(model, optimizer, config, train, val, loss_fn)
        assert_near(manager.scores, expected)
        assert_gradients(grads_of(model), plain)


def _pictures() -> tuple[nn.Module, Rows, Rows]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(54, 4),
    ).double()  # fmt: skip
    return model, *((torch.randn(n, 3, 7, 7).double(), models.classes(n)) for n in (4, 2))


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5, padding_idx=0)
        self.again = nn.Linear(5, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(torch.tanh(self.again(torch.tanh(self.again(x)))).mean(1))


def _words() -> tuple[nn.Module, Rows, Rows]:
    return _Words().double(), *((torch.randint(0, 9, (n, 6)), models.classes(n)) for n in (4, 2))


@pytest.mark.parametrize("touched", [0.0, 1.0])
def test_float32_keeps_five_digits(touched: float) -> None:
    """Of the same factors; whole models differ by more, since Adam makes full steps of what is rounding."""
    left, right = torch.randn(4, 9, 30), torch.randn(4, 9, 20)
    left[:, :, :10] = 0
    left[0, :, :5] = 1e-3  # rows that one sample moves
    m, v, p = torch.randn(30, 20) * touched, torch.rand(30, 20) * touched, torch.randn(30, 20)
    numbers = torch.tensor([0.5, 0.3, 0.9, 0.1, 1e-8, 0.01, 1.0], dtype=torch.float64)
    target = torch.randn(1, 30, 20)
    found = [
        adam_sum_and_dots(
            "outer", *(side.to(dtype) for side in (left, right)), None, 4, target.to(dtype), numbers,
            *(state.to(dtype) for state in (m, v, p)), None, None, 1 << 20, None,
        )
        for dtype in (torch.float32, torch.float64)
    ]  # fmt: skip
    for single, double in zip(*found, strict=True):
        assert_near(single, double, 1e-5)


def test_the_last_steps_clipping_is_taken_for_this_ones(text: tuple[Rows, Rows]) -> None:
    train, val = text
    model = models.tiny_gpt2().double()
    loss_fn = reference.causal_loss
    optimizer = warmed(model, torch.optim.AdamW, val, loss_fn, 1)
    config = {"preconditioner": "auto", "credit": "step", "loss_reduction": "causal_token_mean"}
    manager = GhostEngineManager(config, model, optimizer, val_data=val)

    def step(number: int) -> None:
        optimizer.zero_grad()
        with manager.step(*train, batch_idx=range(5), iteration=number) as step:
            step.backward(loss_fn(model, step.X, step.Y))

    step(0)
    for p in model.parameters():
        p.grad *= 0.25
    optimizer.step()
    manager.save_metrics(0)
    manager.detach_for_evaluation()
    parts = reference.sample_gradients(model, loss_fn, *train, LossReduction.CAUSAL_TOKEN_MEAN)
    clipped = [{name: 0.25 * grad for name, grad in part.items()} for part in parts]
    slopes = chord(model, optimizer, clipped)
    val_grad = reference.gradient(model, loss_fn(model, *val))
    weighted = {name: grad * slopes[name] for name, grad in val_grad.items()}
    manager.reattach_after_evaluation()
    step(1)
    assert_near(manager.scores, torch.stack([reference.dot(weighted, part) for part in parts]))


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_layers_that_are_not_scored_keep_their_own_gradient(val_mode: str) -> None:
    torch.manual_seed(0)
    model, loss_fn = models.mlp().double(), reference.class_loss
    train, val = models.table(4), models.table(3)
    train, val = ((X.double(), Y) for X, Y in (train, val))
    optimizer = warmed(model, torch.optim.AdamW, val, loss_fn, 1)
    plain = reference.gradient(model, loss_fn(model, *train))
    selection = ghost.Selection(include=("0",))
    config = {"val_mode": val_mode, "selection": selection, "loss_reduction": "sample_mean"}
    scored(model, optimizer, config, train, val, loss_fn)
    assert_gradients(grads_of(model), plain)


def test_several_micro_batches_of_images_in_another_order_of_memory() -> None:
    """The squares of earlier micro-batches are found again, however the optimizer's state lies."""
    torch.manual_seed(0)
    model, (X, Y), val = _pictures()
    loss_fn, found = reference.class_loss, []
    for order in (torch.contiguous_format, torch.channels_last):
        other = copy.deepcopy(model).to(memory_format=order)
        optimizer = warmed(other, torch.optim.AdamW, val, loss_fn, 2)
        config = {"preconditioner": "auto", "loss_reduction": "sample_mean", "gradient_accumulation_steps": 2}
        manager = GhostEngineManager(config, other, optimizer, val_data=val)
        for lo in (0, 2):
            rows = X[lo : lo + 2], Y[lo : lo + 2]
            with manager.step(*rows, batch_idx=[lo, lo + 1], iteration=0, last=lo == 2) as step:
                step.backward(loss_fn(other, step.X, step.Y))
        found.append(manager.scores)
    assert_near(found[1], found[0])


def _opened(text: tuple[Rows, Rows], **config: Any) -> tuple[GhostEngineManager, nn.Module]:
    _, val = text
    model = models.tiny_gpt2()
    optimizer = warmed(model, torch.optim.AdamW, val, reference.causal_loss, 1)
    config = {"preconditioner": "auto", "val_mode": "separate"} | config
    return GhostEngineManager(config, model, optimizer, val_data=val), model


def test_sums_of_squares_end_with_their_step() -> None:
    """They are as large as the model, and would stay through the optimizer's step and evaluations."""
    model, (X, Y), seen = models.mlp(), models.table(4), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {"preconditioner": "adam", "loss_reduction": "sample_mean", "gradient_accumulation_steps": 2}
    manager = GhostEngineManager(config, model, optimizer, val_data=models.table(3))
    for number in range(2):
        with manager.step(X, Y, batch_idx=range(4), iteration=0, last=number == 1) as step:
            seen = [weakref.ref(given[-1]) for given in manager.engine.state.moments.values()]
            step.backward(reference.class_loss(model, step.X, step.Y))
    gc.collect()
    assert seen
    assert [squares() for squares in seen] == [None] * len(seen)


def test_groups_that_the_optimizer_loads_later_are_read(text: tuple[Rows, Rows]) -> None:
    """`load_state_dict` gives an optimizer groups of its own, with the settings of the state."""
    train, val = text
    model, loss_fn = models.tiny_gpt2(), reference.causal_loss
    optimizer = warmed(model, torch.optim.AdamW, val, loss_fn, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0] |= {"betas": (0.5, 0.8), "eps": 1e-3}
    settings = {"preconditioner": "adam", "loss_reduction": "causal_token_mean", "credit": "step"}
    manager = GhostEngineManager(settings, model, optimizer, val_data=val)
    optimizer.load_state_dict(state)
    with manager.step(*train, batch_idx=range(5), iteration=0) as step:
        step.backward(loss_fn(model, step.X, step.Y))
    manager.detach_for_evaluation()
    reduction = LossReduction.CAUSAL_TOKEN_MEAN
    assert_near(manager.scores, expected_scores(model, optimizer, train, val, loss_fn, reduction))
    state["param_groups"][0]["amsgrad"] = True
    optimizer.load_state_dict(state)
    manager.reattach_after_evaluation()
    optimizer.zero_grad()
    with pytest.raises(GhostConfigError, match="does not know AdamW with amsgrad=True"):
        manager.attach_train_batch(*train, 1, range(5))


def test_a_second_backward_through_one_forward_is_refused(text: tuple[Rows, Rows]) -> None:
    manager, model = _opened(text)
    (X, Y), _ = text
    manager.attach_train_batch(X, Y, 0, range(5))
    loss = reference.causal_loss(model, X, Y)
    (loss / 2).backward(retain_graph=True)
    with pytest.raises(UnsupportedModelError, match=r"differentiated more often.*preconditioner='none'"):
        (loss / 2).backward()


def test_more_micro_batches_than_were_said_are_refused(text: tuple[Rows, Rows]) -> None:
    manager, model = _opened(text)
    (X, Y), _ = text
    for number in range(2):
        share = {"share": 0.5}
        if number:
            with pytest.raises(ProtocolError, match=r"more micro-batches than gradient_accumulation_steps=1"):
                manager.attach_train_batch(X, Y, 0, range(5), **share)
        else:
            manager.attach_train_batch(X, Y, 0, range(5), **share)
            (reference.causal_loss(model, X, Y) / 2).backward()


def test_gradients_of_another_step_are_refused(text: tuple[Rows, Rows]) -> None:
    manager, model = _opened(text)
    (X, Y), _ = text
    reference.causal_loss(model, X, Y).backward()
    with pytest.raises(ProtocolError, match=r"grad is not zero where a step begins"):
        manager.attach_train_batch(X, Y, 0, range(5))


def test_state_of_other_settings_is_refused(text: tuple[Rows, Rows]) -> None:
    manager, model = _opened(text)
    state = manager.state_dict()
    assert state["engine"]["clip"] == 1.0
    manager.cleanup()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(GhostConfigError, match=r"state is of a manager with a preconditioner"):
        GhostEngineManager({"val_mode": "separate"}, model, optimizer, val_data=text[1], state=state)


def test_verify_is_of_plain_scores(text: tuple[Rows, Rows]) -> None:
    (X, Y), val = text
    with pytest.raises(GhostConfigError, match=r"preconditioner='auto' is of a step that verify"):
        ghost.verify(models.tiny_gpt2(), {"preconditioner": "auto"}, (X, Y), val)


@pytest.mark.parametrize("warm_up", [0, 1])
@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_compiled(text: tuple[Rows, Rows], val_mode: str, warm_up: int) -> None:
    torch._dynamo.reset()
    train, val = text
    model = models.tiny_gpt2(tied=False).double()
    optimizer = warmed(model, torch.optim.AdamW, val, reference.causal_loss, warm_up)
    eager = scored(model, optimizer, {"val_mode": val_mode}, train, val, reference.causal_loss).scores
    model.zero_grad()
    config = {"val_mode": val_mode, "preconditioner": "auto", "credit": "step"}
    config |= {"loss_reduction": "causal_token_mean"}
    manager = GhostEngineManager(config, model, optimizer, val_data=val, loss_fn=reference.causal_loss)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with manager.step(*train, batch_idx=range(5), iteration=0) as step:
        step.backward(reference.causal_loss(compiled, step.X, step.Y))
    assert_near(manager.scores, eager)
    manager.cleanup()


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_a_tied_table_under_autocast(text: tuple[Rows, Rows], val_mode: str) -> None:
    """The head's gradients are narrower than the table's."""
    train, val = text
    model = models.tiny_gpt2().float()
    optimizer = warmed(model, torch.optim.AdamW, val, reference.causal_loss, 1)
    config = {"val_mode": val_mode}
    wide = scored(model, optimizer, config, train, val, reference.causal_loss).scores
    model.zero_grad()

    def narrow(model: nn.Module, X: Tensor, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return reference.causal_loss(model, X, Y)

    found = scored(model, optimizer, config, train, val, narrow).scores
    assert (found - wide).norm() < 0.05 * wide.norm()
    assert not torch.equal(found, wide)


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
@pytest.mark.parametrize("resolution", ["total", "head"])
def test_a_tied_tables_own_gradient_is_not_narrowed_by_its_heads(
    text: tuple[Rows, Rows], val_mode: str, resolution: str
) -> None:
    train, val = text
    model = models.tiny_gpt2().float()
    optimizer = warmed(model, torch.optim.AdamW, val, reference.causal_loss, 1)

    def narrow(model: nn.Module, X: Tensor, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return reference.causal_loss(model, X, Y)

    plain = reference.gradient(model, narrow(model, *train))
    scored(model, optimizer, {"val_mode": val_mode, "resolution": resolution}, train, val, narrow)
    found, expected = (grads["transformer.wte.weight"] for grads in (grads_of(model), plain))
    assert_near(found, expected, 0.02)
    assert not torch.equal(found, found.bfloat16().float())


def _weighed(b: int, decays: bool, accumulates: bool) -> tuple[Tensor, Tensor]:
    """A parameter's gradient and scores, of numbers that are the same at each call."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    numbers = torch.tensor([0.9, 0.1, 0.99, 0.01, 1e-8, 0.1 * decays, 2.0 if accumulates else 1.0]).double()
    left, right, targets = random(b, 3, 40), random(b, 3, 30), random(2, 40, 30)
    m, v, p = random(40, 30), random(40, 30) ** 2, random(40, 30)
    earlier = (random(40, 30), random(40, 30) ** 2) if accumulates else (None, None)
    total, dots = adam_sum_and_dots(
        "outer", left, right, None, b, targets, numbers, m, v, p, *earlier, 1 << 20, None
    )
    return total, dots


@pytest.mark.parametrize(
    ("b", "decays", "accumulates"), [(4, False, False), (1, True, False), (4, False, True)]
)
def test_compiled_arithmetic_is_the_same(
    b: int, decays: bool, accumulates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _weighed(b, decays, accumulates)
    monkeypatch.setattr(weigher, "COMPILED_FROM", 1)
    graphs = counters["stats"]["unique_graphs"]
    monkeypatch.setattr(weigher, "_weigh_compiled", CompiledWhereItWorks(weigher._weigh, "a test"))
    torch.testing.assert_close(_weighed(b, decays, accumulates), expected, rtol=1e-12, atol=1e-12)
    assert counters["stats"]["unique_graphs"] > graphs


def test_without_a_compiler_it_is_said_and_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler() -> str:
        raise InvalidCxxCompiler

    expected = _weighed(5, False, False)
    monkeypatch.setattr(weigher, "COMPILED_FROM", 1)
    monkeypatch.setattr(weigher, "_weigh_compiled", CompiledWhereItWorks(weigher._weigh, "a test"))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, logger="ghost"):
        torch.testing.assert_close(_weighed(5, False, False), expected)
        _weighed(5, False, False)
    assert (
        caplog.text.count("cannot compile a test, which takes several times as long so: install a C++") == 1
    )


class _Other(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("kind", "settings", "config", "message"),
    [
        (torch.optim.RMSprop, {}, {}, r"preconditioner='auto' does not know the optimizer RMSprop"),
        (_Other, {}, {}, r"does not know the optimizer _Other"),
        (torch.optim.SGD, {}, {"preconditioner": "adam"}, r"'adam' is for Adam and AdamW.*SGD"),
        (torch.optim.AdamW, {"amsgrad": True}, {}, r"AdamW with amsgrad=True"),
        (torch.optim.Adam, {"maximize": True}, {}, r"Adam with maximize=True"),
        (torch.optim.SGD, {}, {"credit": "step"}, r"credit='step' has no effect with SGD without momentum"),
        (torch.optim.AdamW, {}, {"algebra": "fused"}, r"algebra='fused' has no effect with precond"),
        (torch.optim.AdamW, {}, {"val_mode": "separate", "bitwise": True}, r"set bitwise=False"),
        (torch.optim.AdamW, {}, {"preconditioner": "none", "credit": "step"}, r"credit='step' has no effect"),
    ],
)
def test_refusals(
    text: tuple[Rows, Rows], kind: Make, settings: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    _, val = text
    model = models.tiny_gpt2()
    optimizer = kind(model.parameters(), lr=0.1, **settings)
    with pytest.raises(GhostConfigError, match=message):
        GhostEngineManager({"preconditioner": "auto"} | config, model, optimizer, val_data=val)
