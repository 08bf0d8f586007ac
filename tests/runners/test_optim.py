"""Optimizers and learning rates are what the config says."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from runners.optim import build_optimizer, build_schedule


def rates(schedule: str, warmup: int, steps: int, lr: float = 0.5) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    cfg = OmegaConf.create({"lr_schedule": schedule, "warmup_steps": warmup, "max_steps": steps})
    scheduler = build_schedule(cfg, optimizer)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_constant() -> None:
    assert rates("constant", warmup=0, steps=3) == [0.5, 0.5, 0.5]


def test_warm_up_rises_to_the_rate_in_equal_parts() -> None:
    assert rates("constant", warmup=3, steps=5) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5], rel=1e-15)


def test_linear_falls_towards_zero_after_the_warm_up() -> None:
    assert rates("linear", warmup=1, steps=5) == pytest.approx([0.25, 0.5, 0.375, 0.25, 0.125], rel=1e-15)


def test_cosine_is_half_a_period() -> None:
    expected = [0.25 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert rates("cosine", warmup=0, steps=4) == pytest.approx(expected, rel=1e-15)


def test_a_warm_up_may_last_the_whole_run() -> None:
    assert rates("cosine", warmup=3, steps=3) == pytest.approx([0.125, 0.25, 0.375], rel=1e-15)


def test_adamw_takes_every_setting_and_leaves_frozen_parameters_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    cfg = {"name": "adamw", "lr": 0.25, "weight_decay": 0.5, "betas": [0.8, 0.7], "eps": 1e-3}
    (group,) = build_optimizer(OmegaConf.create(cfg), model).param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.25, 0.5, (0.8, 0.7), 1e-3)
    assert [id(p) for p in group["params"]] == [id(p) for p in model[0].parameters()]


def test_sgd_takes_every_setting() -> None:
    cfg = {"name": "sgd", "lr": 0.25, "weight_decay": 0.5, "momentum": 0.9, "nesterov": True}
    optimizer = build_optimizer(OmegaConf.create(cfg), nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (
        0.25,
        0.5,
        0.9,
        True,
    )
