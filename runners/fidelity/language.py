"""What experiments about language models share: text, models, and rows of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from torch import Tensor, nn

from conf.errors import ConfigError
from conf.schema import key
from ghost.batch import Inputs, to_device
from runners.choices import TaskName
from runners.config import DataConfig, ModelConfig
from runners.data.base import Batch, DataBundle, SampleSet, token_rows
from runners.data.loader import collate
from runners.fidelity.in_run import Rows
from runners.fidelity.settings import ExperimentConfig, check_at_least, check_samples
from runners.losses import language_loss
from runners.models import build_model, place
from runners.tasks import model_task

ADAMW_METHODS: Mapping[str, Mapping[str, str]] = {
    "first_order": {"preconditioner": "none"},
    "optimizer_aware": {"preconditioner": "auto"},
}
"""Settings of a manager beside AdamW, by what its values are called."""


@dataclass
class LanguageConfig(ExperimentConfig):
    """What is trained on, and for how long."""

    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    val_samples: int = key(
        "windows that are scored against, drawn by the seed of data.val_samples held-out ones"
    )
    batch_size: int = key("samples of a step")
    steps: int = key("steps of a run")
    adamw_lr: float = key("learning rate of AdamW, which has no weight decay here")


def check_language(settings: LanguageConfig) -> None:
    """Raises `ConfigError` for data that are no text, a model of something else, and numbers out of range."""
    check_at_least(settings, batch_size=1, steps=1, val_samples=1)
    check_rate("adamw_lr", settings.adamw_lr)
    check_samples(settings, TaskName.language, "interpreter")
    if model_task(OmegaConf.structured(settings.model)) != TaskName.language:
        raise ConfigError(
            f"model@fidelity.model={settings.model.name} is no language model: type "
            "model@fidelity.model=gpt2-tiny, or another"
        )


def check_rate(name: str, rate: float) -> None:
    """Raises `ConfigError` for a learning rate that moves nothing."""
    if not rate > 0:
        raise ConfigError(f"fidelity.{name}={rate} is not above 0: type fidelity.{name}=1e-3, or another")


def width(settings: LanguageConfig) -> int:
    """Tokens of the longest sample."""
    return int(OmegaConf.structured(settings.data).seq_len)


def tokens_of(samples: SampleSet) -> list[Tensor]:
    """Every sample's token ids, `[T]`."""
    found = []
    for i in range(len(samples)):
        inputs, _, _ = samples[i]
        assert isinstance(inputs, dict)  # as all language samples have them
        found.append(inputs["input_ids"])
    return found


def rows_of(tokens: Sequence[Tensor], seq_len: int, device: torch.device) -> Rows:
    """Samples of at most `seq_len` tokens as rows."""
    items = [({"input_ids": ids}, ids.clone(), i) for i, ids in enumerate(tokens)]
    return on_device(collate(items, token_rows(seq_len)), device)


def on_device(batch: Batch, device: torch.device) -> Rows:
    """A batch as rows on the device."""
    X: Any = to_device(batch.inputs, device)
    return Rows(X, batch.labels.to(device))


def language_model(settings: LanguageConfig, data: DataBundle, seed: int, device: torch.device) -> nn.Module:
    """The model with weights that the seed draws, in float32."""
    torch.manual_seed(seed)
    model = build_model(OmegaConf.structured(settings.model), data.vocab_size, None, None, width(settings))
    place(model, device, torch.float32)
    return model


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW that moves weights by gradients alone."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def token_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """Mean next-token cross-entropy."""
    return language_loss(model, X, Y).mean


def mean_loss(model: nn.Module, rows: Rows, batch_size: int) -> float:
    """The same over all rows, `batch_size` of them at a time."""
    total = counted = 0.0
    with torch.no_grad():
        for positions in torch.arange(len(rows)).split(batch_size):
            part = rows.take(positions)
            loss = language_loss(model, part.X, part.Y)
            total += float(loss.row_sums.sum())
            counted += float(loss.row_counts.sum())
    return total / counted


class Watch:
    """The loss on held-out rows, before the first step and then every so many steps."""

    def __init__(self, model: nn.Module, held_out: Rows, batch_size: int, every: int) -> None:
        self.losses: dict[int, float] = {}
        self._model, self._rows, self._batch_size, self._every = model, held_out, batch_size, every
        self(0)

    def __call__(self, done: int) -> None:
        """Note the loss after `done` steps, if it is due."""
        if done % self._every == 0:
            self.losses[done] = mean_loss(self._model, self._rows, self._batch_size)
