"""The linear datamodeling score: do sums of values over subsets rank what models trained on them lose?"""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omegaconf import MISSING, OmegaConf
from scipy.optimize import brentq
from scipy.stats import rankdata
from torch import Tensor, nn

from conf.errors import ConfigError
from conf.schema import fixed, key
from ghost import GhostConfig, GhostEngineManager, GradProjLoRAEngine, LossReduction
from ghost.batch import Inputs
from runners.choices import ExperimentName, TaskName
from runners.config import DataConfig, ModelConfig
from runners.data.base import DataBundle, SampleSet
from runners.data.loader import collate
from runners.errors import DataError
from runners.fidelity.experiment import Measured, Point
from runners.fidelity.in_run import LossFn, Rows, train_scored
from runners.fidelity.settings import (
    ExperimentConfig,
    check_at_least,
    check_samples,
    refuse_setting,
    samples_of,
)
from runners.losses import model_loss
from runners.models import build_model
from runners.tasks import model_task

log = logging.getLogger(__name__)

SCORED_ROWS = 256  # of a pass that trains nothing
# What to type for samples of the tasks that this takes.
SAMPLES = {
    TaskName.table_classes: "digits",
    TaskName.image_classes: "digits fidelity.data.as_image=true",
}
OF_MEAN = " of the mean"


@dataclass
class LDSConfig(ExperimentConfig):
    """What is trained, and on which subsets it is trained again."""

    name: ExperimentName = fixed(ExperimentName.lds)
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    lr: float = key("learning rate of SGD")
    batch_size: int = key("samples a step")
    steps: int = key("steps of every training, on all samples or a subset")
    runs: int = key("trainings on all samples, whose scores are averaged")
    subsets: int = key("random subsets of the training samples")
    share: float = key("share of the training samples in a subset")
    retrainings: int = key("trainings on each subset, whose losses are averaged")
    projected: int = key("numbers kept of a matrix's projected gradient, about")


@dataclass(frozen=True)
class Samples:
    """All samples of a side: inputs `[n, d]`, or images `[n, c, h, w]`, float32; classes `[n]` int64."""

    X: Tensor
    Y: Tensor


class LDS:
    """Points: seeds."""

    def __init__(self, settings: LDSConfig, device: torch.device) -> None:
        """Raises `ConfigError` for settings that cannot work."""
        self.settings = settings
        self.device = device
        check_at_least(settings, batch_size=1, steps=1, runs=1, subsets=3, retrainings=2, projected=16)
        if settings.lr <= 0:
            refuse_setting(settings, "lr", "is not above 0: type fidelity.lr=0.1, or another")
        if not 0 < settings.share < 1:
            refuse_setting(
                settings, "share", "is no share between 0 and 1: type fidelity.share=0.5, or another"
            )
        self._model_cfg = OmegaConf.structured(settings.model)
        if (task := model_task(self._model_cfg)) not in SAMPLES:
            raise ConfigError(
                f"model@fidelity.model={self._model_cfg.name} learns from {task} samples, and "
                "fidelity=lds takes tables or images: type model@fidelity.model=mlp, or another"
            )
        check_samples(settings, task, SAMPLES[task])
        self.loss, _ = model_loss(self._model_cfg)

    def points(self) -> list[Point]:
        """A point a seed."""
        return [Point.at(seed=seed) for seed in self.settings.seeds]

    def measure(self, point: Point, folder: Path) -> Measured:
        """Train on all samples and on every subset, and hold the sums against the losses."""
        data = samples_of(self.settings, point.seed)
        log.info("%s", data.description)
        train, val = self._all_rows(data.train), self._all_rows(data.val)
        generator = torch.Generator().manual_seed(point.seed)
        size = max(1, round(self.settings.share * len(train.Y)))
        if size < self.settings.batch_size:
            refuse_setting(
                self.settings, "share", f"is {size} samples, fewer than fidelity.batch_size: type more"
            )
        rows = [
            torch.randperm(len(train.Y), generator=generator)[:size] for _ in range(self.settings.subsets)
        ]
        scores = self.scores(data, train, val, generator)
        log.info("%d trainings were scored", self.settings.runs)
        losses = self.losses(data, train, val, rows, generator)
        chosen = torch.stack([F.one_hot(one, len(train.Y)).sum(0) for one in rows]).double()  # [m, n]
        predicted = {name: (chosen @ each).numpy() for name, each in scores.items()}  # [m, V or 1]
        metrics, single = compared(predicted, losses.numpy())
        tables = {
            "correlations": {name: correlations.tolist() for name, correlations in single.items()},
            "losses": loss_table(losses),
        }
        return Measured(metrics, tables, {"data.fingerprint": data.fingerprint})

    def _all_rows(self, samples: SampleSet) -> Samples:
        batch = collate([samples[i] for i in range(len(samples))], samples.layout)
        assert isinstance(batch.inputs, Tensor)
        return Samples(batch.inputs.to(self.device), batch.labels.to(self.device))

    def _model(self, data: DataBundle, generator: torch.Generator) -> nn.Module:
        """A model with initial weights of its own."""
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return build_model(self._model_cfg, None, data.input_shape, data.num_classes).to(self.device)

    def mean_loss(self, model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        """The mean over rows."""
        return self.loss(model, X, Y).mean

    @torch.no_grad()
    def row_losses(self, model: nn.Module, side: Samples) -> Tensor:
        """Of each sample, `[n]`."""
        parts = zip(side.X.split(SCORED_ROWS), side.Y.split(SCORED_ROWS), strict=True)
        return torch.cat([self.loss(model, X, Y).row_sums for X, Y in parts])

    def losses(
        self, data: DataBundle, train: Samples, val: Samples, rows: list[Tensor], generator: torch.Generator
    ) -> Tensor:
        """What models trained on the subsets lose, `[retrainings, m, V]` float64."""
        found = torch.empty(self.settings.retrainings, len(rows), len(val.Y), dtype=torch.float64)
        for again in range(self.settings.retrainings):
            for number, subset in enumerate(rows):
                model = self._model(data, generator)
                optimizer = torch.optim.SGD(model.parameters(), lr=self.settings.lr)
                for batch in self._batches(subset, generator):
                    optimizer.zero_grad()
                    self.mean_loss(model, train.X[batch], train.Y[batch]).backward()
                    optimizer.step()
                found[again, number] = self.row_losses(model, val)
            log.info("Every subset has been trained on %d times", again + 1)
        return found

    def _batches(self, subset: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Rows of each step, `[B]`: the subset in a new order each epoch, an unfilled last batch left out."""
        size, steps = self.settings.batch_size, 0
        while True:
            for batch in subset[torch.randperm(len(subset), generator=generator)].split(size):
                if len(batch) < size:
                    continue
                if steps == self.settings.steps:
                    return
                steps += 1
                yield batch

    def scores(
        self, data: DataBundle, train: Samples, val: Samples, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Scores of all pairs of a training and a validation sample, means over runs: `[n, V]` float64 each,
        positive where the loss falls; those of the mean loss, where they are no sums, are `NAME of the mean`.
        """
        total: dict[str, Tensor] = {}
        for _ in range(self.settings.runs):
            model = self._model(data, generator)
            found = self._in_run(model, train, val, generator)
            found["exact_dots"] = last_dots(model, train, val, self.mean_loss)
            found |= self._projected(model, train, val)
            found["random"] = torch.randn(len(train.Y), len(val.Y), dtype=torch.float64, generator=generator)
            for name, each in found.items():
                total[name] = total.get(name, 0) + each / self.settings.runs
        return total

    def _in_run(
        self, model: nn.Module, train: Samples, val: Samples, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Train the model, and sum what its steps credit."""
        try:
            found = train_scored(
                model, torch.optim.SGD(model.parameters(), lr=self.settings.lr), Rows(train.X, train.Y),
                self._batches(torch.arange(len(train.Y)), generator), self.mean_loss, lambda step: None,
                val=Rows(val.X, val.Y),
                settings={
                    "val_mode": "separate", "order": 2, "pairwise": True, "loss_reduction": "sample_mean",
                },
            )  # fmt: skip
        except DataError:
            refuse_setting(self.settings, "lr", "lets a run diverge: type less")
        assert found.second_order is not None
        return {"first_order": found.first_order, "second_order": found.second_order}

    def _projected(self, model: nn.Module, train: Samples, val: Samples) -> dict[str, Tensor]:
        """Inner products and cosines of projected gradients at the model's weights."""
        config = GhostConfig(
            engine="gradprojlora",
            loss_reduction=LossReduction.SAMPLE_MEAN,
            proj_rank_total=self.settings.projected,
        )
        engine = GradProjLoRAEngine(model, config)
        with engine.attached():
            rows = [
                torch.cat([
                    engine.project(X, Y, self.mean_loss).double().cpu()
                    for X, Y in zip(side.X.split(SCORED_ROWS), side.Y.split(SCORED_ROWS), strict=True)
                ])
                for side in (train, val)
            ]  # fmt: skip
        unit = [F.normalize(side, dim=1) for side in rows]
        mean = F.normalize(rows[1].mean(0), dim=0)[:, None]  # [k, 1]
        return {
            "projected_dots": rows[0] @ rows[1].T,
            "projected_cosine": unit[0] @ unit[1].T,
            f"projected_cosine{OF_MEAN}": unit[0] @ mean,
        }


def last_dots(model: nn.Module, train: Samples, val: Samples, loss_fn: LossFn) -> Tensor:
    """Exact inner products of the samples' gradients at the model's weights, `[n, V]` float64."""
    config = {"pairwise": True, "loss_reduction": "sample_mean"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    manager = GhostEngineManager(config, model, optimizer, val_data=(val.X, val.Y), loss_fn=loss_fn)
    found = []
    for t, batch in enumerate(torch.arange(len(train.Y)).split(SCORED_ROWS)):
        with manager.step(train.X[batch], train.Y[batch], batch_idx=batch, iteration=t) as step:
            step.backward(loss_fn(model, step.X, step.Y))
        # The engine's gradients are parts of means over the batch and over the validation rows.
        found.append(manager.scores.double().cpu() * len(batch) * len(val.Y))
        optimizer.zero_grad()
    manager.cleanup()
    return torch.cat(found)


def compared(
    predicted: Mapping[str, NDArray[np.float64]], losses: NDArray[np.float64]
) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
    """Metrics, and the correlation of each validation sample by method, `[V]`.

    Args:
        predicted: `[m, V]` by method: sums of values over each subset; as `LDS.scores` names them.
        losses: `[retrainings, m, V]`.
    """
    actual, runs = -losses.mean(0), len(losses)
    half = runs // 2
    pairs = {name: (sums, actual) for name, sums in predicted.items() if not name.endswith(OF_MEAN)}
    pairs["retrained_half"] = (-losses[:half].mean(0), -losses[half:].mean(0))
    metrics: dict[str, float] = {}
    single: dict[str, NDArray[np.float64]] = {}
    for name, (sums, wanted) in pairs.items():
        single[name] = rank_correlations(sums, wanted)
        whole = predicted.get(f"{name}{OF_MEAN}", sums).sum(1, keepdims=True)
        of_mean = rank_correlations(whole, wanted.sum(1, keepdims=True))
        metrics |= {f"lds/{name}": float(single[name].mean()), f"lds_of_mean/{name}": float(of_mean[0])}
    single["perfect"] = np.array([within_reach(r, half, runs) for r in single["retrained_half"]])
    metrics["lds/perfect"] = float(single["perfect"].mean())
    metrics["lds_of_mean/perfect"] = within_reach(metrics["lds_of_mean/retrained_half"], half, runs)
    return metrics, single


def within_reach(halves: float, half: int, runs: int) -> float:
    """The correlation that perfect predictions would have with means over `runs` trainings, where means over
    `half` of them correlate by `halves` with means over the others (Spearman and Brown); 0 where they do not.

    With ρ for two single trainings, means over k have the reliability kρ / (1 + (k - 1)ρ); halves correlate
    by the square root of both of theirs, and a perfect prediction by the square root of that of all.
    """

    halves = min(halves, 1.0)  # but for rounding it is no more

    def reliability(single: float, k: int) -> float:
        return k * single / (1 + (k - 1) * single)

    def excess(single: float) -> float:
        return reliability(single, half) * reliability(single, runs - half) - halves**2

    if halves <= 0:
        return 0.0
    return float(np.sqrt(reliability(brentq(excess, 0.0, 1.0), runs)))


def loss_table(losses: Tensor) -> dict[str, list[float]]:
    """A row for each training on a subset and each validation sample, of losses `[retrainings, m, V]`."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in losses.shape))
    columns = dict(zip(("retraining", "subset", "sample"), places.T.tolist(), strict=True))
    return columns | {"loss": losses.flatten().tolist()}


def rank_correlations(ones: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's correlation of each column with its counterpart, `[V]`; arguments `[m, V]`. That of a column
    of one number, with anything, is 0.
    """
    ranks = [rankdata(side, axis=0) for side in (ones, others)]
    centred = [side - side.mean(0) for side in ranks]
    norms = [np.linalg.norm(side, axis=0) for side in centred]
    products, scale = (centred[0] * centred[1]).sum(0), norms[0] * norms[1]
    found: NDArray[np.float64] = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return found
