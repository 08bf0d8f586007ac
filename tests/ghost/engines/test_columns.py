"""Several columns of scores in one pass: every pair of a training and a validation sample, and named sets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import GhostConfigError, GhostEngineManager, LossReduction
from ghost.loss import count
from ghost.scores import read_columns
from ghost.values import accumulate, read_shards
from tests.ghost import reference
from tests.ghost.engines.test_shared import Universal, id_rows, token_loss
from tests.ghost.harness import EXACT, MODES, assert_gradients, assert_near, grads_of
from tests.ghost.models import mlp, table, tiny_gpt2, tokens, with_ignored
from tests.ghost.reference import LossFn, Rows, causal_loss, class_loss, class_loss_sum

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
CAUSAL, SAMPLE_MEAN = LossReduction.CAUSAL_TOKEN_MEAN, LossReduction.SAMPLE_MEAN


def uneven(rows: int) -> Rows:
    """Token rows of several lengths; one of three rows or more counts nothing."""
    ids = tokens(rows, 9)
    return ids, with_ignored(ids, [9, 6, 1, 4, 7, 8][:rows])


def step_scores(
    model: nn.Module, config: dict[str, Any], train: Rows, val: Any, loss_fn: LossFn, reduction: LossReduction
) -> Tensor:
    """Scores of one step, whose gradients are checked on the way."""
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"loss_reduction": reduction, **config}
    manager = GhostEngineManager(config, model, optimizer, val_data=val, loss_fn=loss_fn)
    with manager.step(*train, batch_idx=range(len(train[1])), iteration=0) as step:
        step.backward(loss_fn(model, step.X, step.Y))
    scores, by_layer = manager.scores, manager.scores_by_layer
    assert_near(torch.stack(list(by_layer.values())).sum(0), scores)
    assert_gradients(grads_of(model), reference.gradient(model, loss_fn(model, *train)))
    manager.cleanup()
    return scores


def expected_pairs(
    model: nn.Module, loss_fn: LossFn, train: Rows, val: Rows, reduction: LossReduction
) -> Tensor:
    """`⟨g_i, h_j⟩` with `Σ_j h_j = ∇L_val`."""
    mine = reference.sample_gradients(model, loss_fn, *train, reduction)
    theirs = reference.sample_gradients(model, loss_fn, *val, reduction)
    return torch.stack([torch.stack([reference.dot(g, h) for h in theirs]) for g in mine])


CASES: dict[str, tuple[Any, Any, Any, LossFn, LossReduction]] = {
    "mlp": (mlp, table, table, class_loss, SAMPLE_MEAN),
    "sum": (mlp, table, table, class_loss_sum, LossReduction.SUM),
    "tied gpt2": (tiny_gpt2, uneven, uneven, causal_loss, CAUSAL),
    "untied gpt2": (lambda: tiny_gpt2(tied=False), uneven, uneven, causal_loss, CAUSAL),
    "shared layers": (
        Universal, lambda n: id_rows(n, 4), lambda n: id_rows(n, 4), token_loss, LossReduction.TOKEN_MEAN,
    ),
}  # fmt: skip

each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@each_mode
@each_case
def test_pairs(case: Any, mode: dict[str, Any]) -> None:
    make, rows, val_rows, loss_fn, reduction = case
    model, train, val = make(), rows(5), val_rows(3)
    scores = step_scores(model, mode | {"pairwise": True}, train, val, loss_fn, reduction)
    assert scores.shape == (5, 3)
    assert_near(scores, expected_pairs(model, loss_fn, train, val, reduction))
    total = step_scores(model, mode, train, val, loss_fn, reduction)
    assert_near(scores.sum(1), total)


@pytest.mark.parametrize("algebra", ["token_token", "target", "fused"])
@pytest.mark.parametrize("name", ["mlp", "tied gpt2"])
def test_pairs_by_every_algebra(name: str, algebra: str) -> None:
    make, rows, val_rows, loss_fn, reduction = CASES[name]
    model, train, val = make(), rows(5), val_rows(3)
    config = {"pairwise": True, "algebra": algebra}
    scores = step_scores(model, config, train, val, loss_fn, reduction)
    assert_near(scores, expected_pairs(model, loss_fn, train, val, reduction))


@each_mode
@each_case
def test_named_sets(case: Any, mode: dict[str, Any]) -> None:
    """Each set is an objective of its own, with its own mean."""
    make, rows, val_rows, loss_fn, reduction = case
    model, train = make(), rows(5)
    val = {"one": val_rows(1), "several": val_rows(4), "two": val_rows(2)}
    scores = step_scores(model, mode, train, val, loss_fn, reduction)
    assert scores.shape == (5, 3)
    for column, (name, part) in enumerate(val.items()):
        assert name in val
        assert_near(scores[:, column], reference.scores(model, loss_fn, train, part, reduction))


def test_sets_take_turns_each_in_its_own_rows() -> None:
    model, train = mlp(), table(4)
    val = {"a": table(3), "b": table(1), "c": table(4)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"loss_reduction": "sample_mean", "val_batch_size": 2}
    manager = GhostEngineManager(config, model, optimizer, val_data=val)
    for t in range(3):
        with manager.step(*train, batch_idx=range(4), iteration=t) as step:
            assert len(step.Y) == 4 + 2 + 1 + 2
            step.backward(class_loss(model, step.X, step.Y))
        turns = {"a": [(2 * t) % 3, (2 * t + 1) % 3], "b": [0], "c": [(2 * t) % 4, (2 * t + 1) % 4]}
        for column, (name, (X, Y)) in enumerate(val.items()):
            part = X[turns[name]], Y[turns[name]]
            expected = reference.scores(model, class_loss, train, part, SAMPLE_MEAN)
            assert_near(manager.scores[:, column], expected)
    manager.cleanup()


@each_mode
def test_columns_go_to_the_shards(tmp_path: Path, mode: dict[str, Any]) -> None:
    model, train = mlp(), table(4)
    val = {"code": table(3), "docs": table(2)}
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    config = mode | {"loss_reduction": "sample_mean", "result_dir": str(tmp_path), "resolution": "layer"}
    manager = GhostEngineManager(config, model, optimizer, val_data=val, loss_fn=class_loss)
    expected = torch.zeros(4, dtype=torch.float64)
    for t in range(2):
        optimizer.zero_grad()
        with manager.step(*train, batch_idx=range(4), iteration=t) as step:
            step.backward(class_loss(model, step.X, step.Y))
        by_layer = manager.scores_by("layer")
        expected += 0.1 * by_layer["0"].sum(1) + 0.5 * by_layer["2"].sum(1)
        optimizer.step()
    manager.cleanup()
    (path,) = (tmp_path / "scores").glob("shard-*.pt")
    columns = read_columns(path)
    assert [(c.part, c.lr_group, c.val) for c in columns] == [
        ("0", 0, "code"), ("0", 0, "docs"), ("2", 1, "code"), ("2", 1, "docs"),
    ]  # fmt: skip
    found = accumulate(read_shards(tmp_path / "scores"))
    assert_near(found.value, expected)


def test_pairs_with_named_sets_are_refused() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"loss_reduction": "sample_mean", "pairwise": True}
    with pytest.raises(GhostConfigError, match=r"pairwise=True .* sets \['a', 'b'\]"):
        GhostEngineManager(config, model, optimizer, val_data={"a": table(2), "b": table(2)})


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ({}, r"val_data is an empty mapping"),
        ({"a": table(2), "b": 3}, r"val_data\['b'\] should be \(X_val, Y_val\)"),
        ({"a": (torch.zeros(0, 5), torch.zeros(0))}, r"val_data\['a'\] is empty"),
    ],
)
def test_sets_that_cannot_work(val: Any, message: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        GhostEngineManager({"loss_reduction": "sample_mean"}, model, optimizer, val_data=val)


def test_a_pair_counts_as_its_row_does_in_the_mean() -> None:
    """Rows of more labels weigh more; a row of none has a column of zeros."""
    model, train, val = tiny_gpt2(), uneven(4), uneven(3)
    scores = step_scores(model, {"pairwise": True}, train, val, causal_loss, CAUSAL)
    assert count(val[1][2:], CAUSAL) == 0
    assert scores[:, 2].eq(0).all()
    alone = reference.scores(model, causal_loss, train, (val[0][:1], val[1][:1]), CAUSAL)
    share = int(count(val[1][:1], CAUSAL)) / int(count(val[1], CAUSAL))
    assert_near(scores[:, 0], alone * share, EXACT)
