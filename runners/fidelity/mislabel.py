"""Whether in-run values find wrong labels, against what else does, on one and the same run."""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import logging
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import MISSING, OmegaConf
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from conf.errors import ConfigError
from conf.schema import fixed, key
from ghost.batch import Inputs
from runners.choices import ExperimentName, ModelKind
from runners.config import ModelConfig
from runners.errors import DataError
from runners.fidelity.baselines import at_last_weights, knn_shapley
from runners.fidelity.experiment import Measured, Point
from runners.fidelity.in_run import InRunValues, Rows, epochs, train_scored
from runners.fidelity.labelled import IMAGES, RATED, Labelled, mnist_file, rated_texts, rating_files
from runners.fidelity.settings import ExperimentConfig, check_at_least, check_within, refuse_setting
from runners.losses import class_loss
from runners.models import build_model

log = logging.getLogger(__name__)

ImageSet = StrEnum("ImageSet", ["digits", "mnist"])
TextSet = StrEnum("TextSet", ["movies", "tweets", "news", "products"])


@dataclass
class MislabelConfig(ExperimentConfig):
    """What is trained on, and how."""

    name: ExperimentName = fixed(ExperimentName.mislabel)
    model: ModelConfig = MISSING
    images: list[ImageSet] = key("image sets whose labels are flipped")
    noise: float = key("share of their labels that is flipped")
    texts: list[TextSet] = key("rated texts, a rater's sign for a label; []: none")
    ratings: str | None = key(
        "folder hutto_ICWSM_2014 of vaderSentiment's source package, where the texts are", None
    )
    val_samples: int = key("samples with true labels that are valued against")
    image_lr: list[float] = key("learning rates for images, a point each")
    text_lr: list[float] = key("learning rates for texts, a point each")
    image_batch_size: int = key("images of a step")
    text_batch_size: int = key("texts of a step")
    image_epochs: int = key("times that every image is trained on")
    text_epochs: int = key("times that every text is trained on")
    neighbours: int = key("neighbours that KNN-Shapley looks at")


class Mislabel:
    """Points: data set, learning rate, seed."""

    def __init__(self, settings: MislabelConfig, device: torch.device) -> None:
        """Raises `ConfigError` or `DataError` for settings that cannot work, or data that are not there."""
        self.settings = settings
        self.device = device
        check_at_least(settings, val_samples=1, neighbours=1)
        check_at_least(settings, image_batch_size=1, text_batch_size=1, image_epochs=1, text_epochs=1)
        if not 0 < settings.noise < 1:
            refuse_setting(settings, "noise", "is no share of labels to flip: type fidelity.noise=0.1")
        for name in ("image_lr", "text_lr"):
            rates = getattr(settings, name)
            if not rates or not min(rates) > 0:
                refuse_setting(settings, name, f"must name rates above 0: type fidelity.{name}=[0.1]")
        self.model_cfg = OmegaConf.structured(settings.model)
        self._check_model()
        if not self._sets():
            refuse_setting(
                settings, "images", "and fidelity.texts=[] leave no data: name a set in one of them"
            )
        if ImageSet.mnist in settings.images:
            mnist_file()
        if settings.texts and settings.ratings is None:
            refuse_setting(
                settings, "ratings",
                "names no folder of rated texts (docs/fidelity.md says how to get it): name it, or type "
                "fidelity.texts=[]",
            )  # fmt: skip
        for domain in settings.texts:
            rating_files(domain, Path(str(settings.ratings)))

    def _check_model(self) -> None:
        """Raises `ConfigError` for a model that cannot take every data set."""
        kind, name = self.model_cfg.kind, self.model_cfg.name
        if kind not in (ModelKind.mlp, ModelKind.cnn):
            raise ConfigError(
                f"model@fidelity.model={name} has no layer that neighbours could be looked for in: type "
                "model@fidelity.model=mlp or cnn"
            )
        if kind == ModelKind.cnn and self.settings.texts:
            refuse_setting(
                self.settings, "texts", f"are no images, and model@fidelity.model={name} takes nothing else: "
                "type fidelity.texts=[]",
            )  # fmt: skip
        check_within(self.settings)

    def _sets(self) -> list[str]:
        return [str(name) for name in (*self.settings.images, *self.settings.texts)]

    def points(self) -> list[Point]:
        """Every data set with its rates, seed by seed."""
        return [
            Point.at(data=name, lr=lr, seed=seed)
            for seed in self.settings.seeds
            for name in self._sets()
            for lr in (self.settings.image_lr if name in IMAGES else self.settings.text_lr)
        ]

    def measure(self, point: Point, folder: Path) -> Measured:
        """Train once, and let every method say which labels it thinks wrong."""
        data = self.labelled(str(point["data"]), point.seed)
        if data.left_out:
            log.info("%s: %d samples have no label and are left out.", point["data"], data.left_out)
        if not data.wrong.any() or data.wrong.all():
            raise DataError(
                f"{int(data.wrong.sum())} of {len(data.wrong)} labels of {point['data']} are wrong: "
                "nothing to tell apart; raise fidelity.noise"
            )
        if self.settings.neighbours > len(data.Y):
            refuse_setting(
                self.settings, "neighbours", f"are more than the {len(data.Y)} samples: type fewer"
            )
        times, batch_size = self._schedule(str(point["data"]))
        if batch_size > len(data.Y):
            name = "image_batch_size" if point["data"] in IMAGES else "text_batch_size"
            refuse_setting(self.settings, name, f"is more than the {len(data.Y)} samples: type less")
        model, values = self.trained(data, float(point["lr"]), times, batch_size, point.seed)
        suspicions = self.suspicions(model, data, values, point.seed)
        metrics = values.sums()
        for name, found in suspicions.items():
            metrics[f"auroc/{name}"] = float(roc_auc_score(data.wrong, found))
            metrics[f"auroc_within_label/{name}"] = auroc_within(data.Y.numpy(), data.wrong, found)
        metrics |= {
            "accuracy": self.accuracy(model, data),
            "commonest_label": float(data.Y_val.bincount().max() / len(data.Y_val)),
            "wrong_share": float(data.wrong.mean()),
        }
        columns = {"wrong": data.wrong.tolist()} | {
            name: found.tolist() for name, found in suspicions.items()
        }
        facts = {"data.fingerprint": data.fingerprint, "left_out": str(data.left_out)}
        return Measured(metrics, {"suspicions": columns}, facts)

    def labelled(self, name: str, seed: int) -> Labelled:
        """The data set of this name."""
        if name in IMAGES:
            found = IMAGES[name](self.settings.val_samples, self.settings.noise, seed)
            return found.as_images() if self.model_cfg.kind == ModelKind.cnn else found
        if name not in RATED or self.settings.ratings is None:
            raise ConfigError(f"data={name} is no data set of this experiment: choose one of {self._sets()}")
        return rated_texts(name, Path(self.settings.ratings), self.settings.val_samples, seed)

    def _schedule(self, name: str) -> tuple[int, int]:
        """Epochs and batch size of a data set."""
        settings = self.settings
        if name in IMAGES:
            return settings.image_epochs, settings.image_batch_size
        return settings.text_epochs, settings.text_batch_size

    def trained(
        self, data: Labelled, lr: float, times: int, batch_size: int, seed: int
    ) -> tuple[nn.Module, InRunValues]:
        """The model after so many times all samples, and its samples' values of both orders."""
        torch.manual_seed(seed)
        model = build_model(self.model_cfg, None, tuple(data.X.shape[1:]), data.classes).to(self.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        rows = Rows(data.X.to(self.device), data.Y.to(self.device))
        val = Rows(data.X_val.to(self.device), data.Y_val.to(self.device))
        steps = times * (len(rows) // batch_size)
        values = train_scored(
            model, optimizer, rows, islice(epochs(len(rows), batch_size, seed), steps),
            label_loss, lambda step: None, val=val,
            settings={"val_mode": "separate", "order": 2, "loss_reduction": "sample_mean"},
        )  # fmt: skip
        return model, values

    def suspicions(
        self, model: nn.Module, data: Labelled, values: InRunValues, seed: int
    ) -> dict[str, NDArray[np.float64]]:
        """By method, of every sample how much its label seems wrong, `[n]`."""
        X, Y, X_val, Y_val = (one.to(self.device) for one in (data.X, data.Y, data.X_val, data.Y_val))
        last = at_last_weights(model, X, Y, X_val, Y_val)
        assert values.second_order is not None
        assert isinstance(model, nn.Sequential)
        with torch.no_grad():
            hidden, hidden_val = model[:-1](X), model[:-1](X_val)
        k = self.settings.neighbours
        found = {
            "first_order": -values.first_order[:, 0],
            "second_order": -values.second_order[:, 0],
            "tracin_last": -last.product,
            "loss": last.loss,
            "gradient_norm": last.gradient_norm,
            "knn_shapley": -knn_shapley(hidden, Y, hidden_val, Y_val, k),
            "knn_shapley_inputs": -knn_shapley(X.flatten(1), Y, X_val.flatten(1), Y_val, k),
            "random": torch.rand(len(Y), generator=torch.Generator().manual_seed(seed)),
        }
        return {name: numbers.double().cpu().numpy() for name, numbers in found.items()}

    def accuracy(self, model: nn.Module, data: Labelled) -> float:
        """Share of held-out samples that the model gets right."""
        with torch.no_grad():
            guesses = model(data.X_val.to(self.device)).argmax(1)
        return float((guesses == data.Y_val.to(self.device)).double().mean())


def auroc_within(
    labels: NDArray[np.int64], wrong: NDArray[np.bool_], suspicion: NDArray[np.float64]
) -> float:
    """AUROC among samples of one label, `[n]` each: the mean over labels, weighted by their wrong samples.

    It tells wrong labels from right ones where the whole AUROC may tell labels from each other. Labels that
    are always wrong or always right say nothing and do not count.
    """
    found: list[tuple[float, int]] = []
    for label in np.unique(labels):
        own = labels == label
        if 0 < wrong[own].sum() < own.sum():
            found.append((float(roc_auc_score(wrong[own], suspicion[own])), int(wrong[own].sum())))
    if not found:
        raise DataError(
            "no label has both right and wrong samples: raise fidelity.noise, or take more samples"
        )
    areas, weights = zip(*found, strict=True)
    return float(np.average(areas, weights=weights))


def label_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Mean cross-entropy of class labels `[b]`."""
    return class_loss(model, X, Y).mean
