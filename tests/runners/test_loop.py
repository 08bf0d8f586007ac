"""Steps, evaluations and the comparison with plain passes, taken one by one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ghost import LossReduction
from runners.data.base import Item, SampleSet
from runners.loop import evaluate
from runners.losses import Task, class_loss
from runners.overhead import OverheadMeter, Probe, probe_steps

TASK = Task(class_loss, LossReduction.SAMPLE_MEAN, None, torch.float32, torch.device("cpu"))


class Rows(SampleSet):
    """Seven random rows of three classes."""

    offset = 0

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.X = torch.randn(7, 5, generator=generator)
        self.Y = torch.randint(0, 3, (7,), generator=generator)
        self.sample_ids = self.domains = [str(i) for i in range(7)]

    def __getitem__(self, i: int) -> Item:
        return self.X[i], self.Y[i], i

    def preview(self, i: int, width: int = 80) -> str:
        return str(i)


def config(engine: str = "graddotprod", **trainer: Any) -> Any:
    settings = {"max_steps": 9, "overhead_probes": 3, "gradient_accumulation_steps": 1, "compile": False}
    return OmegaConf.create({"engine": {"name": engine}, "trainer": settings | trainer})


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Dropout(dropout), nn.Linear(4, 3))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_an_evaluation_is_the_mean_over_all_rows_whatever_the_batches(batch_size: int) -> None:
    rows, model = Rows(), net(dropout=0.5)
    found = evaluate(model, rows, TASK, batch_size)
    expected = class_loss(model.eval(), rows.X, rows.Y).mean
    assert found == pytest.approx(float(expected.detach()), rel=1e-6)


def test_an_evaluation_is_as_precise_as_the_model() -> None:
    rows, model = Rows(), net().double()
    rows.X = rows.X.double()
    expected = class_loss(model.eval(), rows.X, rows.Y).mean
    task = replace(TASK, dtype=torch.float64)
    assert evaluate(model, rows, task, 3) == pytest.approx(float(expected.detach()), rel=1e-14)


def test_an_evaluation_leaves_training_mode_random_state_and_gradients_alone() -> None:
    model = net(dropout=0.5)
    state = torch.get_rng_state()
    evaluate(model, Rows(), TASK, 3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_an_evaluation_leaves_batch_norm_in_its_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model[1].eval()
    statistics = model[1].running_mean.clone()
    evaluate(model, Rows(), TASK, 3)
    assert [module.training for module in model] == [True, False, True, True]
    assert torch.equal(model[1].running_mean, statistics)


def test_a_plain_pass_may_leave_parameters_unused() -> None:
    model, rows = net(), Rows()
    model.register_parameter("spare", nn.Parameter(torch.zeros(2)))
    meter = OverheadMeter(config(), model, TASK)
    meter.compare(Probe(rows.X, rows.Y, 1.0), optimizer_seconds=0.1)
    assert meter.share is not None


def test_probes_are_spread_and_leave_out_the_first_step() -> None:
    assert probe_steps(config()) == {1, 3, 5}
    assert probe_steps(config(max_steps=2)) == set()
    assert probe_steps(config(max_steps=3, overhead_probes=10)) == {1}
    assert probe_steps(config(overhead_probes=0)) == set()
    assert probe_steps(config(engine="regular")) == set()


def test_a_plain_pass_changes_nothing() -> None:
    rows, model = Rows(), net(dropout=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    meter = OverheadMeter(config(), model, TASK)
    assert meter.share is None
    meter.compare(Probe(rows.X, rows.Y, 1.0), optimizer_seconds=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    for p, weight in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, weight)
        assert p.grad is None


@pytest.mark.parametrize(("micro_batches", "expected"), [(1, 0.5), (2, 0.6)])
def test_overhead_is_the_share_of_a_plain_step(
    micro_batches: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain pass takes 2 s and the update 2 s, so a plain step takes 4 s, or 3 s for each of two."""
    clock = iter([0.0, 0.0, 2.0])
    meter = OverheadMeter(config(gradient_accumulation_steps=micro_batches), net(), TASK)
    monkeypatch.setattr(meter, "now", lambda: next(clock))
    rows = Rows()
    scored = {1: 4.0, 2: 3.8}[micro_batches]
    meter.compare(Probe(rows.X, rows.Y, scored), optimizer_seconds=2.0)
    assert meter.share == pytest.approx(expected)
    assert meter.seconds == 2.0
    assert meter.is_due(1)
    assert not meter.is_due(0)


def test_the_first_comparison_of_a_compiled_model_is_warmed_up() -> None:
    calls: list[int] = []
    rows, model = Rows(), net()
    model.register_forward_hook(lambda *_: calls.append(1))
    meter = OverheadMeter(config(compile=True), model, TASK)
    for _ in range(2):
        meter.compare(Probe(rows.X, rows.Y, 1.0), optimizer_seconds=0.0)
    assert len(calls) == 3
