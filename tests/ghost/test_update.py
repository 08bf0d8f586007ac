"""What the optimizer made of a step is read from a few small gradients."""

import pytest
import torch
from torch import nn

from ghost.update import UpdateObserver


def observed(model: nn.Module, optimizer: torch.optim.Optimizer) -> UpdateObserver:
    observer = UpdateObserver(optimizer, model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return observer


def test_an_ordinary_step() -> None:
    model = nn.Linear(5, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    observer = observed(model, optimizer)
    observer.expect(None)
    assert observer.take() is None
    optimizer.step()
    update = observer.take()
    assert update is not None
    assert update.lr.tolist() == [0.25]
    assert update.clip.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("factor", [1e-6, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_common_factor(factor: float, dtype: torch.dtype) -> None:
    model = nn.Linear(5, 4).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observed(model, optimizer)
    observer.expect(None)
    for p in model.parameters():
        assert p.grad is not None
        p.grad *= factor
    optimizer.step()
    update = observer.take()
    assert update is not None
    assert update.clip.dtype == torch.float64
    assert update.clip.item() == pytest.approx(factor, rel=1e-6 if dtype == torch.float32 else 1e-12)


def test_the_loss_scale_is_no_clipping() -> None:
    model = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observed(model, optimizer)
    observer.expect(torch.tensor(1024.0))
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= 2 * 1024
    optimizer.step()
    update = observer.take()
    assert update is not None
    assert update.clip.item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("keyword", [False, True])
def test_gradients_that_come_from_the_step_s_closure(keyword: bool) -> None:
    model = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = UpdateObserver(optimizer, model)
    before = model.weight.detach().clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(3, 5)).square().sum()
        loss.backward()
        observer.expect(None)
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= 0.25
        return loss

    loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert loss is not None
    assert not torch.equal(model.weight, before)
    update = observer.take()
    assert update is not None
    assert update.clip.item() == pytest.approx(0.25, rel=1e-6)


def test_a_step_is_seen_once_for_each_expectation() -> None:
    model = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observed(model, optimizer)
    optimizer.step()  # a step of which nobody spoke
    assert observer.take() is None
    observer.expect(None)
    optimizer.step()
    first = observer.take()
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.step()
    assert observer.take() is first
    observer.expect(None)
    assert observer.take() is None


def test_large_parameters_alone_bear_witness_too() -> None:
    model = nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observed(model, optimizer)
    observer.expect(None)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    update = observer.take()
    assert update is not None
    assert 0 < update.clip.item() < 1


@pytest.mark.parametrize("modules", [1, 50])
def test_adapters_whose_first_matrices_have_no_gradient_yet(modules: int) -> None:
    """LoRA's second matrices begin at zero, and so do the gradients of the first, maybe the smaller."""
    model = nn.Sequential()
    for _ in range(modules):
        model.append(nn.Sequential(nn.Linear(700, 8, bias=False), nn.Linear(8, 900, bias=False)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observed(model, optimizer)
    for first, _ in model:
        first.weight.grad = torch.zeros_like(first.weight)
    observer.expect(None)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    update = observer.take()
    assert update is not None
    assert update.clip.item() == pytest.approx(1 / norm.item(), rel=1e-5)


def test_gradients_of_no_axis_and_in_another_order_of_memory_bear_witness() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model.scale = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observed(model, optimizer)
    observer.expect(None)
    for p in model.parameters():
        assert p.grad is not None
        p.grad = (0.5 * p.grad).contiguous()
    optimizer.step()
    update = observer.take()
    assert update is not None
    assert update.clip.item() == pytest.approx(0.5, rel=1e-6)


def test_sparse_gradients_bear_no_witness() -> None:
    """As they are in a loop without an engine."""
    model = nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Linear(5, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = UpdateObserver(optimizer, model)
    model(torch.tensor([1, 3])).sum().backward()
    observer.expect(None)
    for p in model.parameters():
        assert p.grad is not None
        p.grad *= 0.5
    optimizer.step()
    update = observer.take()
    assert update is not None
    assert update.clip.item() == pytest.approx(0.5, rel=1e-6)


def test_gradients_that_are_zero_or_missing() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = UpdateObserver(optimizer, model)
    for p in model[0].parameters():
        p.grad = torch.zeros_like(p)
    observer.expect(None)
    optimizer.step()
    update = observer.take()
    assert update is not None
    assert update.clip.item() == 1


def test_rates_and_groups() -> None:
    model = nn.Linear(5, 4)
    groups = [{"params": [model.bias], "lr": torch.tensor(0.5)}, {"params": [model.weight], "lr": 0.25}]
    optimizer = torch.optim.SGD(groups)
    observer = observed(model, optimizer)
    assert observer.groups() == {id(model.bias): 0, id(model.weight): 1}
    observer.expect(None)
    optimizer.step()
    update = observer.take()
    assert update is not None
    assert update.lr.tolist() == [0.5, 0.25]
    assert update.lr.dtype == torch.float64


def test_closing_leaves_the_optimizer_alone() -> None:
    model = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = observed(model, optimizer)
    observer.expect(None)
    observer.close()
    optimizer.step()
    assert observer.take() is None
