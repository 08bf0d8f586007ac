"""After a step with a policy `.grad` is the gradient of the reweighted batch, exactly."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import GhostEngineManager, LossReduction, ProtocolError, Selection, kept_gram
from ghost.batch import Items, row_count
from ghost.loss import row_counts
from ghost.policies import StepSamples
from tests.ghost import reference
from tests.ghost.harness import assert_gradients, assert_near, grads_of
from tests.ghost.models import mlp, table, tiny_gpt2
from tests.ghost.reference import Gradient, LossFn, Rows, causal_loss, class_loss, class_loss_sum
from tests.ghost.test_gram import Tagger
from tests.ghost.test_second_order import CASES, text

CAUSAL, BY_SAMPLE = LossReduction.CAUSAL_TOKEN_MEAN, LossReduction.SAMPLE_MEAN
U = (0.5, 0.0, 2.0, 0.0, 1.25)
"""Weights, before they are normalised."""

both_modes = pytest.mark.parametrize("mode", ["concat", "separate"])


def given(samples: StepSamples) -> Tensor:
    return torch.tensor(U, dtype=torch.float64)[: len(samples.indices)]


def weighted_mean(
    model: nn.Module, loss_fn: LossFn, rows: Rows, reduction: LossReduction, weights: Sequence[float] = U
) -> Gradient:
    """The gradient of `Σ u_i n_i l_i / Σ u_i n_i` (for a sum `Σ u_i l_i`), by a batch-size-1 loop."""
    parts = reference.sample_gradients(model, loss_fn, *rows, reduction)
    scale = 1.0
    if reduction is not LossReduction.SUM:
        sizes = row_counts(rows[1], reduction).tolist()
        scale = sum(sizes) / sum(u * n for u, n in zip(weights, sizes, strict=True))
    return {
        name: sum(u * scale * part[name] for u, part in zip(weights, parts, strict=True))  # type: ignore[misc]
        for name in parts[0]
    }


def products(model: nn.Module, loss_fn: LossFn, rows: Rows, reduction: LossReduction) -> Tensor:
    """`⟨g_i, g_j⟩`, `[B, B]`, by a batch-size-1 loop."""
    return gram_of(reference.sample_gradients(model, loss_fn, *rows, reduction))


def gram_of(gradients: Sequence[Gradient]) -> Tensor:
    return torch.stack([torch.stack([reference.dot(a, b) for b in gradients]) for a in gradients])


class Loop:
    """A loop's own lines around one manager."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, val: Any, config: dict[str, Any], policy: Any = given,
        called: nn.Module | None = None, scaler: Any = None,
    ) -> None:  # fmt: skip
        self.model, self.called, self.loss_fn = model, model if called is None else called, loss_fn
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.manager = GhostEngineManager(
            config, self.called, self.optimizer, val_data=val, loss_fn=loss_fn, policy=policy, scaler=scaler
        )

    def step(self, *parts: Rows, shares: Sequence[float | None] = (None,), iteration: int = 0) -> Gradient:
        """The gradient that the optimizer gets."""
        self.optimizer.zero_grad()
        first = 0
        for number, ((X, Y), share) in enumerate(zip(parts, shares, strict=True), start=1):
            rows, last = range(first, first + row_count(X, "batch")), number == len(parts)
            with self.manager.step(X, Y, batch_idx=rows, iteration=iteration, share=share, last=last) as step:
                step.backward(self.loss_fn(self.called, step.X, step.Y))
            first = rows.stop
        return grads_of(self.model)


@both_modes
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_gradient_is_that_of_the_reweighted_batch(case: Any, mode: str) -> None:
    make, draw, loss_fn, reduction = case
    model, train, val = make(), draw(5), draw(3)
    scores = reference.scores(model, loss_fn, train, val, reduction)
    expected = weighted_mean(model, loss_fn, train, reduction)
    loop = Loop(model, loss_fn, val, {"val_mode": mode, "loss_reduction": reduction, "gram": True})
    assert_gradients(loop.step(train), expected)
    assert_near(loop.manager.scores, scores)
    assert_near(loop.manager.gram, products(model, loss_fn, train, reduction))


@both_modes
def test_autograd_of_the_reweighted_loss_itself(mode: str) -> None:
    """No per-sample loop: one loss, written out."""
    model, train, val = mlp(), table(5), table(3)
    u = torch.tensor(U, dtype=torch.float64)
    rows = nn.functional.cross_entropy(model(train[0]), train[1], reduction="none")
    expected = reference.gradient(model, (u * rows).sum() / u.sum())
    loop = Loop(model, class_loss, val, {"val_mode": mode, "loss_reduction": BY_SAMPLE})
    assert_gradients(loop.step(train), expected)
    assert_near(loop.manager.weights, u * 5 / u.sum())


@both_modes
def test_three_uses_of_one_matrix(mode: str) -> None:
    model, train, val = Tagger().double(), text(5), text(3)
    expected = weighted_mean(model, reference.token_loss, train, LossReduction.TOKEN_MEAN)
    config = {"val_mode": mode, "loss_reduction": LossReduction.TOKEN_MEAN, "gram": True}
    loop = Loop(model, reference.token_loss, val, config)
    assert_gradients(loop.step(train), expected)
    assert_near(loop.manager.gram, products(model, reference.token_loss, train, LossReduction.TOKEN_MEAN))


@both_modes
@pytest.mark.parametrize("tied", [True, False])
def test_layers_that_are_not_scored_are_weighed_as_well(mode: str, tied: bool) -> None:
    model, train, val = tiny_gpt2(tied=tied), text(5), text(3)
    expected = weighted_mean(model, causal_loss, train, CAUSAL)
    config = {"val_mode": mode, "loss_reduction": CAUSAL, "selection": Selection(include=("*.mlp.c_fc",))}
    loop = Loop(model, causal_loss, val, {**config, "gram": True})
    assert_gradients(loop.step(train), expected)
    of_layer = [
        {name: grad for name, grad in sample.items() if "mlp.c_fc" in name}
        for sample in reference.sample_gradients(model, causal_loss, *train, CAUSAL)
    ]
    assert_near(loop.manager.gram, gram_of(of_layer))


@both_modes
def test_by_heads(mode: str) -> None:
    model, train, val = tiny_gpt2(), text(5), text(3)
    expected = weighted_mean(model, causal_loss, train, CAUSAL)
    config = {"val_mode": mode, "loss_reduction": CAUSAL, "resolution": "head", "gram": True}
    loop = Loop(model, causal_loss, val, config)
    assert_gradients(loop.step(train), expected)
    assert_near(loop.manager.gram, products(model, causal_loss, train, CAUSAL))


@both_modes
def test_the_policy_sees_all_micro_batches_of_a_step(mode: str) -> None:
    model, (X, Y), val = tiny_gpt2(), text(5), text(3)
    expected = weighted_mean(model, causal_loss, (X, Y), CAUSAL)
    sizes = row_counts(Y, CAUSAL).tolist()
    shares = [sum(sizes[:2]) / sum(sizes), sum(sizes[2:]) / sum(sizes)]
    seen: list[StepSamples] = []

    def noted(samples: StepSamples) -> Tensor:
        seen.append(samples)
        return given(samples)

    config = {"val_mode": mode, "loss_reduction": CAUSAL, "gram": True}
    loop = Loop(model, causal_loss, val, config, noted)
    for iteration in range(2):
        found = loop.step((X[:2], Y[:2]), (X[2:], Y[2:]), shares=shares, iteration=iteration)
        assert_gradients(found, expected)
    assert [(s.iteration, s.indices.tolist(), s.lr) for s in seen] == [
        (0, [0, 1, 2, 3, 4], 0.1),
        (1, [0, 1, 2, 3, 4], 0.1),
    ]
    assert_near(seen[0].scores, reference.scores(model, causal_loss, (X, Y), val, CAUSAL))
    assert seen[0].gram is not None
    assert_near(seen[0].gram, products(model, causal_loss, (X, Y), CAUSAL))


@both_modes
def test_equal_shares_of_unequal_micro_batches(mode: str) -> None:
    """`loss / k` loops: a sample's share of the step's loss is that of its micro-batch's mean."""
    model, (X, Y), val = mlp(), table(5), table(3)
    masses = torch.tensor([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6], dtype=torch.float64)
    u = torch.tensor(U, dtype=torch.float64)
    losses = nn.functional.cross_entropy(model(X), Y, reduction="none")
    expected = reference.gradient(model, (u * masses * losses).sum() / (u * masses).sum())
    config = {"val_mode": mode, "loss_reduction": BY_SAMPLE, "gradient_accumulation_steps": 2}
    loop = Loop(model, class_loss, val, config)
    found = loop.step((X[:2], Y[:2]), (X[2:], Y[2:]), shares=(None, None))
    assert_gradients(found, expected)


@both_modes
@pytest.mark.parametrize("policy", ["all", None])
def test_all_samples_are_the_ordinary_step(mode: str, policy: str | None) -> None:
    model, train, val = tiny_gpt2(), text(5), text(3)
    config = {"val_mode": mode, "loss_reduction": CAUSAL, "gram": True}
    loop = Loop(model, causal_loss, val, config, policy)
    assert_gradients(loop.step(train), reference.gradient(model, causal_loss(model, *train)))


@both_modes
def test_the_long_form(mode: str) -> None:
    model, train, val = mlp(), table(5), table(3)
    expected = weighted_mean(model, class_loss, train, BY_SAMPLE)
    loop = Loop(model, class_loss, val, {"val_mode": mode, "loss_reduction": BY_SAMPLE})
    manager = loop.manager
    manager.attach_train_batch(*train, 0, range(5))
    class_loss(model, *manager.prepare_forward_input(*train)).backward()
    manager.prepare_gradients()
    assert_gradients(grads_of(model), expected)


@both_modes
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_gradients_lie_as_their_parameters_do(mode: str, kind: Any) -> None:
    """Fused optimizers go through a parameter and its gradient by their place in memory."""

    def convolutions() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 2), nn.Flatten(), nn.Linear(45, 4)
        )
        return model.double().to(memory_format=torch.channels_last)

    def images(rows: int) -> Rows:
        return torch.randn(rows, 3, 6, 6, dtype=torch.float64), torch.randint(0, 4, (rows,))

    model, plain, train, val = convolutions(), convolutions(), images(5), images(3)
    plain.load_state_dict(model.state_dict())
    assert not model[0].weight.is_contiguous()
    optimizer, own = (kind(m.parameters(), lr=0.01, fused=True) for m in (model, plain))
    loop = Loop(model, class_loss, val, {"val_mode": mode, "loss_reduction": BY_SAMPLE}, "all")
    for iteration in range(3):
        loop.step(train, iteration=iteration)
        assert all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())
        optimizer.step()
        own.zero_grad()
        class_loss(plain, *train).backward()
        own.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(p.detach(), q.detach())


def test_the_gram_matrix_alone_asks_for_no_reduction() -> None:
    """It reads what the backward was of, whatever the loss is a mean of."""
    model, (X, Y), val = mlp(), table(5), table(3)
    loop = Loop(model, class_loss, val, {"val_mode": "separate", "gram": True}, None)
    found = loop.step((X[:2], Y[:2]), (X[2:], Y[2:]), shares=(0.4, 0.6))
    assert_near(loop.manager.gram, products(model, class_loss, (X, Y), BY_SAMPLE))
    assert_gradients(found, reference.gradient(model, class_loss(model, X, Y)))


def test_the_gradient_is_added_to_what_is_there() -> None:
    model, train, val = mlp(), table(5), table(3)
    expected = weighted_mean(model, class_loss, train, BY_SAMPLE)
    loop = Loop(model, class_loss, val, {"loss_reduction": BY_SAMPLE})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with loop.manager.step(*train, batch_idx=range(5), iteration=0) as step:
        step.backward(class_loss(model, step.X, step.Y))
    assert_gradients(grads_of(model), {name: grad + 1 for name, grad in expected.items()})


@both_modes
def test_items_weigh_as_their_rows(mode: str) -> None:
    class Sets(nn.Module):
        """Images are told which row they belong to by their own last entry."""

        def __init__(self) -> None:
            super().__init__()
            self.image, self.head = nn.Linear(6, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, pictures: Tensor, rows: Tensor) -> Tensor:
            matches = rows[:, None] == pictures[None, :, -1].round()
            return self.head(x + matches.to(x) @ torch.tanh(self.image(pictures)))

    def drawn(row: list[int], first: int, number: int) -> Rows:
        pictures = torch.randn(len(row), 6, dtype=torch.float64)
        pictures[:, -1] = torch.tensor(row) + first
        inputs = {
            "x": torch.randn(number, 4, dtype=torch.float64),
            "pictures": Items(pictures, torch.tensor(row)),
            "rows": torch.arange(first, first + number, dtype=torch.float64),
        }
        return inputs, torch.randint(0, 4, (number,))

    def loss_fn(model: nn.Module, X: Any, Y: Tensor) -> Tensor:
        X = {k: v.values if isinstance(v, Items) else v for k, v in X.items()}
        return nn.functional.cross_entropy(model(**X), Y)

    model, train, val = Sets().double(), drawn([0, 0, 2, 3, 3, 3, 4], 0, 5), drawn([0, 1, 1], 10, 2)
    expected = weighted_mean(model, loss_fn, train, BY_SAMPLE)
    loop = Loop(model, loss_fn, val, {"val_mode": mode, "loss_reduction": BY_SAMPLE, "gram": True})
    assert_gradients(loop.step(train), expected)
    assert_near(loop.manager.gram, products(model, loss_fn, train, BY_SAMPLE))


@pytest.mark.parametrize("as_factors", [True, False])
def test_both_ways_to_the_gram_matrix(as_factors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of tokens, and of whole gradients a few rows of the parameter at a time."""
    monkeypatch.setattr(kept_gram, "_meet_as_factors", lambda uses, samples: as_factors)
    monkeypatch.setattr(kept_gram, "FUSED_TILE", 300)
    model, (X, Y), val = tiny_gpt2(tied=False), text(5), text(3)
    config = {"loss_reduction": CAUSAL, "gram": True, "chunk_mb": 1}
    loop = Loop(model, causal_loss, val, config, None)
    sizes = row_counts(Y, CAUSAL).tolist()
    shares = [sum(sizes[:2]) / sum(sizes), sum(sizes[2:]) / sum(sizes)]
    loop.step((X[:2], Y[:2]), (X[2:], Y[2:]), shares=shares)
    assert_near(loop.manager.gram, products(model, causal_loss, (X, Y), CAUSAL))


def test_pairs_and_validation_sets_reach_the_policy_as_columns() -> None:
    model, train = mlp(), table(5)
    sets = {"a": table(3), "b": table(2)}
    seen: list[StepSamples] = []

    def noted(samples: StepSamples) -> Tensor:
        seen.append(samples)
        return torch.ones(5)

    Loop(model, class_loss, sets, {"loss_reduction": BY_SAMPLE}, noted).step(train)
    expected = [reference.scores(model, class_loss, train, rows, BY_SAMPLE) for rows in sets.values()]
    assert_near(seen[0].scores, torch.stack(expected, 1))
    assert_near(seen[0].totals, sum(expected[1:], start=expected[0]))


@both_modes
def test_compiled_models(mode: str) -> None:
    torch._dynamo.reset()
    model, train, val = mlp(), table(5), table(3)
    expected = weighted_mean(model, class_loss, train, BY_SAMPLE)
    called = torch.compile(model, backend="aot_eager")
    loop = Loop(model, class_loss, val, {"val_mode": mode, "loss_reduction": BY_SAMPLE}, called=called)
    for iteration in range(2):
        assert_gradients(loop.step(train, iteration=iteration), expected)


@pytest.mark.slow
@both_modes
def test_compiled_language_models(mode: str) -> None:
    torch._dynamo.reset()
    model, train, val = tiny_gpt2(), text(5), text(3)
    expected = weighted_mean(model, causal_loss, train, CAUSAL)
    for block in model.transformer.h:
        block.compile(backend="aot_eager")
    called = torch.compile(model, backend="aot_eager")
    loop = Loop(model, causal_loss, val, {"val_mode": mode, "loss_reduction": CAUSAL}, called=called)
    for iteration in range(2):
        assert_gradients(loop.step(train, iteration=iteration), expected)


@both_modes
def test_a_loss_scale_stays_in_the_gradient(mode: str) -> None:
    model, train, val = mlp(), table(5), table(3)
    expected = weighted_mean(model, class_loss, train, BY_SAMPLE)
    gram = products(model, class_loss, train, BY_SAMPLE)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    config = {"val_mode": mode, "loss_reduction": BY_SAMPLE, "gram": True}
    loop = Loop(model, class_loss, val, config, scaler=scaler)
    found = {name: grad / 1024 for name, grad in loop.step(train).items()}
    assert_gradients(found, expected)
    assert_near(loop.manager.gram, gram)


@both_modes
def test_autocast_is_near(mode: str) -> None:
    model, train, val = tiny_gpt2().float(), text(5), text(3)
    exact = tiny_gpt2()
    exact.load_state_dict(model.state_dict())
    expected = weighted_mean(exact, causal_loss, train, CAUSAL)

    def loss_fn(called: nn.Module, X: Any, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return causal_loss(called, X, Y)

    loop = Loop(model, loss_fn, val, {"val_mode": mode, "loss_reduction": CAUSAL})
    found = loop.step(train)
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    assert_gradients(found, expected, 0.1)


def test_second_order_values_are_of_the_step_that_is_taken() -> None:
    model, train, val = tiny_gpt2(), text(5), text(3)
    taken = weighted_mean(model, causal_loss, train, CAUSAL)
    of_all = reference.curvatures(model, causal_loss, train, val, CAUSAL)
    bent = reference.hessian_product(model, causal_loss, val, taken)
    gradients = reference.sample_gradients(model, causal_loss, *train, CAUSAL)
    seen: list[StepSamples] = []

    def noted(samples: StepSamples) -> Tensor:
        seen.append(samples)
        return given(samples)

    loop = Loop(
        model, causal_loss, val, {"val_mode": "separate", "order": 2, "loss_reduction": CAUSAL}, noted
    )
    assert_gradients(loop.step(train), taken)
    assert seen[0].curvatures is not None
    assert_near(seen[0].curvatures, of_all)
    assert_near(loop.manager.curvatures, torch.stack([reference.dot(bent, g) for g in gradients]))


def test_an_input_edited_in_place_is_noticed() -> None:
    model, (X, Y), val = mlp(), table(5), table(3)
    loop = Loop(model, class_loss, val, {"val_mode": "separate", "loss_reduction": BY_SAMPLE})
    with loop.manager.step(X, Y, batch_idx=range(5), iteration=0, last=False) as step:
        step.backward(class_loss(model, step.X, step.Y))
    X.zero_()
    with pytest.raises(ProtocolError, match="an input of layer '0' was edited in place"):
        loop.manager.prepare_gradients()


def test_a_sum_of_losses_keeps_its_weights() -> None:
    model, train, val = mlp(), table(5), table(3)
    loop = Loop(model, class_loss_sum, val, {"loss_reduction": LossReduction.SUM})
    loop.step(train)
    assert loop.manager.weights.tolist() == list(U)


def test_bfloat16_weights() -> None:
    """One common factor is put on the sum, in which a row's rounding would be felt."""
    model, train, val = mlp().bfloat16(), table(5), table(3)
    train, val = (train[0].bfloat16(), train[1]), (val[0].bfloat16(), val[1])
    loop = Loop(model, class_loss, val, {"loss_reduction": BY_SAMPLE}, {"name": "top_k", "k": 3})
    found = loop.step(train)
    kept = loop.manager.weights.nonzero().flatten()
    plain = reference.gradient(model, class_loss(model, train[0][kept], train[1][kept]))
    assert {grad.dtype for grad in found.values()} == {torch.bfloat16}
    assert_gradients(found, plain, 0.03)
