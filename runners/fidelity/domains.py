"""Whether a domain's own training samples earn the highest value for its validation text."""
# ruff: noqa: RUF009 -- `key` and `fixed` return dataclass fields, not shared values

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from conf.schema import fixed, key
from runners.choices import ExperimentName
from runners.data.base import DataBundle
from runners.errors import DataError
from runners.fidelity.experiment import Measured, Point
from runners.fidelity.held_out import hold_out
from runners.fidelity.in_run import InRunValues, epochs, train_scored
from runners.fidelity.language import (
    ADAMW_METHODS,
    LanguageConfig,
    adamw,
    check_language,
    language_model,
    rows_of,
    token_loss,
    tokens_of,
    width,
)
from runners.fidelity.settings import check_at_least, refuse_setting, samples_of

log = logging.getLogger(__name__)

FEWEST_DOMAINS = 2
COLUMNS = ("method", "phase", "trained_on", "validation", "value")


@dataclass
class DomainsConfig(LanguageConfig):
    """What is trained on, and how."""

    name: ExperimentName = fixed(ExperimentName.domains)
    phases: int = key("equal parts of a run whose values are looked at one by one too")


class Domains:
    """Points: seed."""

    def __init__(self, settings: DomainsConfig, device: torch.device) -> None:
        """Raises `ConfigError` for settings that cannot work."""
        self.settings = settings
        self.device = device
        check_language(settings)
        check_at_least(settings, phases=1)
        if settings.steps % settings.phases:
            refuse_setting(
                settings, "phases", f"does not divide fidelity.steps={settings.steps}: type another"
            )

    def points(self) -> list[Point]:
        """One a seed."""
        return [Point.at(seed=seed) for seed in self.settings.seeds]

    def measure(self, point: Point, folder: Path) -> Measured:
        """Train against a validation set for each domain, and average values by domain.

        Raises:
            DataError: The corpus has one domain, or a domain on one side alone.
        """
        data = samples_of(self.settings, point.seed)
        log.info("%s", data.description)
        domains = _domains(data)
        if self.settings.val_samples < len(domains):
            refuse_setting(
                self.settings, "val_samples", f"gives some of the {len(domains)} domains none: type more"
            )
        labels = dict(zip(domains, metric_labels(domains), strict=True))
        metrics: dict[str, float] = {}
        rows: list[tuple[str, int, str, str, float]] = []
        for method, settings in ADAMW_METHODS.items():
            phases = self.scored(data, point.seed, settings)
            whole = torch.stack([phase.first_order for phase in phases]).sum(0)  # [n, D]
            means = [mean_values(phase.first_order, data.train.domains, domains) for phase in phases]
            metrics["loss_fall"] = float(torch.stack([phase.loss_fall for phase in phases]).sum())
            metrics[f"sum_of_values/{method}"] = float(whole.sum())
            confusion = torch.stack(means).sum(0)  # [D, D]
            for name, number in own_domain(confusion).items():
                metrics[f"{name}/{method}"] = number
            for name, number in own_domain(means[-1]).items():
                metrics[f"{name}_last/{method}"] = number
            for row, own in enumerate(domains):
                for column, other in enumerate(domains):
                    metrics[f"for_{labels[other]}/{method} of {labels[own]}"] = float(confusion[row, column])
            rows += [
                (method, phase, own, other, float(matrix[row, column]))
                for phase, matrix in enumerate(means)
                for row, own in enumerate(domains)
                for column, other in enumerate(domains)
            ]
        table = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
        return Measured(metrics, {"confusion": table}, {"data.fingerprint": data.fingerprint})

    def scored(self, data: DataBundle, seed: int, settings: Mapping[str, str]) -> list[InRunValues]:
        """The phases of one run, with a column of values for each domain's validation set, sorted."""
        model = language_model(self.settings, data, seed, self.device)
        optimizer = adamw(model, self.settings.adamw_lr)
        held = hold_out(data, self.settings.val_samples, 0, seed)
        sets = {name: rows_of(tokens, width(self.settings), self.device) for name, tokens in held.val.items()}
        rows = rows_of(tokens_of(data.train), width(self.settings), self.device)
        batches = epochs(len(rows), self.settings.batch_size, seed)
        steps = self.settings.steps // self.settings.phases
        return [
            train_scored(
                model, optimizer, rows, islice(batches, steps), token_loss, lambda step: None,
                val=sets, settings=settings,
            )
            for _ in range(self.settings.phases)
        ]  # fmt: skip


def _domains(data: DataBundle) -> list[str]:
    """All domains, in sorted order, which is that of the validation sets."""
    domains = sorted(set(data.val.domains))
    if len(domains) < FEWEST_DOMAINS or set(data.train.domains) != set(domains):
        raise DataError(
            f"training samples are of {', '.join(sorted(set(data.train.domains)))} and validation samples of "
            f"{', '.join(domains)}: give two or more domains with samples of each on both sides, or raise "
            "fidelity.data.val_samples"
        )
    return domains


def metric_labels(domains: Sequence[str]) -> list[str]:
    """The domains' names as parts of metrics' names, where MLflow takes some letters only and a slash parts
    names.
    """
    labels = [re.sub(r"[^\w\-. ]", "_", name) for name in domains]
    return [name if labels.count(name) == 1 else f"{name} {i}" for i, name in enumerate(labels)]


def mean_values(values: Tensor, of: Sequence[str], domains: Sequence[str]) -> Tensor:
    """The mean value of each domain's samples for each validation set, `[D, D]`, from values `[n, D]` of
    samples that are `of` these domains.
    """
    rows = [torch.tensor([name == domain for name in of]) for domain in domains]
    return torch.stack([values[row].mean(0) for row in rows])


def own_domain(confusion: Tensor) -> dict[str, float]:
    """How often, and how nearly, a domain's own samples are the best for it.

    Args:
        confusion: `[D, D]`, a row for each domain trained on, a column for each validation set.
    """
    own = confusion.diagonal()
    ranks = 1 + (confusion > own).sum(0)  # [D]: of the validation sets' own domains
    targets = (confusion > own[:, None]).sum(1)  # [D]: validation sets that a domain helps more than its own
    return {
        "own_highest": float((ranks == 1).double().mean()),
        "own_rank": float(ranks.double().mean()),
        "own_target": float((targets == 0).double().mean()),
    }
