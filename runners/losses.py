"""What a run minimises, with the sums per row that its reports need beside the mean."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from ghost import LossReduction
from ghost.batch import Inputs, Items, plain, to_device
from ghost.distributed import unwrap
from ghost.loss import IGNORED_LABEL
from runners.choices import TaskName
from runners.models import parameter_dtype
from runners.tasks import model_task


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
    # Shifting the labels, not the logits, spares a copy of the latter.
    following = F.pad(Y[:, 1:], (0, 1), value=IGNORED_LABEL)  # [b, T]
    return _token_loss(model(**inputs).logits, following)


def seq2seq_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Loss:
    """Cross-entropy of target tokens `[b, T]`, each predicted from the source and the targets before it."""
    assert isinstance(X, dict)
    own: Any = unwrap(model)  # a wrapper of several processes has only the forward
    before: Tensor = own.prepare_decoder_input_ids_from_labels(Y)  # [b, T]
    return _token_loss(model(**X, decoder_input_ids=before).logits, Y)


def class_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Loss:
    """Cross-entropy of class labels `[b]`, for models that take one tensor and return logits."""
    return _row_loss(model(X), Y)


def text_class_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Loss:
    """Cross-entropy of class labels `[b]` of token rows, for Hugging Face's classifiers."""
    assert isinstance(X, dict)
    return _row_loss(model(**X).logits, Y)


def image_class_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Loss:
    """Cross-entropy of class labels `[b]` of images `[b, c, h, w]`, for Hugging Face's classifiers."""
    return _row_loss(model(pixel_values=X).logits, Y)


def _token_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Mean over the counted labels `[b, T]` of logits `[b, T, V]`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    counts = (labels != IGNORED_LABEL).sum(1)
    return Loss(tokens.sum() / counts.sum(), tokens.detach().sum(1), counts)


def _row_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Mean over the rows of logits `[b, classes]`, labels `[b]`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = F.cross_entropy(logits, labels, reduction="none")
    return Loss(rows.mean(), rows.detach(), torch.ones_like(labels))


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
        X = self._cast(X) if isinstance(X, Tensor) else {name: self._cast(value) for name, value in X.items()}
        return to_device(X, self.device), Y.to(self.device)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Items):
            return replace(value, values=self._cast(value.values))
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if is_float else value

    def loss(self, model: nn.Module, X: Inputs, Y: Tensor) -> Loss:
        """The loss under the run's autocast."""
        with self._precision():
            return self.compute(model, plain(X), Y)

    def mean(self, model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        """The mean loss alone, for engines that run validation passes of their own."""
        return self.loss(model, X, Y).mean

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()


LOSSES: dict[TaskName, tuple[Callable[[nn.Module, Inputs, Tensor], Loss], LossReduction]] = {
    TaskName.language: (language_loss, LossReduction.CAUSAL_TOKEN_MEAN),
    TaskName.image_text: (language_loss, LossReduction.CAUSAL_TOKEN_MEAN),
    TaskName.seq2seq: (seq2seq_loss, LossReduction.TOKEN_MEAN),
    TaskName.text_classes: (text_class_loss, LossReduction.SAMPLE_MEAN),
    TaskName.image_classes: (image_class_loss, LossReduction.SAMPLE_MEAN),
}


def model_loss(model: DictConfig) -> tuple[Callable[[nn.Module, Inputs, Tensor], Loss], LossReduction]:
    """What the model of the config's `model` node minimises, and what its mean is taken over."""
    return LOSSES[model_task(model)] if model.kind == "hf" else (class_loss, LossReduction.SAMPLE_MEAN)


def build_task(cfg: DictConfig, device: torch.device) -> Task:
    """The task that fits the configured model."""
    autocast = getattr(torch, cfg.dtype.autocast) if cfg.dtype.autocast else None
    compute, reduction = model_loss(cfg.model)
    return Task(compute, reduction, autocast, parameter_dtype(cfg.dtype), device)
