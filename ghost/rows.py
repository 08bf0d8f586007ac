"""A step's scores as rows of the score log: which columns they have, and each column's learning rate."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ghost.config import GhostConfig, Resolution
from ghost.engines import Engine, LayerScores
from ghost.errors import ProtocolError
from ghost.scores import Column, ScoreLog
from ghost.update import Update, UpdateObserver

log = logging.getLogger(__name__)


@dataclass
class Step:
    """What is known of the step in progress; a step may have several micro-batches.

    Attributes:
        rates: The groups' learning rates `[R]` when its last backward was done, float64.
        weights: How often each sample's part of the step's gradient is in `.grad`, `[B]` float64, where a
            policy has decided on it.
        gram: `⟨g_i, g_j⟩`, `[B, B]`, where it was asked for.
    """

    iteration: int
    samples: list[Tensor] = field(default_factory=list)
    scores: list[LayerScores] = field(default_factory=list)
    curvatures: list[LayerScores] = field(default_factory=list)
    rates: Tensor | None = None
    weights: Tensor | None = None
    gram: Tensor | None = None

    def sample(self) -> Tensor:
        return torch.cat(self.samples)


def together(micro_batches: Sequence[LayerScores]) -> LayerScores:
    """Scores `[K, B, C]` of all micro-batches by layer and parameter name."""
    if len(micro_batches) == 1:
        return micro_batches[0]
    return {key: torch.cat([part[key] for part in micro_batches], dim=1) for key in micro_batches[0]}


class StepRows:
    """Makes rows of steps.

    Args:
        engine: Whose scores they are.
        config: Settings.
        parameters: The model's, by each of their qualified names.
        observer: Knows the optimizer's groups, and what it made of the step.
    """

    def __init__(
        self, engine: Engine, config: GhostConfig, parameters: Mapping[str, nn.Parameter],
        observer: UpdateObserver,
    ) -> None:  # fmt: skip
        self._engine, self._config, self._parameters, self._observer = engine, config, parameters, observer
        self._untrained = self._outside_groups()

    def _outside_groups(self) -> list[str]:
        """Scored parameters that the optimizer does not have: no step moves them, so they are credited
        nothing.
        """
        groups = self._observer.groups()
        scored = {f"{layer}.{key}" if layer else key for layer, key in self._engine.parts()}
        missing = sorted(name for name in scored if id(self._parameters[name]) not in groups)
        if missing:
            log.warning(
                "the optimizer does not have %s: their scores are credited nothing.", ", ".join(missing)
            )
        return missing

    def labelled(
        self, by_parameter: LayerScores, resolution: Resolution
    ) -> Iterator[tuple[str, str, Tensor]]:
        """Label, parameter and scores `[B, C]` of every part of a step's scores."""
        parts = self._engine.parts()
        for (layer, key), scores in by_parameter.items():
            parameter = f"{layer}.{key}" if layer else key
            for (name, family), part in zip(parts[layer, key], scores, strict=True):
                label = {
                    Resolution.TOTAL: "total", Resolution.LAYER: layer, Resolution.FAMILY: family,
                    Resolution.HEAD: name,
                }[resolution]  # fmt: skip
                yield label, parameter, part

    def append(self, rows: ScoreLog, step: Step) -> None:
        """The step's rows, with what the optimizer made of the step."""
        update = self._observer.take()
        if update is None:
            log.info(
                "step %d was skipped by the optimizer: its samples are credited nothing.", step.iteration
            )
            update = self._observer.skipped()
        columns, score, lr = self._columns(together(step.scores), update)
        curvature = None
        if step.curvatures:
            self._refuse_other_rates(step, update)
            _, curvature, _ = self._columns(together(step.curvatures), update)
        val = self._engine.val_rows() if self._config.pairwise else None
        rows.append(
            step.iteration, step.sample(), score, lr, update.clip, columns, val, curvature,
            step.weights,
        )  # fmt: skip

    def _refuse_other_rates(self, step: Step, update: Update) -> None:
        """Curvatures are of the direction in which the groups' learning rates turn the gradient."""
        assert step.rates is not None
        now = update.lr.expand_as(step.rates)
        then = step.rates if bool(step.rates.any()) else torch.ones_like(step.rates)
        # The same direction, whatever its length; a step of no length has any.
        if not torch.allclose(then * now.amax(), now * then.amax(), rtol=1e-9, atol=0.0):
            raise ProtocolError(
                f"step {step.iteration} ended its backward with learning rates {step.rates.tolist()} and was "
                f"taken with {now.tolist()}: with order=2 set those of groups before the last backward."
            )

    def _columns(self, by_parameter: LayerScores, update: Update) -> tuple[list[Column], Tensor, Tensor]:
        """The step's scores `[n, K]` with what each column is, and each column's learning rate `[K]`.

        A column is a part of the model, as far as `resolution` tells them apart, against a validation set or
        sample; parts whose parameter groups have learning rates of their own are columns of their own.
        """
        groups = self._observer.groups()
        lr = torch.cat([update.lr, update.lr.new_zeros(1)])  # what no group has is not trained
        if not bool((update.lr != update.lr[0]).any()) and not self._untrained:
            groups = dict.fromkeys(groups, 0)
        found: dict[tuple[str, int], Tensor] = {}
        for label, parameter, part in self.labelled(by_parameter, self._config.resolution):
            key = label, groups.get(id(self._parameters[parameter]), len(update.lr))
            found[key] = found[key] + part if key in found else part
        wide = next(iter(found.values())).shape[1]
        names = [f"pair {j}" for j in range(wide)] if self._config.pairwise else self._engine.columns
        columns = [Column(label, group, name) for label, group in found for name in names]
        score = torch.stack(list(found.values()), dim=1).flatten(1)  # [n, parts * C]
        rates = torch.stack([lr[group] for _, group in found]).repeat_interleave(len(names))
        return columns, score, rates
