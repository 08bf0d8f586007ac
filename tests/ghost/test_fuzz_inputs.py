"""Whatever is given, the library takes it and is exact, or refuses it with an error of its own and leaves the
model as it was.
"""

from collections.abc import Mapping
from dataclasses import make_dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ghost import GhostConfig, GhostEngineManager, GhostError, LossReduction, Selection
from ghost.batch import Inputs, Items
from ghost.nesting import leaves
from tests.ghost import reference
from tests.ghost.harness import MODES, Scored, assert_gradients, assert_near, grads_of, scored_step
from tests.ghost.reference import Rows

always_the_same = settings(
    deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
modes = st.sampled_from(list(MODES.values()))
BY_SAMPLE = LossReduction.SAMPLE_MEAN


def assert_one_sentence(error: GhostError) -> None:
    """A message on one line that ends as a sentence does."""
    assert str(error).endswith(".")
    assert "\n" not in str(error)


# --- settings ----------------------------------------------------------------------------------------------

KEYS = (
    "engine", "method", "val_mode", "val_batch_size", "val_every", "bitwise", "loss_reduction", "algebra",
    "selection", "score_dtype", "storage_dtype", "gradient_accumulation_steps", "result_dir", "save_interval",
    "dot_prod_save_interval", "pairwise", "preconditioner", "learning_rate", "proj_rank_total",
)  # fmt: skip
WORDS = (
    "graddotprod", "regular", "concat", "separate", "auto", "fused", "token_token", "target", "sample_mean",
    "sum", "float32", "bf16", "float16", "none", "",
)  # fmt: skip
setting_values = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.sampled_from(WORDS), st.text(max_size=3),
    st.sampled_from([torch.float32, torch.int64, LossReduction.SUM, Selection(), object(), torch.zeros(2)]),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)  # fmt: skip
given_settings = st.dictionaries(st.sampled_from(KEYS), setting_values, max_size=3).map(
    lambda values: {"loss_reduction": "sample_mean"} | values
)


def as_dataclass(values: Mapping[str, Any]) -> Any:
    return make_dataclass("Settings", values)(**values)


@settings(always_the_same, max_examples=300)
@given(values=given_settings, kind=st.sampled_from([dict, as_dataclass, lambda v: SimpleNamespace(**v)]))
def test_settings_of_any_value(values: dict[str, Any], kind: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        config = GhostConfig.read(kind(values))
        assert GhostConfig.read(config) == config
        rows = (torch.randn(2, 3), torch.tensor([0, 1]))
        GhostEngineManager(kind(values), model, optimizer, val_data=rows).cleanup()
    except GhostError as error:
        assert_one_sentence(error)
    assert "forward" not in vars(model[0])
    assert not optimizer._optimizer_step_pre_hooks


# --- batches -----------------------------------------------------------------------------------------------


class Flexible(nn.Module):
    """Classes from `x` `[b, …, 3]` and any number of tensors `[b, 2]` somewhere in `extra`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor, extra: Any = None, scale: Any = 1.0, **ignored: Any) -> Tensor:
        del ignored
        more = [value for _, value in leaves(extra) if isinstance(value, Tensor) and value.dim() == 2]
        hidden = self.first(x)
        hidden = hidden.flatten(1, -2).mean(1) if hidden.dim() > 2 else hidden
        if more:
            hidden = hidden + self.second(torch.stack(more, 1)).mean(1)
        return self.third(torch.tanh(hidden * scale))


def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Cross-entropy of classes."""
    return F.cross_entropy(model(X) if isinstance(X, Tensor) else model(**X), Y)


def good(rows: int) -> Rows:
    """A batch that has all that the model takes."""
    extra = {"a": torch.randn(rows, 2).double(), "b": [torch.randn(rows, 2).double(), None, "word"]}
    items = Items(torch.randn(2, 5).double(), torch.tensor([0, rows - 1]))
    X = {"x": torch.randn(rows, 3).double(), "extra": extra, "items": items, "scale": 0.5, "name": "n"}
    return X, torch.randint(0, 4, (rows,))


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
dtypes = st.sampled_from(
    [torch.float64, torch.float32, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
tensors = st.builds(lambda shape, dtype, fill: torch.full(shape, fill).to(dtype), shapes, dtypes,
    st.sampled_from([0.0, 1.0, float("nan"), -100.0]))  # fmt: skip
items = st.builds(Items, tensors, st.one_of(tensors, st.lists(st.integers(0, 4)).map(torch.tensor)))
values = st.recursive(
    st.one_of(tensors, items, st.none(), st.text(max_size=2), st.integers(-3, 3), st.floats()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.tuples(inner),
        st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    ),
    max_leaves=3,
)
keys = st.sampled_from(["x", "extra", "items", "scale", "name", "attention_mask", "labels", "new"])


@st.composite
def batches(draw: st.DrawFn, full: bool, most: int) -> tuple[Any, Any]:
    """A good batch with up to `most` things changed, or now and then anything."""
    rows = draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 99)))
    X, Y = good(rows)
    if not full:
        X = {"x": X["x"]}
    for _ in range(draw(st.integers(0, most))):
        what = draw(st.sampled_from(["set", "set", "scale", "delete", "bare", "labels", "any"]))
        if what == "set" and isinstance(X, dict):
            X[draw(keys)] = draw(values)
        elif what == "scale" and isinstance(X, dict):
            X["scale"] = draw(st.sampled_from([2.0, torch.tensor(2.0)]))
        elif what == "delete" and isinstance(X, dict):
            X.pop(draw(keys), None)
        elif what == "bare" and isinstance(X, dict):
            X = X.get("x")
        elif what == "labels":
            Y = draw(st.one_of(values, st.just(F.one_hot(torch.arange(rows), 4).double())))
        elif what == "any":
            X = draw(values)
    return X, Y


@st.composite
def steps(draw: st.DrawFn) -> tuple[Any, Any, Any]:
    """Training batch, validation batch and sample ids, one of them at least as it should be."""
    full, wrong = draw(st.booleans()), draw(st.sampled_from(["train", "val", "both", "ids"]))
    train = draw(batches(full, 2 if wrong in ("train", "both") else 0))
    val = draw(batches(full, 2 if wrong in ("val", "both") else 0))
    if wrong == "both" and draw(st.booleans()):
        val = train
    rows = len(train[1]) if isinstance(train[1], Tensor) and train[1].dim() else 1
    return train, val, draw(values) if wrong == "ids" else range(rows)


USERS_OWN = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)
"""What a model or loss raises by itself when its input makes no sense."""


def fits(model: nn.Module, X: Any, Y: Any) -> bool:
    """Whether the model and its loss take the batch without the library."""
    try:
        return bool(torch.isfinite(loss(model, X, Y)))
    except USERS_OWN:
        return False


class NotForTheModel(Exception):
    """Ends a step whose batch the model does not take by itself."""


def fuzzed_step(model: nn.Module, mode: dict[str, Any], train: Any, val: Any, ids: Any) -> Scored | None:
    """One step; None where it was refused, or the model takes one of the batches not even by itself."""
    model.zero_grad()
    takes = fits(model, *train) and fits(model, *val)
    if mode["val_mode"] == "separate" and not takes:
        val = good(2)  # the validation pass is the model's own
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = None
    try:
        config = mode | {"loss_reduction": BY_SAMPLE}
        manager = GhostEngineManager(config, model, optimizer, val_data=val, loss_fn=loss)
        with manager.step(*train, batch_idx=ids, iteration=0) as step:
            if not takes:
                raise NotForTheModel
            step.backward(loss(model, step.X, step.Y))
        return Scored(manager.scores, manager.scores_by_layer, grads_of(model))
    except NotForTheModel:
        return None
    except GhostError as error:
        assert_one_sentence(error)
        return None
    finally:
        if manager is not None:
            manager.cleanup()


@settings(always_the_same, max_examples=250)
@given(step=steps(), mode=modes)
def test_batches_of_any_kind(step: Any, mode: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, (train, val, ids) = Flexible(), step
    found = fuzzed_step(model, mode, train, val, ids)
    if found is not None:
        expected = reference.scores(model, loss, train, val, BY_SAMPLE)
        assert_near(found.scores, expected)
        assert_gradients(found.grads, reference.gradient(model, loss(model, *train)))
    assert not any("forward" in vars(module) for module in model.modules())
    rows = good(3), good(2)
    expected = reference.scores(model, loss, *rows, BY_SAMPLE)
    assert_near(scored_step(model, mode | {"loss_reduction": BY_SAMPLE}, *rows, loss).scores, expected)


# --- arguments beside the batch ----------------------------------------------------------------------------


@settings(always_the_same, max_examples=100)
@given(argument=st.sampled_from(["iteration", "share", "loss", "val_data"]), value=values, mode=modes)
def test_arguments_of_any_kind(argument: str, value: Any, mode: dict[str, Any]) -> None:
    model, (X, Y), val_data = Flexible(), good(3), good(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"iteration": 0, "share": 1.0} | {argument: value}
    config = mode | {"loss_reduction": BY_SAMPLE}
    manager = None
    try:
        manager = GhostEngineManager(
            config, model, optimizer, val_data=value if argument == "val_data" else val_data, loss_fn=loss
        )
        chosen = {key: arguments[key] for key in ("iteration", "share")}
        with manager.step(X, Y, batch_idx=range(3), **chosen) as step:
            step.backward(value if argument == "loss" else loss(model, step.X, step.Y))
    except GhostError as error:
        assert_one_sentence(error)
    finally:
        if manager is not None:
            manager.cleanup()
    assert not any("forward" in vars(module) for module in model.modules())
