"""Values of the plain loop are those of the definition, and its batches are what they promise."""

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghost.batch import Inputs
from runners.errors import DataError
from runners.fidelity.in_run import Rows, epochs, train, train_scored

LR = 0.3


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def rows(samples: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows(
        torch.randn(samples, 5, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    return F.cross_entropy(model(X), Y)


def gradient(value: Tensor, model: nn.Module, graph: bool = False) -> Tensor:
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), create_graph=graph)]
    )


def by_definition(batches: list[Tensor], train_rows: Rows, val: Rows) -> tuple[Tensor, Tensor]:
    """Values of both orders by plain autograd, a sample at a time, `[n]` each."""
    model = small()
    first, second = torch.zeros(len(train_rows)), torch.zeros(len(train_rows))
    for batch in batches:
        val_gradient = gradient(loss(model, val.X, val.Y), model, graph=True)
        own = []
        for i in batch:
            one = train_rows.take(i[None])
            own.append(gradient(loss(model, one.X, one.Y) / len(batch), model))
        whole = torch.stack(own).sum(0)
        product = gradient(val_gradient @ whole, model)  # the Hessian times the step's gradient
        for i, g in zip(batch.tolist(), own, strict=True):
            first[i] += LR * (g @ val_gradient).detach()
            second[i] += LR * (g @ val_gradient).detach() - LR**2 / 2 * (g @ product)
        with torch.no_grad():
            place = 0
            for weight in model.parameters():
                weight -= LR * whole[place : place + weight.numel()].reshape(weight.shape)
                place += weight.numel()
    return first, second


def test_values_of_both_orders_are_those_of_the_definition() -> None:
    train_rows, val = rows(10, 1), rows(6, 2)
    batches = list(islice(epochs(10, 4, seed=0), 6))  # two epochs, the last batch of each is short
    model = small()
    found = train_scored(
        model, torch.optim.SGD(model.parameters(), lr=LR), train_rows, batches, loss, lambda step: None,
        val=val, settings={"val_mode": "separate", "order": 2, "loss_reduction": "sample_mean"},
    )  # fmt: skip
    first, second = by_definition(batches, train_rows, val)
    assert found.second_order is not None
    fall = loss(small(), val.X, val.Y) - loss(model, val.X, val.Y)
    assert found.sums() == pytest.approx(
        {
            "loss_fall": fall.item(),
            "sum_of_values/first_order": first.sum().item(),
            "sum_of_values/second_order": second.sum().item(),
        }
    )
    torch.testing.assert_close(found.first_order[:, 0], first, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.second_order[:, 0], second, rtol=1e-10, atol=1e-13)


def test_several_validation_sets_have_a_column_each_and_training_is_the_plain_one() -> None:
    train_rows, sets = rows(10, 1), {"a": rows(3, 2), "b": rows(4, 3)}
    batches = list(islice(epochs(10, 4, seed=0), 4))
    scored, plain = small(), small()
    steps: list[int] = []
    found = train_scored(
        scored, torch.optim.SGD(scored.parameters(), lr=LR), train_rows, batches, loss, steps.append,
        val=sets, settings={"loss_reduction": "sample_mean"},
    )  # fmt: skip
    train(
        plain,
        torch.optim.SGD(plain.parameters(), lr=LR),
        train_rows,
        batches,
        loss,
        lambda step: None,
    )
    for column, val in enumerate(sets.values()):
        first, _ = by_definition(batches, train_rows, val)
        torch.testing.assert_close(found.first_order[:, column], first, rtol=1e-10, atol=1e-13)
        assert found.loss_fall[column] == loss(small(), val.X, val.Y) - loss(scored, val.X, val.Y)
    assert found.second_order is None
    assert set(found.sums()) == {"loss_fall", "sum_of_values/first_order"}
    assert steps == [1, 2, 3, 4]
    for one, other in zip(scored.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_a_run_that_diverges_is_refused() -> None:
    model = small()
    batches = list(islice(epochs(10, 5, seed=0), 2))
    rows_without_bound = Rows(rows(10, 1).X * torch.inf, rows(10, 1).Y)
    with pytest.raises(DataError, match="values or the loss are not finite"):
        train_scored(
            model, torch.optim.SGD(model.parameters(), lr=LR), rows_without_bound, batches, loss,
            lambda step: None, val=rows(3, 2), settings={"loss_reduction": "sample_mean"},
        )  # fmt: skip


def test_an_epoch_has_no_sample_twice_and_groups_in_one_batch() -> None:
    together = [[3, 7, 11], [0, 20]]
    stream = epochs(22, 5, seed=1, together=together)
    seen = []
    for _ in range(2):
        batches = [next(stream) for _ in range(4)]
        assert [len(batch) for batch in batches] == [5, 5, 5, 5]
        assert len(set(torch.cat(batches).tolist())) == 20
        for group in together:
            assert any(set(group) <= set(batch.tolist()) for batch in batches)
        seen.append(set(torch.cat(batches).tolist()))
    assert seen[0] != seen[1]  # others are left out
    with pytest.raises(DataError, match=r"4 samples do not fill a batch: lower fidelity\.batch_size=5"):
        next(epochs(4, 5, seed=1))


def test_batches_depend_on_the_seed_alone() -> None:
    first, again, other = (list(islice(epochs(12, 4, seed), 6)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
