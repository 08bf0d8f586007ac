"""What of a run changes with its steps, to disk and back."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from conf.errors import ConfigError
from runners.resume import state
from runners.resume.state import Trained


def trained(model: nn.Module) -> Trained:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return Trained(model, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=True), [])


def step(one: Trained) -> torch.Tensor:
    """One step on drawn rows with dropout; returns the weights behind it."""
    one.optimizer.zero_grad()
    one.scaler.scale(one.model(torch.randn(4, 6)).square().mean()).backward()
    one.scaler.step(one.optimizer)
    one.scaler.update()
    one.schedule.step()
    shards = [state._local(p.detach()).flatten() for p in one.model.parameters()]
    return torch.cat(shards).clone()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "group"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.usefixtures("process_group")
def test_a_state_brought_back_takes_the_same_steps(sharded: bool, tmp_path: Path) -> None:
    def build(seed: int) -> Trained:
        torch.manual_seed(seed)
        model = net()
        return trained(fully_shard(model, mesh=init_device_mesh("cpu", (1,))) if sharded else model)

    first = build(0)
    step(first)
    state.save({"trained": first.state(), "random": first.random_state()}, tmp_path / "saved.pt")
    assert first.is_sharded == sharded
    expected = [step(first) for _ in range(3)]

    saved, other = state.load(tmp_path / "saved.pt"), build(1)
    other.load(saved["trained"])
    other.set_random_state(saved["random"])
    for weights in expected:
        assert torch.equal(step(other), weights)


def test_every_generator_goes_on(tmp_path: Path) -> None:
    one = trained(net())
    state.save(one.random_state(), tmp_path / "random.pt")
    drawn = [(random.random(), np.random.rand(), float(torch.rand(()))) for _ in range(2)]
    one.set_random_state(state.load(tmp_path / "random.pt"))
    assert [(random.random(), np.random.rand(), float(torch.rand(()))) for _ in range(2)] == drawn


def test_another_model_is_refused() -> None:
    saved = trained(nn.Sequential(nn.Linear(6, 5))).state()
    with pytest.raises(ConfigError, match=r"the checkpoint is not of this model, which differs in 0\.bias"):
        trained(nn.Sequential(nn.Linear(6, 5, bias=False))).load(saved)


def test_the_systems_own_reason_comes_through() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        state.save({"weights": torch.zeros(100_000)}, Path("/dev/full"))
