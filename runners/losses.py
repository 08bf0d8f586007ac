"""What a run minimises, with the sums per row that its reports need beside the mean."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from ghost import LossReduction
from ghost.batch import Inputs, to_device
from ghost.loss import IGNORED_LABEL
from runners.models import parameter_dtype


@dataclass(frozen=True)
class Loss:
    """A batch's loss.

    Attributes:
        mean: 0-dim, the mean over all counted labels; to be differentiated.
        row_sums: `[rows]`, each row's summed loss, detached.
        row_counts: `[rows]`, each row's counted labels.
    """

    mean: Tensor
    row_sums: Tensor
    row_counts: Tensor


def language_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Loss:
    """Next-token cross-entropy in float32 at least, as Hugging Face counts it: labels `[b, T]` are shifted by
    one here.
    """
    inputs = {"input_ids": X} if isinstance(X, Tensor) else X
    logits = model(**inputs).logits  # [b, T, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Shifting the labels, not the logits, spares a copy of the latter.
    following = F.pad(Y[:, 1:], (0, 1), value=IGNORED_LABEL)  # [b, T]
    tokens = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view_as(following)
    counts = (following != IGNORED_LABEL).sum(1)
    return Loss(tokens.sum() / counts.sum(), tokens.detach().sum(1), counts)


def class_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Loss:
    """Cross-entropy of class labels `[b]`."""
    logits = model(X)  # [b, classes]
    rows = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), Y, reduction="none")
    return Loss(rows.mean(), rows.detach(), torch.ones_like(Y))


@dataclass(frozen=True)
class Task:
    """How a model's loss on a batch is computed and counted.

    Attributes:
        compute: The loss without autocast.
        reduction: What its mean is taken over.
        autocast: dtype of the forward under autocast, or None.
        dtype: The weights' own.
    """

    compute: Callable[[nn.Module, Inputs, Tensor], Loss]
    reduction: LossReduction
    autocast: torch.dtype | None
    dtype: torch.dtype
    device: torch.device

    def cuda_devices(self) -> list[torch.device]:
        """The GPUs whose random state a pass draws from."""
        return [self.device] if self.device.type == "cuda" else []

    def place(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        """A batch on the run's device. Tables and images get the weights' dtype; token ids stay integers."""
        X = X.to(self.dtype) if isinstance(X, Tensor) and X.is_floating_point() else X
        return to_device(X, self.device), Y.to(self.device)

    def loss(self, model: nn.Module, X: Inputs, Y: Tensor) -> Loss:
        """The loss under the run's autocast."""
        with self._precision():
            return self.compute(model, X, Y)

    def mean(self, model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        """The mean loss alone, for engines that run validation passes of their own."""
        return self.loss(model, X, Y).mean

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()


def build_task(cfg: DictConfig, device: torch.device) -> Task:
    """The task that fits the configured model."""
    autocast = getattr(torch, cfg.dtype.autocast) if cfg.dtype.autocast else None
    compute, reduction = (
        (language_loss, LossReduction.CAUSAL_TOKEN_MEAN)
        if cfg.model.kind == "gpt2"
        else (class_loss, LossReduction.SAMPLE_MEAN)
    )
    return Task(compute, reduction, autocast, parameter_dtype(cfg.dtype), device)
