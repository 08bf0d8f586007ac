"""The two ways in which a validation gradient meets the training samples' gradients.

`JointValidation` (`val_mode=concat`): training and validation rows go through one forward and one backward,
and each layer finds the validation gradient in its own backward. `SeparateValidation`: a plain backward over
the validation rows comes first, and hands every layer its part of the gradient as a target.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ghost.algebra import accumulation_dtype
from ghost.batch import Inputs, check_labels, join_inputs, join_labels, row_count, take_rows, to_device
from ghost.config import GhostConfig
from ghost.discovery import find_ties, refuse_uncovered
from ghost.engines.base import LossFn
from ghost.errors import GhostConfigError
from ghost.instrument import Instrument
from ghost.layers import Layer
from ghost.loss import LossReduction, count, infer_reduction
from ghost.taps import ConcatTap, Tap, TargetTap, WatchTap


def model_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """A Hugging Face model's own loss."""
    inputs = {"input_ids": X} if isinstance(X, Tensor) else X
    return model(**inputs, labels=Y).loss


class ValidationRows:
    """The validation rows on the model's device."""

    def __init__(self, val_data: tuple[Inputs, Tensor] | None, device: torch.device) -> None:
        if val_data is None:
            raise GhostConfigError(
                "val_data is missing: give (X_val, Y_val), the rows whose loss the scores are about."
            )
        if not isinstance(val_data, tuple | list) or len(val_data) != 2:
            raise GhostConfigError(f"val_data should be (X_val, Y_val), not {val_data!r:.60}.")
        X, Y = val_data
        self.rows = row_count(X, "val_data")
        check_labels(Y, self.rows, "val_data")
        self.X, self.Y = to_device(X, device), Y.to(device)

    def take(self, rows: Tensor | slice) -> tuple[Inputs, Tensor]:
        """The given rows."""
        return take_rows(self.X, rows), self.Y[rows]


class Validation(ABC):
    """How an engine brings the validation gradient to the layers."""

    instrument: Instrument

    @abstractmethod
    def begin(self, Y: Tensor, first: bool) -> int:
        """Get ready for a training micro-batch with labels `Y`, the first of its step or a later one.

        Returns how many validation rows join it.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of what was kept from step to step and can be computed again."""

    @abstractmethod
    def join(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        """What goes through the model."""

    @abstractmethod
    def loss_factor(self) -> Tensor | None:
        """Factor on the model's loss that leaves the training rows' own loss in it; None for 1."""

    @abstractmethod
    def score_factor(self, share: float | Tensor, scale: Tensor | None) -> Tensor | float:
        """Factor on the probes' gradients.

        Args:
            share: The factor on this micro-batch's loss in the step's loss.
            scale: The loss scale, if any.
        """


class JointValidation(Validation):
    """Each step takes the next `val_batch_size` validation rows in turn into its passes.

    With `n` the numbers of labels that the model's mean counts, a joint mean loss is `(n_t L_t + n_v L_v) /
    (n_t + n_v)`. Multiplied by
    `(n_t + n_v) / n_t` its gradient on the training rows is `∇L_t`, on the validation rows `(n_v / n_t)
    ∇L_v`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        config: GhostConfig,
        val_data: tuple[Inputs, Tensor] | None,
    ) -> None:
        refuse_uncovered(model, layers)
        parameter = next(iter(layers[0].params.values()))
        self._dtype = accumulation_dtype(parameter.dtype)
        self._val = ValidationRows(val_data, parameter.device)
        self._reduction = config.loss_reduction or infer_reduction(model)
        self._batch = min(config.val_batch_size or self._val.rows, self._val.rows)
        self._pad_id = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
        self._cursor = 0
        self._refuse_uncounted_rows()
        self._X, self._Y = self._val.take(self._window(0))
        self._train_count = self._val_count = count(self._Y, self._reduction).to(self._dtype)
        scored = {layer.name: config.selection.matches(layer) for layer in layers}
        ties = [tie for tie in find_ties(layers) if scored[tie.table.name] or scored[tie.head.name]]
        scored |= {name: True for tie in ties for name in (tie.table.name, tie.head.name)}
        taps: list[Tap] = [ConcatTap(layer, scored[layer.name], config.algebra) for layer in layers]
        self.instrument = Instrument(model, taps, ties, detach_params=True)

    def _refuse_uncounted_rows(self) -> None:
        for first in range(0, self._val.rows, math.gcd(self._batch, self._val.rows)):
            if int(count(self._val.Y[self._window(first)], self._reduction)) == 0:
                raise GhostConfigError(
                    f"val_data has no label that the loss counts in the {self._batch} rows from row {first} "
                    "on, so their gradient is undefined: remove rows without labels, or raise val_batch_size."
                )

    def _window(self, first: int) -> Tensor:
        """A step's validation rows, from row `first` on; the first row follows the last."""
        return (first + torch.arange(self._batch, device=self._val.Y.device)) % self._val.rows

    def begin(self, Y: Tensor, first: bool) -> int:
        # A batch without a counted label has no mean; with a count of one its gradient and scores are zero.
        self._train_count = count(Y, self._reduction).clamp(min=1).to(self._dtype)
        if first:  # a step's micro-batches meet the same validation rows
            self._X, self._Y = self._val.take(self._window(self._cursor))
            self._cursor = (self._cursor + self._batch) % self._val.rows
            self._val_count = count(self._Y, self._reduction).to(self._dtype)
        return self._batch

    def release(self) -> None:
        """Nothing is kept but the rows."""

    def join(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        causal = self._reduction is LossReduction.CAUSAL_TOKEN_MEAN
        joined = join_inputs(X, self._X, right_padding_is_safe=causal, pad_id=self._pad_id)
        return joined, join_labels(Y, self._Y)

    def loss_factor(self) -> Tensor | None:
        if self._reduction is LossReduction.SUM:
            return None
        return (self._train_count + self._val_count) / self._train_count

    def score_factor(self, share: float | Tensor, scale: Tensor | None) -> Tensor:
        ratio = self._train_count / self._val_count  # 1 for a sum
        if not isinstance(share, Tensor) and share == 0:  # nothing counted in this micro-batch
            return torch.zeros_like(ratio)
        # The probes hold products of two scaled gradients; the training side keeps its share of the step's
        # loss.
        return ratio / share if scale is None else ratio / (share * scale * scale)


class SeparateValidation(Validation):
    """A plain backward over all validation rows, every `val_every` steps."""

    def __init__(
        self, model: nn.Module, layers: list[Layer], config: GhostConfig,
        val_data: tuple[Inputs, Tensor] | None, loss_fn: LossFn | None, scaler: Any,
    ) -> None:  # fmt: skip
        self._model, self._loss_fn, self._every = model, loss_fn or model_loss, config.val_every
        scored = [layer for layer in layers if config.selection.matches(layer)]
        parameter = next(iter(scored[0].params.values()))
        self._dtype = accumulation_dtype(parameter.dtype)
        self._val = ValidationRows(val_data, parameter.device)
        self._batch = min(config.val_batch_size or self._val.rows, self._val.rows)
        self._reduction = config.loss_reduction
        if self._batch < self._val.rows and self._reduction is None:
            self._reduction = infer_reduction(model)  # micro-batches are weighed by what they count
        self._micro_batches = self._split()
        make = WatchTap if config.bitwise else TargetTap
        taps: list[Tap] = [make(layer, True, config.algebra) for layer in scored]
        self.instrument = Instrument(model, taps, [], detach_params=not config.bitwise)
        self._names = {layer.qualified(key): p for layer in scored for key, p in layer.params.items()}
        self._device = parameter.device
        self._scaler = scaler
        self._age: int | None = None  # steps since the validation gradient was taken

    def begin(self, Y: Tensor, first: bool) -> int:
        if first:
            self._age = None if self._age is None else self._age + 1
            if self._age is None or self._age >= self._every:
                self.instrument.state.targets, self._age = self.val_grad(), 0
        return 0

    def release(self) -> None:
        self.instrument.state.targets, self._age = {}, None

    def val_grad(self) -> dict[str, Tensor]:
        """`∇L_val` by qualified parameter name, over all validation rows, in float32 at least."""
        params = {id(p): p for p in self._names.values()}
        total = {key: torch.zeros_like(p, dtype=self._dtype) for key, p in params.items()}
        scale = 1.0 if self._scaler is None else self._scaler.scale(torch.ones((), device=self._device))
        for weight, X, Y in self._micro_batches:
            with torch.random.fork_rng(self._cuda_devices()), torch.enable_grad():
                loss = self._loss_fn(self._model, X, Y)
                if self._scaler is not None:  # float16 gradients would underflow as training's would
                    loss = self._scaler.scale(loss)
                grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            for key, grad in zip(params, grads, strict=True):
                if grad is not None:
                    total[key] += grad.to(self._dtype) * (weight / scale)
        return {name: total[id(p)] for name, p in self._names.items()}

    def _cuda_devices(self) -> list[torch.device]:
        """GPUs whose random state the validation pass draws from."""
        return [self._device] if self._device.type == "cuda" else []

    def _split(self) -> list[tuple[float, Inputs, Tensor]]:
        """Weight, inputs and labels of each micro-batch; the weights make the losses' sum the loss of all
        rows. A micro-batch without a counted label has no mean loss and adds nothing.
        """
        parts = [self._val.take(slice(lo, lo + self._batch)) for lo in range(0, self._val.rows, self._batch)]
        if len(parts) == 1 or self._reduction is LossReduction.SUM:
            return [(1.0, X, Y) for X, Y in parts]
        assert self._reduction is not None
        counts = [int(count(Y, self._reduction)) for _, Y in parts]
        if sum(counts) == 0:
            raise GhostConfigError("val_data has no label that the loss counts: its gradient is undefined.")
        return [(n / sum(counts), X, Y) for n, (X, Y) in zip(counts, parts, strict=True) if n]

    def join(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        return X, Y

    def loss_factor(self) -> None:
        return None

    def score_factor(self, share: float | Tensor, scale: Tensor | None) -> Tensor | float:
        del share  # part of the training gradient, and the validation gradient never had it
        return 1.0 if scale is None else 1.0 / scale
