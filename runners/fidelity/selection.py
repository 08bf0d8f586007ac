"""Whether a run that chooses its samples by their scores learns more than one that draws them."""
# ruff: noqa: RUF009 -- `key` and `fixed` return dataclass fields, not shared values

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import fixed, key
from ghost import GhostEngineManager
from runners.choices import ExperimentName
from runners.data.base import DataBundle
from runners.fidelity.experiment import Measured, Point
from runners.fidelity.held_out import hold_out
from runners.fidelity.in_run import Rows, epochs
from runners.fidelity.language import (
    adamw,
    language_model,
    mean_loss,
    rows_of,
    token_loss,
    tokens_of,
    width,
)
from runners.fidelity.planting import Planted, PlantedConfig, check_planted, planted_in
from runners.fidelity.selection_course import (
    Checkpoint,
    Tally,
    by_step,
    check_finite,
    gram_rows,
    loss_at,
    scored_rows,
)
from runners.fidelity.settings import check_at_least, refuse_setting, samples_of

log = logging.getLogger(__name__)

SelectionPolicy = StrEnum("SelectionPolicy", ["uniform", "all", "top_k", "softmax", "greedy", "threshold"])

UNIFORM, GREEDY = "uniform", "greedy"
COUNTING = ("top_k", GREEDY)  # policies that are told how many to keep

StepFn = Callable[[Tensor, int], Tensor]
"""`take(batch, step)`: train on candidates at positions `[B]`; how often each is in the gradient, `[B]`."""


@dataclass
class SelectionConfig(PlantedConfig):
    """What is chosen from, by what, and what it may cost."""

    name: ExperimentName = fixed(ExperimentName.selection)
    policies: list[SelectionPolicy] = key("ways to choose, a point each a seed; uniform draws, unscored")
    kept: int = key("samples of a step with uniform, top_k and greedy; the scored have batch_size candidates")
    budget: int = key("compute at which runs are compared, in plain training rows")


class Selection:
    """Points: policy, seed. Losses are the same whenever they are measured, seconds are the machine's."""

    def __init__(self, settings: SelectionConfig, device: torch.device) -> None:
        """Raises `ConfigError` for settings that cannot work."""
        self.settings = settings
        self.device = device
        check_planted(settings, share=0.2)
        check_at_least(settings, kept=1, budget=1)
        if not settings.policies:
            refuse_setting(
                settings, "policies", "leaves nothing to measure: type fidelity.policies=[uniform,top_k]"
            )
        if settings.kept > settings.batch_size:
            refuse_setting(
                settings, "kept", f"is more than fidelity.batch_size={settings.batch_size}: type less"
            )
        if settings.steps % settings.eval_every:
            refuse_setting(
                settings, "eval_every", f"does not divide fidelity.steps={settings.steps}: type another"
            )

    def points(self) -> list[Point]:
        """Every policy, seed by seed."""
        return [
            Point.at(policy=str(name), seed=seed)
            for seed in self.settings.seeds
            for name in self.settings.policies
        ]

    def measure(self, point: Point, folder: Path) -> Measured:
        """Plant corrupted windows, train with the policy, and look at the test loss on the way.

        Raises:
            DataError: The run diverged, kept nothing, or has too few samples to corrupt.
        """
        data = samples_of(self.settings, point.seed)
        log.info("%s", data.description)
        planted = planted_in(tokens_of(data.train), self.settings, originals=0, copies=0, seed=point.seed)
        trial = SelectionTrial(self.settings, self.device, data, planted, point.seed)
        course, shares = trial.run(str(point["policy"]))
        check_finite(course)
        at_steps = next(one for one in course if one.step == self.settings.steps)
        metrics = {
            "test_loss": at_steps.test_loss,
            "loss_at_budget": loss_at(course, self.settings.budget),
            "rows_per_step": course[-1].rows / course[-1].step,
            "seconds_per_step": course[-1].seconds / course[-1].step,
            **shares,
        }
        return Measured(metrics, {}, {"data.fingerprint": data.fingerprint}, by_step(course))


class SelectionTrial:
    """Runs of one seed: equal weights at the start, and equal candidates where there are as many a step."""

    def __init__(
        self, settings: SelectionConfig, device: torch.device, data: DataBundle, planted: Planted, seed: int
    ) -> None:
        self._settings, self._device, self._data, self._seed = settings, device, data, seed
        held = hold_out(data, settings.val_samples, settings.test_samples, seed)
        self._val = rows_of(held.all_val, width(settings), device)
        self._test = rows_of(held.all_test, width(settings), device)
        self._rows = rows_of(planted.tokens, width(settings), device)
        self._bad = torch.zeros(len(planted.tokens), dtype=torch.bool)
        self._bad[planted.all_bad] = True

    def run(self, policy: str) -> tuple[list[Checkpoint], dict[str, float]]:
        """Train with the policy, until both the steps and the budget are there.

        Returns:
            The course, from step 0 on, and what shares of the candidates were kept and corrupted.
        """
        model = language_model(self._settings, self._data, self._seed, self._device)
        optimizer = adamw(model, self._settings.adamw_lr)
        if policy == UNIFORM:
            return self._train(model, plain_step(model, optimizer, self._rows), self._settings.kept, UNIFORM)
        manager = GhostEngineManager(
            {"val_mode": "separate", "policy": policy_settings(policy, self._settings.kept)},
            model, optimizer, val_data=(self._val.X, self._val.Y), loss_fn=token_loss,
        )  # fmt: skip
        try:
            take = scored_step(model, optimizer, self._rows, manager)
            return self._train(model, take, self._settings.batch_size, policy)
        finally:
            manager.cleanup()

    def _train(
        self, model: nn.Module, take: StepFn, candidates: int, policy: str
    ) -> tuple[list[Checkpoint], dict[str, float]]:
        key = "kept" if policy == UNIFORM else "batch_size"
        batches = enumerate(epochs(len(self._rows), candidates, self._seed, key=key))
        tally = Tally(self._bad)
        course = [Checkpoint(0, 0.0, 0.0, self._test_loss(model))]
        while course[-1].step < self._settings.steps or course[-1].rows < self._settings.budget:
            course.append(self._stretch(model, take, policy, course[-1], batches, tally))
        return course, tally.shares()

    def _stretch(
        self, model: nn.Module, take: StepFn, policy: str, before: Checkpoint,
        batches: Iterator[tuple[int, Tensor]], tally: Tally,
    ) -> Checkpoint:  # fmt: skip
        """Train to the next test loss."""
        rows, seconds = before.rows, before.seconds
        for step, batch in islice(batches, self._settings.eval_every):
            began = self._now()
            weights = take(batch, step)
            seconds += self._now() - began
            rows += self._cost(policy, len(batch), int((weights > 0).sum()))
            tally.add(batch, weights)
        return Checkpoint(before.step + self._settings.eval_every, rows, seconds, self._test_loss(model))

    def _cost(self, policy: str, candidates: int, kept: int) -> float:
        """A step's compute in plain training rows."""
        if policy == UNIFORM:
            return candidates
        gram = gram_rows(candidates, width(self._settings)) if policy == GREEDY else 0.0
        return scored_rows(candidates, len(self._val), kept) + gram

    def _test_loss(self, model: nn.Module) -> float:
        return mean_loss(model, self._test, self._settings.batch_size)

    def _now(self) -> float:
        """Seconds on a clock, read once the device has done all that it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def policy_settings(policy: str, kept: int) -> dict[str, Any]:
    """A manager's `policy`; what is not given has its default."""
    return {"name": policy, "k": kept} if policy in COUNTING else {"name": policy}


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows) -> StepFn:
    """Steps on every candidate, without scores."""

    def take(batch: Tensor, step: int) -> Tensor:
        chosen = rows.take(batch)
        optimizer.zero_grad()
        token_loss(model, chosen.X, chosen.Y).backward()
        optimizer.step()
        return torch.ones(len(batch), dtype=torch.float64)

    return take


def scored_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, manager: GhostEngineManager
) -> StepFn:
    """Steps on what the manager's policy keeps of the candidates."""

    def take(batch: Tensor, step: int) -> Tensor:
        chosen = rows.take(batch)
        optimizer.zero_grad()
        with manager.step(chosen.X, chosen.Y, batch_idx=batch, iteration=step) as scored:
            scored.backward(token_loss(model, scored.X, scored.Y))
        optimizer.step()
        return manager.weights.cpu()

    return take
