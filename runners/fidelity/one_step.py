"""One training step's values against Monte-Carlo Shapley values of that very step."""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from scipy.stats import spearmanr
from torch import Tensor, nn

from conf.errors import ConfigError
from conf.schema import fixed, key
from ghost import GhostEngineManager
from ghost.batch import Inputs, take_rows, to_device
from runners.choices import ExperimentName, TaskName
from runners.config import LanguageData, ModelConfig
from runners.data.base import Batch, DataBundle
from runners.data.loader import train_batches
from runners.errors import DataError
from runners.fidelity.experiment import Measured, Point
from runners.fidelity.held_out import hold_out
from runners.fidelity.language import rows_of
from runners.fidelity.settings import (
    ExperimentConfig,
    check_at_least,
    check_samples,
    refuse_setting,
    samples_of,
)
from runners.fidelity.shapley import MonteCarlo, monte_carlo
from runners.fidelity.step_game import FallInLoss, StepGame, flat
from runners.losses import language_loss
from runners.models import build_model, place
from runners.tasks import model_task

log = logging.getLogger(__name__)

REAL, LINEAR = 0, 1  # columns of the two games
ROUNDING_ORDERS = 2  # permutations whose subsets are evaluated in float64 too


@dataclass
class OneStepConfig(ExperimentConfig):
    """What is trained, and the step that is looked at."""

    name: ExperimentName = fixed(ExperimentName.one_step)
    data: LanguageData = MISSING
    model: ModelConfig = MISSING
    val_samples: int = key(
        "windows of the validation loss, drawn by the seed of data.val_samples held-out ones"
    )
    warm_up_steps: int = key("steps of AdamW before the one that is looked at")
    warm_up_lr: float = key("their learning rate")
    batch_size: int = key("samples of a step, the players of the game")
    permutations: int = key("random orders that the true values are means over")
    sgd_lr: list[float] = key("learning rates of the step with SGD; []: none")
    adamw_lr: list[float] = key("learning rates of the step with AdamW, which has the moments of the warm-up")


Rows = tuple[Inputs, Tensor]
"""Inputs by name and labels `[b, T]`."""


@dataclass(frozen=True)
class State:
    """A model just before a step.

    Attributes:
        optimizer: AdamW with its moments.
        batch: The step's samples.
        val: The validation samples.
    """

    model: nn.Module
    optimizer: torch.optim.AdamW
    batch: Rows
    val: Rows


class OneStep:
    """Points: optimizer, learning rate, seed."""

    def __init__(self, settings: OneStepConfig, device: torch.device) -> None:
        """Raises `ConfigError` for settings that cannot work."""
        self.settings = settings
        self.device = device
        check_at_least(settings, batch_size=3, permutations=2, warm_up_steps=1, val_samples=1)
        for name in ("sgd_lr", "adamw_lr"):
            if any(lr <= 0 for lr in getattr(settings, name)):
                refuse_setting(settings, name, "has a learning rate that is not above 0: leave it out")
        if settings.warm_up_lr <= 0:
            refuse_setting(
                settings, "warm_up_lr", "is not above 0: type fidelity.warm_up_lr=1e-3, or another"
            )
        if not settings.sgd_lr and not settings.adamw_lr:
            refuse_setting(
                settings, "sgd_lr", "and fidelity.adamw_lr=[] leave no step: name a rate in one of them"
            )
        check_samples(settings, TaskName.language, "interpreter")
        if model_task(OmegaConf.structured(settings.model)) != TaskName.language:
            raise ConfigError(
                f"model@fidelity.model={settings.model.name} is no language model: type "
                "model@fidelity.model=gpt2-tiny, or another"
            )

    def points(self) -> list[Point]:
        """Every optimizer with its rates, seed by seed."""
        rates = {"sgd": self.settings.sgd_lr, "adamw": self.settings.adamw_lr}
        return [
            Point.at(optimizer=optimizer, lr=lr, seed=seed)
            for seed in self.settings.seeds
            for optimizer in rates
            for lr in rates[optimizer]
        ]

    def measure(self, point: Point, folder: Path) -> Measured:
        """Train, then compare the step's scores with its true values."""
        data = samples_of(self.settings, point.seed)
        log.info("%s", data.description)
        state = self.warmed_up(data, point.seed)
        lr, optimizer = float(point["lr"]), str(point["optimizer"])
        scores = scores_of(state, optimizer, lr)
        truth, worst = self.truth(state, optimizer, lr, point.seed)
        metrics = compared(scores, truth) | {"rounding": worst}
        values = {name: score.tolist() for name, score in scores.items()}
        values |= {
            "true": truth.values[:, REAL].tolist(),
            "true_error": truth.standard_error[:, REAL].tolist(),
        }
        values["linear_utility"] = truth.values[:, LINEAR].tolist()
        return Measured(metrics, {"values": values}, {"data.fingerprint": data.fingerprint})

    def warmed_up(self, data: DataBundle, seed: int) -> State:
        """The model after the steps that come before, and the batch of the next one."""
        settings, model_cfg = self.settings, OmegaConf.structured(self.settings.model)
        if settings.batch_size > len(data.train):
            refuse_setting(
                settings, "batch_size", f"is more than the {len(data.train)} samples: type less, or raise "
                "fidelity.data.train_samples",
            )  # fmt: skip
        torch.manual_seed(seed)
        # Dropout would make every pass another network's.
        model = build_model(model_cfg, data.vocab_size, None, None, settings.data.seq_len).eval()
        place(model, self.device, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.warm_up_lr, fused=True)
        batches = train_batches(data.train, settings.batch_size, seed, shuffle=True, num_workers=0)
        rows = (self._placed(batch) for batch in batches)
        for _ in range(settings.warm_up_steps):
            optimizer.zero_grad()
            mean_loss(model, *next(rows)).backward()
            optimizer.step()
        optimizer.zero_grad()
        held = rows_of(
            hold_out(data, settings.val_samples, 0, seed).all_val, settings.data.seq_len, self.device
        )
        val = held.X, held.Y
        loss = mean_loss(model, *val).item()
        log.info("After %d steps: validation loss %.3f", settings.warm_up_steps, loss)
        if not math.isfinite(loss):
            refuse_setting(settings, "warm_up_lr", "lets the warm-up diverge: type less")
        return State(model, optimizer, next(rows), val)

    def _placed(self, batch: Batch) -> Rows:
        return to_device(batch.inputs, self.device), batch.labels.to(self.device)

    def truth(self, state: State, optimizer: str, lr: float, seed: int) -> tuple[MonteCarlo, float]:
        """The Monte-Carlo values of both games, and the root mean square error of a utility by rounding."""
        game = step_game(state, optimizer, lr, torch.float32)
        found = monte_carlo(game.walk, game.players, self.settings.permutations, seed)
        if not found.values.isfinite().all():
            raise DataError(
                f"fidelity.{optimizer}_lr: with {lr:g} the loss is no number after the step: type less"
            )
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(game.players, generator=generator).tolist() for _ in range(ROUNDING_ORDERS)]
        rounded = [game.walk(order)[:, REAL] for order in orders]
        log.info("%d subsets of %d samples were evaluated", game.subsets, game.players)
        del game  # each holds all samples' gradients
        exact = step_game(state, optimizer, lr, torch.float64)
        errors = torch.cat([
            one - exact.walk(order)[:, REAL] for one, order in zip(rounded, orders, strict=True)
        ])  # fmt: skip
        # What all subsets are off by alike is no contribution of anybody.
        return found, float((errors - errors.mean()).square().mean().sqrt())


def mean_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """The mean over the counted tokens."""
    return language_loss(model, X, Y).mean


def step_optimizer(
    state: State, name: str, lr: float, parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of the step that is looked at, as it is before it.

    Args:
        parameters: The model's, or the one vector of all of them: AdamW's moments are shared out accordingly.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr)
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    earlier = [state.optimizer.state[parameter] for parameter in state.model.parameters()]
    sizes = [parameter.numel() for parameter in parameters]
    moments = {name: flat([one[name] for one in earlier]).split(sizes) for name in ("exp_avg", "exp_avg_sq")}
    for i, parameter in enumerate(parameters):
        optimizer.state[parameter] = {
            "step": earlier[0]["step"].clone(),
            **{
                name: parts[i].to(parameter.dtype).view_as(parameter).clone()
                for name, parts in moments.items()
            },
        }
    return optimizer


def step_game(state: State, optimizer: str, lr: float, dtype: torch.dtype) -> StepGame:
    """The game of the step in a number format, on a copy of the model."""
    model = copy.deepcopy(state.model).to(dtype)
    parameters, (X, Y) = list(model.parameters()), state.batch
    loss = language_loss(model, X, Y)
    tokens = int(loss.row_counts.sum())
    parts = Y.new_empty(len(Y), sum(p.numel() for p in parameters), dtype=dtype)  # [b, N]
    for part, row, count in zip(parts, _single_rows(len(Y)), loss.row_counts.tolist(), strict=True):
        # A sample's part of the batch's mean is its own mean by its share of the tokens.
        own = mean_loss(model, take_rows(X, row), Y[row])
        torch.mul(flat(torch.autograd.grad(own, parameters)), count / tokens, out=part)
    val_grad = flat(torch.autograd.grad(mean_loss(model, *state.val), parameters))
    return StepGame(
        model, lambda weights: step_optimizer(state, optimizer, lr, [weights]), parts, val_grad,
        FallInLoss(model, *state.val),
    )  # fmt: skip


def _single_rows(number: int) -> list[slice]:
    return [slice(row, row + 1) for row in range(number)]


def scores_of(state: State, optimizer: str, lr: float) -> dict[str, Tensor]:
    """The library's values of the step's samples by name, `[b]` float64 each."""
    plain = _scored(state, optimizer, lr, {"order": 2})
    first = lr * plain.scores.double().cpu()
    assert plain.curvatures is not None
    values = {"first_order": first, "second_order": first - lr**2 / 2 * plain.curvatures.double().cpu()}
    if optimizer == "adamw":
        own = _scored(state, optimizer, lr, {"preconditioner": "auto", "credit": "step"})
        values["optimizer_aware"] = lr * own.scores.double().cpu()
    return values


def _scored(state: State, optimizer: str, lr: float, config: Mapping[str, Any]) -> GhostEngineManager:
    """A manager that has scored the step's batch, and has been taken off the model again."""
    model, (X, Y) = state.model, state.batch
    settings = {"val_mode": "separate", "loss_reduction": "causal_token_mean", **config}
    stepping = step_optimizer(state, optimizer, lr, list(model.parameters()))
    manager = GhostEngineManager(settings, model, stepping, val_data=state.val, loss_fn=mean_loss)
    with manager.step(X, Y, batch_idx=range(len(Y)), iteration=0) as step:
        step.backward(mean_loss(model, step.X, step.Y))
    manager.cleanup()
    stepping.zero_grad()
    return manager


def compared(scores: Mapping[str, Tensor], truth: MonteCarlo) -> dict[str, float]:
    """How near scores `[b]` come to the true values, and how near anything can."""
    real, linear = truth.values.unbind(1)
    first, second = truth.halves()
    spread = float(real.std())
    metrics = {"spread": spread, "mc_error": float(truth.standard_error[:, REAL].square().mean().sqrt())}
    pairs = {name: (score, real) for name, score in scores.items()}
    pairs |= {"linear_utility": (linear, real), "monte_carlo_half": (first[:, REAL], second[:, REAL])}
    for name, (found, wanted) in pairs.items():
        error = float((found - wanted).square().mean().sqrt())
        metrics |= {
            f"spearman/{name}": float(spearmanr(found, wanted).statistic),
            f"rmse/{name}": error,
            f"relative_rmse/{name}": error / spread,
        }
    return metrics
