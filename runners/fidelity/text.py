"""Planted bad samples and copies in a language model's run, and what dropping negative values saves."""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from conf.schema import fixed, key
from runners.choices import ExperimentName
from runners.data.base import DataBundle
from runners.errors import DataError
from runners.fidelity.experiment import Measured, Point
from runners.fidelity.held_out import hold_out
from runners.fidelity.in_run import InRunValues, Rows, epochs, train, train_scored
from runners.fidelity.language import (
    ADAMW_METHODS,
    Watch,
    adamw,
    check_rate,
    language_model,
    rows_of,
    token_loss,
    tokens_of,
    width,
)
from runners.fidelity.planting import Planted, PlantedConfig, check_planted, planted_in
from runners.fidelity.settings import check_at_least, refuse_setting, samples_of
from runners.fidelity.text_measures import (
    ALL,
    Curves,
    bad_in_lowest,
    curve_table,
    negative_share,
    saved,
    value_of_copies,
    value_table,
)

log = logging.getLogger(__name__)

TextOptimizer = StrEnum("TextOptimizer", ["sgd", "adamw"])


@dataclass
class TextConfig(PlantedConfig):
    """What is planted, and how it is trained."""

    name: ExperimentName = fixed(ExperimentName.text)
    optimizers: list[TextOptimizer] = key("optimizers, a point each a seed")
    sgd_lr: float = key("learning rate of SGD, which has no momentum here")
    originals: int = key("samples that have copies")
    copies: int = key("copies of each")


@dataclass
class DroppingConfig(TextConfig):
    """The same where dropping could save something: what is bad is much, and nothing is learned by heart."""

    name: ExperimentName = fixed(ExperimentName.dropping)


class Text:
    """Points: optimizer, seed."""

    def __init__(self, settings: TextConfig, device: torch.device) -> None:
        """Raises `ConfigError` for settings that cannot work."""
        self.settings = settings
        self.device = device
        check_planted(settings, share=0.05)
        check_rate("sgd_lr", settings.sgd_lr)
        check_at_least(settings, originals=2, copies=1)
        if not settings.optimizers:
            refuse_setting(
                settings, "optimizers", "leaves nothing to measure: type fidelity.optimizers=[sgd,adamw]"
            )
        if settings.copies >= settings.batch_size:
            refuse_setting(
                settings, "copies",
                f"and an original do not go into one batch: type less than {settings.batch_size}",
            )  # fmt: skip

    def points(self) -> list[Point]:
        """Every optimizer, seed by seed."""
        return [
            Point.at(optimizer=str(name), seed=seed)
            for seed in self.settings.seeds
            for name in self.settings.optimizers
        ]

    def measure(self, point: Point, folder: Path) -> Measured:
        """Plant, train with values, look at what was planted; with AdamW train again without negatives."""
        data = samples_of(self.settings, point.seed)
        log.info("%s", data.description)
        planted = planted_in(
            tokens_of(data.train), self.settings, originals=self.settings.originals,
            copies=self.settings.copies, seed=point.seed,
        )  # fmt: skip
        trial = Trial(self.settings, self.device, data, planted, point.seed)
        found = trial.with_sgd() if point["optimizer"] == "sgd" else trial.with_adamw()
        metrics = dict(found.metrics)
        for method, value in found.values.items():
            for name, number in (bad_in_lowest(value, planted.bad) | negative_share(value)).items():
                metrics[f"{name}/{method}"] = number
        tables = {
            "values": value_table(data, planted, {**found.values, **found.without_copies}),
            "curves": curve_table(found.curves),
        }
        return Measured(metrics, tables, {"data.fingerprint": data.fingerprint})


@dataclass(frozen=True)
class Found:
    """What the runs of a point gave.

    Attributes:
        values: `[n]` by method.
        without_copies: The same of the run without copies, named `<method>_without_copies`; empty with AdamW.
        metrics: What takes more than values to know.
        curves: The runs' test losses.
    """

    values: Mapping[str, Tensor]
    without_copies: Mapping[str, Tensor]
    metrics: Mapping[str, float]
    curves: Curves


class Trial:
    """The runs of one point: equal weights at the start, equal batches where the samples are equal."""

    def __init__(
        self, settings: TextConfig, device: torch.device, data: DataBundle, planted: Planted, seed: int
    ) -> None:
        self.planted = planted
        self._settings, self._device, self._data, self._seed = settings, device, data, seed
        held = hold_out(data, settings.val_samples, settings.test_samples, seed)
        self._val = rows_of(held.all_val, width(settings), device)
        self._test = rows_of(held.all_test, width(settings), device)
        self._together = planted.groups[: len(planted.groups) // 2]

    def with_sgd(self) -> Found:
        """Values of both orders, with copies and without, and what copies did to them."""
        settings = {"val_mode": "separate", "order": 2}
        curves: Curves = {}
        found, curves[ALL] = self.scored(self.planted.tokens, "sgd", settings)
        alone, curves["without_copies"] = self.scored(self.planted.without_copies, "sgd", settings)
        values, values_alone = _by_order(found), _by_order(alone)
        metrics = found.sums()
        placed = len(self._together)
        places = {"together": self.planted.groups[:placed], "apart": self.planted.groups[placed:]}
        for method, value in values.items():
            for place, groups in places.items():
                ratio = value_of_copies(value, values_alone[method], groups)
                metrics[f"duplicate_{place}/{method}"] = ratio
        without_copies = {f"{method}_without_copies": value for method, value in values_alone.items()}
        return Found(values, without_copies, metrics, curves)

    def with_adamw(self) -> Found:
        """Plain and optimizer-aware values, and what dropping negative ones saves, or the planted ones."""
        values: dict[str, Tensor] = {}
        curves: Curves = {}
        dropped = {"planted": torch.tensor(self.planted.all_bad)}  # what finding all of them would save
        metrics: dict[str, float] = {}
        for method, settings in ADAMW_METHODS.items():
            # The runs train alike, whatever is scored: either one's losses are those of all samples.
            found, curves[ALL] = self.scored(self.planted.tokens, "adamw", settings)
            values[method] = found.first_order[:, 0]
            metrics |= {
                "loss_fall": float(found.loss_fall),
                f"sum_of_values/{method}": float(values[method].sum()),
            }
            dropped[method] = (values[method] < 0).nonzero().flatten()
        generator = torch.Generator().manual_seed(self._seed)
        for method in ADAMW_METHODS:
            order = torch.randperm(len(values[method]), generator=generator)
            dropped[f"random_as_{method}"] = order[: len(dropped[method])]
        for name, positions in dropped.items():
            curves[name] = self.without(positions)
        return Found(values, {}, metrics | saved(curves), curves)

    def scored(
        self, tokens: Sequence[Tensor], optimizer: str, settings: Mapping[str, object]
    ) -> tuple[InRunValues, dict[int, float]]:
        """Values of a run on these samples, and its test losses."""
        model = self._model()
        watch = self._watch(model)
        values = train_scored(
            model, self._optimizer(optimizer, model), self._rows(tokens),
            self._batches(len(tokens), self._together), token_loss, watch,
            val=self._val, settings=settings,
        )  # fmt: skip
        return values, watch.losses

    def without(self, dropped: Tensor) -> dict[int, float]:
        """Test losses of AdamW on all samples but these."""
        gone = set(dropped.tolist())
        kept = [i for i in range(len(self.planted.tokens)) if i not in gone]
        if not kept:
            raise DataError("every training sample has a negative value, and none is left to train on")
        where = {position: number for number, position in enumerate(kept)}
        groups = ([where[i] for i in group if i in where] for group in self._together)
        together = [group for group in groups if len(group) > 1]
        model = self._model()
        watch = self._watch(model)
        train(
            model, self._optimizer("adamw", model), self._rows([self.planted.tokens[i] for i in kept]),
            self._batches(len(kept), together), token_loss, watch,
        )  # fmt: skip
        return watch.losses

    def _model(self) -> nn.Module:
        return language_model(self._settings, self._data, self._seed, self._device)

    def _watch(self, model: nn.Module) -> Watch:
        return Watch(model, self._test, self._settings.batch_size, self._settings.eval_every)

    def _optimizer(self, name: str, model: nn.Module) -> torch.optim.Optimizer:
        if name == "sgd":
            return torch.optim.SGD(model.parameters(), lr=self._settings.sgd_lr)
        return adamw(model, self._settings.adamw_lr)

    def _rows(self, tokens: Sequence[Tensor]) -> Rows:
        return rows_of(tokens, width(self._settings), self._device)

    def _batches(self, samples: int, together: Sequence[Sequence[int]]) -> "islice[Tensor]":
        size = self._settings.batch_size
        if samples // size < len(together):
            raise DataError(
                f"{samples} samples are {samples // size} batches of {size}, and {len(together)} groups of "
                "copies want one each: lower fidelity.originals or fidelity.batch_size"
            )
        return islice(epochs(samples, size, self._seed, together), self._settings.steps)


def _by_order(values: InRunValues) -> dict[str, Tensor]:
    assert values.second_order is not None
    return {"first_order": values.first_order[:, 0], "second_order": values.second_order[:, 0]}
