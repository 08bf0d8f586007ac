"""What a step makes of a policy's decision: values, empty selections, scores like NaN, refusals."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import GhostConfigError, GhostEngineManager, LossReduction, ProtocolError, UnsupportedModelError
from ghost import verify as verify_engine
from ghost.policies import Policy, StepSamples, policy_of
from ghost.values import accumulate, read_shards, row_values
from tests.ghost import reference
from tests.ghost.harness import assert_gradients, assert_near
from tests.ghost.models import mlp, table, tiny_gpt2
from tests.ghost.policies.test_gradients import Loop, gram_of, weighted_mean
from tests.ghost.reference import Rows, causal_loss, class_loss
from tests.ghost.test_second_order import text

CAUSAL, BY_SAMPLE = LossReduction.CAUSAL_TOKEN_MEAN, LossReduction.SAMPLE_MEAN
CONFIG: dict[str, Any] = {"val_mode": "separate", "loss_reduction": BY_SAMPLE}


def test_values_credit_what_was_applied(tmp_path: Path) -> None:
    model, train, val = mlp(), table(5), table(3)
    scores = reference.scores(model, class_loss, train, val, BY_SAMPLE)
    loop = Loop(model, class_loss, val, {**CONFIG, "result_dir": str(tmp_path)}, {"name": "top_k", "k": 2})
    loop.step(train)
    kept = scores.topk(2).indices
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = 0.1 * 2.5 * scores[kept]
    assert loop.manager.weights.tolist() == [2.5 if i in kept else 0.0 for i in range(5)]
    loop.optimizer.step()
    loop.manager.cleanup()
    (shard,) = read_shards(tmp_path / "scores")
    assert_near(shard["score"], scores)  # as they were, whatever has become of them
    assert_near(row_values(shard), expected)
    assert_near(accumulate([shard]).value, expected)


def test_values_add_up_to_the_fall_in_loss(tmp_path: Path) -> None:
    """To first order, for the step that was taken and no other."""
    model, train, val = mlp(), table(5), table(3)
    loop = Loop(model, class_loss, val, {**CONFIG, "result_dir": str(tmp_path)}, "softmax")
    loop.optimizer.param_groups[0]["lr"] = 1e-4
    before = class_loss(model, *val).item()
    loop.step(train)
    loop.optimizer.step()
    loop.manager.cleanup()
    (shard,) = read_shards(tmp_path / "scores")
    fall = before - class_loss(model, *val).item()
    assert float(row_values(shard).sum()) == pytest.approx(fall, rel=1e-3)
    assert float(row_values({k: v for k, v in shard.items() if k != "weight"}).sum()) != pytest.approx(
        fall, rel=1e-3
    )


def test_without_a_policy_there_is_no_weight(tmp_path: Path) -> None:
    model, train, val = mlp(), table(5), table(3)
    loop = Loop(model, class_loss, val, {**CONFIG, "gram": True, "result_dir": str(tmp_path)}, None)
    loop.step(train)
    assert loop.manager.gram.shape == (5, 5)
    with pytest.raises(ProtocolError, match="no weights are known: they need a policy"):
        _ = loop.manager.weights
    loop.optimizer.step()
    loop.manager.cleanup()
    (shard,) = read_shards(tmp_path / "scores")
    assert "weight" not in shard


def test_the_gram_matrix_needs_to_be_asked_for() -> None:
    loop = Loop(mlp(), class_loss, table(3), CONFIG, "all")
    loop.step(table(5))
    with pytest.raises(ProtocolError, match="no Gram matrix is known: it needs gram=True"):
        _ = loop.manager.gram


def test_greedy_asks_for_the_gram_matrix_itself() -> None:
    model, train, val = mlp(), table(5), table(3)
    loop = Loop(model, class_loss, val, CONFIG, {"name": "greedy", "k": 2})
    found = loop.step(train)
    assert loop.manager.gram.shape == (5, 5)
    kept = (loop.manager.weights > 0).double().tolist()
    assert sum(kept) == 2
    assert_gradients(found, weighted_mean(model, class_loss, train, BY_SAMPLE, kept))


def test_a_step_that_keeps_no_sample_moves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, train, val = mlp(), table(5), table(3)
    config = {**CONFIG, "result_dir": str(tmp_path)}
    loop = Loop(model, class_loss, val, config, {"name": "threshold", "above": 1e9})
    loop.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    with caplog.at_level(logging.INFO):
        loop.step(train)
        loop.step(train, iteration=1)
    said = [r for r in caplog.records if "policy threshold kept no sample" in r.getMessage()]
    assert [r.levelno for r in said] == [logging.WARNING, logging.INFO]  # the first of a run
    assert all(p.grad is None for p in model.parameters())
    loop.optimizer.step()
    loop.manager.cleanup()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    (shard,) = read_shards(tmp_path / "scores")
    assert row_values(shard).tolist() == [0.0] * 10


def test_a_scaler_needs_a_gradient() -> None:
    loop = Loop(
        mlp(), class_loss, table(3), CONFIG, {"name": "threshold", "above": 1e9},
        scaler=torch.amp.GradScaler("cpu"),
    )  # fmt: skip
    with pytest.raises(ProtocolError, match="kept no sample of step 0, and a GradScaler takes no step"):
        loop.step(table(5))


def test_scores_that_are_not_finite_leave_an_ordinary_step(caplog: pytest.LogCaptureFixture) -> None:
    """What was made to stop or to skip such steps sees in the gradient what it would without a policy."""
    model, (X, Y), val = mlp(), table(5), table(3)
    X = X.clone()
    X[2] = torch.inf
    loop = Loop(model, class_loss, val, CONFIG, "top_k")
    found = loop.step((X, Y))
    assert "step 0 has scores that are not finite, so policy top_k is not asked" in caplog.text
    assert loop.manager.weights.tolist() == [1.0] * 5
    assert not all(grad.isfinite().all() for grad in found.values())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (torch.ones(4), r"policy 'function' gave \[4\] for a step of 5 samples"),
        ([1.0] * 5, r"policy 'function' gave \[1.0, 1.0"),
        (torch.tensor([1.0, 1, 1, 1, -1]), "gave the weight -1.0: weights should be finite and not negative"),
        (torch.tensor([1.0, 1, 1, 1, torch.nan]), "gave the weight nan"),
    ],
)
def test_weights_that_cannot_be(given: Any, match: str) -> None:
    loop = Loop(mlp(), class_loss, table(3), CONFIG, lambda samples: given)
    with pytest.raises(ProtocolError, match=match):
        loop.step(table(5))


def test_whole_numbers_and_masks_are_weights() -> None:
    model, train = mlp(), table(5)
    for weigh in (lambda s: s.scores > s.scores.median(), lambda s: (s.scores > s.scores.median()).long()):
        loop = Loop(model, class_loss, table(3), CONFIG, weigh)
        loop.step(train)
        assert int((loop.manager.weights > 0).sum()) == 2
        loop.manager.cleanup()


def test_a_step_that_failed_can_be_taken_again() -> None:
    """A policy that raises leaves nothing behind."""
    model, train, val = mlp(), table(5), table(3)
    fails = [True, False]

    def weigh(samples: StepSamples) -> Tensor:
        if fails.pop(0):
            raise ValueError("of one's own")
        return torch.ones(5)

    loop = Loop(model, class_loss, val, CONFIG, weigh)
    with pytest.raises(ValueError, match="of one's own"):
        loop.step(train)
    assert_gradients(loop.step(train), reference.gradient(model, class_loss(model, *train)))


def test_nothing_is_kept_after_the_step() -> None:
    loop = Loop(mlp(), class_loss, table(3), CONFIG, "all")
    loop.step(table(5))
    assert list(loop.manager.engine.kept.uses()) == []  # type: ignore[attr-defined]


def test_no_policy_by_name_is_the_ordinary_step() -> None:
    model, train = mlp(), table(5)
    loop = Loop(model, class_loss, table(3), {**CONFIG, "policy": "top_k"}, {"name": "none"})
    assert loop.manager.config.policy is None
    assert_gradients(loop.step(train), reference.gradient(model, class_loss(model, *train)))


def test_a_policy_without_a_name() -> None:
    class Half(Policy):
        def weigh(self, samples: StepSamples) -> Tensor:
            return torch.ones(4)

    loop = Loop(mlp(), class_loss, table(3), CONFIG, Half())
    with pytest.raises(ProtocolError, match=r"policy 'own' gave \[4\] for a step of 5 samples"):
        loop.step(table(5))


# --- the optimizer's step -----------------------------------------------------------------------------------


def test_an_optimizer_step_before_the_gradient_is_there() -> None:
    model, (X, Y) = mlp(), table(5)
    loop = Loop(model, class_loss, table(3), CONFIG, "all")
    early = r"optimizer\.step\(\) came before the end of step 0, where policy='all' fills \.grad"
    with loop.manager.step(X, Y, batch_idx=range(5), iteration=0) as step:
        step.backward(class_loss(model, step.X, step.Y))
        with pytest.raises(ProtocolError, match=early):
            loop.optimizer.step()
    loop.optimizer.step()
    with loop.manager.step(X[:2], Y[:2], batch_idx=range(2), iteration=1, last=False) as step:
        step.backward(class_loss(model, step.X, step.Y))
    with pytest.raises(ProtocolError, match="before the end of step 1"):  # between micro-batches
        loop.optimizer.step()
    loop.manager.prepare_gradients()
    loop.optimizer.step()
    loop.manager.cleanup()


def test_an_optimizer_step_around_the_whole_of_it() -> None:
    model, (X, Y) = mlp(), table(5)
    loop = Loop(model, class_loss, table(3), CONFIG, "all")
    expected = [p.detach() - 0.1 * p.grad for p in _with_gradients(model, (X, Y))]
    manager = loop.manager
    manager.attach_train_batch(X, Y, 0, range(5))

    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        loss = class_loss(model, *manager.prepare_forward_input(X, Y))
        loss.backward()
        manager.prepare_gradients()
        return loss

    loop.optimizer.step(closure)
    for p, moved in zip(model.parameters(), expected, strict=True):
        assert_near(p.detach(), moved)


def _with_gradients(model: nn.Module, rows: Rows) -> list[Any]:
    class_loss(model, *rows).backward()
    return list(model.parameters())


# --- rows that have no part in the loss ---------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "policy",
    [
        {"name": "top_k", "k": 4}, {"name": "top_k", "k": 0.5}, {"name": "bottom_k", "k": 4}, "all",
        {"name": "greedy", "k": 4}, {"name": "curriculum", "start": [0.6, 1.0], "end": [0.6, 1.0]},
    ],
)  # fmt: skip
def test_rows_without_a_label_are_not_chosen(policy: Any, sign: int) -> None:
    """Their score of zero is larger than that of a sample that harms."""
    model, (X, Y), (V, W) = mlp(), table(7), table(3)
    counted = torch.tensor([True, False, True, True, False, True, True])
    Y = Y.where(counted, -100)
    rows = X[counted], Y[counted]

    def loss_fn(model: nn.Module, X: Any, Y: Tensor) -> Tensor:
        return class_loss(model, X, Y) * (sign if len(Y) == 3 else 1)  # of the validation rows

    scores = sign * reference.scores(model, class_loss, rows, (V, W), BY_SAMPLE)
    parts = reference.sample_gradients(model, class_loss, *rows, BY_SAMPLE)
    chosen = policy_of(policy)
    assert chosen is not None
    u = chosen.weigh(StepSamples(scores, torch.arange(5), 0, 0.1, gram_of(parts)))
    loop = Loop(model, loss_fn, (V, W), CONFIG, policy)
    found = loop.step((X, Y))
    expected = torch.zeros(7, dtype=torch.float64)
    expected[counted] = u * 5 / u.sum()
    assert_near(loop.manager.weights, expected)
    assert_gradients(found, weighted_mean(model, class_loss, rows, BY_SAMPLE, u.tolist()))


def test_a_policy_is_told_of_rows_with_a_label_alone() -> None:
    model, (X, Y), val = mlp(), table(5), table(3)
    Y = Y.where(torch.arange(5) != 2, -100)
    seen: list[StepSamples] = []

    def noted(samples: StepSamples) -> Tensor:
        seen.append(samples)
        return torch.ones(4)

    config = {**CONFIG, "order": 2, "gram": True}
    loop = Loop(model, class_loss, val, config, noted)
    loop.step((X, Y))
    counted = [0, 1, 3, 4]
    assert seen[0].indices.tolist() == counted
    assert_near(seen[0].scores, loop.manager.scores[counted])
    assert seen[0].gram is not None
    assert seen[0].curvatures is not None
    assert_near(seen[0].gram, loop.manager.gram[counted][:, counted])
    assert_near(seen[0].curvatures, loop.manager.curvatures[counted])
    assert loop.manager.weights.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]


def test_a_step_without_any_label_asks_no_policy() -> None:
    def loss_fn(model: nn.Module, X: Any, Y: Tensor) -> Tensor:
        total = nn.functional.cross_entropy(model(X), Y, reduction="sum")
        return total / (Y != -100).sum().clamp(min=1)

    def never(samples: StepSamples) -> Tensor:
        raise AssertionError(samples)

    model, (X, Y) = mlp(), table(5)
    loop = Loop(model, loss_fn, table(3), CONFIG, never)
    loop.step((X, torch.full_like(Y, -100)))
    assert loop.manager.weights.tolist() == [0.0] * 5
    assert all(p.grad is None for p in model.parameters())


def test_verify_checks_the_gradients_way_through_the_factors() -> None:
    for mode in ("concat", "separate"):
        config = {"val_mode": mode, "loss_reduction": CAUSAL, "policy": {"name": "top_k", "k": 1}}
        assert verify_engine(tiny_gpt2(), config, text(4), text(3), causal_loss).passed


# --- refusals -----------------------------------------------------------------------------------------------


def made(model: nn.Module, config: dict[str, Any]) -> GhostEngineManager:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return GhostEngineManager(config, model, optimizer, val_data=table(3), loss_fn=class_loss)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bitwise": True}, "policy='all' takes the layers' backward into its own hands: set bitwise=False"),
        ({"preconditioner": "auto"}, "preconditioner='auto' scores the optimizer's step on the whole batch"),
        ({"algebra": "fused"}, "algebra='fused' has no effect with policy='all', where no gradient"),
        ({"algebra": "fused", "val_mode": "concat"}, "algebra='fused' has no effect with policy='all'"),
        ({"algebra": "fused", "val_mode": "concat", "policy": None, "gram": True}, "effect with gram=True"),
        ({"engine": "regular"}, "engine='regular' has no scores by which a step's samples could be weighed"),
        ({"loss_reduction": None}, "loss_reduction cannot be inferred for Sequential: .* leave policy out"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(GhostConfigError, match=match):
        made(mlp(), {**CONFIG, "policy": "all", **settings})


def test_the_gram_matrix_alone_is_named_in_refusals() -> None:
    with pytest.raises(GhostConfigError, match="gram=True takes the layers' backward"):
        made(mlp(), {**CONFIG, "gram": True, "bitwise": True})


def test_a_hook_on_a_gradient_would_be_passed_by() -> None:
    model = mlp()
    model[0].weight.register_hook(lambda grad: grad)
    with pytest.raises(UnsupportedModelError, match=r"0\.weight has a hook on its gradient"):
        made(model, {**CONFIG, "policy": "all"})


def test_a_parameter_that_is_read_outside_its_layer_is_refused() -> None:
    class Stray(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self[0].weight.sum()

    model = Stray(*mlp()).double()
    loop = Loop(model, class_loss, table(3), CONFIG, "all")
    with pytest.raises(UnsupportedModelError, match=r"'0\.weight' is used outside its layer"):
        loop.step(table(5))
