"""The two ways in which a validation gradient meets the training samples' gradients.

`JointValidation` (`val_mode=concat`): training and validation rows go through one forward and one backward,
and each layer finds the validation gradient in its own backward. `SeparateValidation`: a plain backward over
the validation rows comes first, and hands every layer its part of the gradient as a target.
"""

import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ghost.algebra import accumulation_dtype
from ghost.batch import (
    Inputs,
    check_labels,
    join_inputs,
    join_labels,
    plain,
    row_count,
    take_rows,
    to_device,
)
from ghost.choice import Choices
from ghost.config import GhostConfig, ValGradDevice
from ghost.discovery import find_ties, shared_parameters
from ghost.distributed import device_of, gradients, local, sharded_as
from ghost.engines.base import LossFn
from ghost.errors import GhostConfigError, shown
from ghost.fingerprint import tensors_fingerprint
from ghost.instrument import Instrument
from ghost.items import Items
from ghost.kept import DeferringConcatTap, DeferringTargetTap, Kept
from ghost.layers import Layer
from ghost.loss import LossReduction, count, infer_reduction
from ghost.nesting import leaves
from ghost.preconditioner import AdamRule, UpdateRule
from ghost.slopes import ConcatSlopeTap, TargetSlopeTap, slope_taps
from ghost.step import Parts, StepState
from ghost.taps import ConcatTap, Tap, TargetTap, WatchTap

log = logging.getLogger(__name__)


def model_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    """A Hugging Face model's own loss."""
    inputs = {"input_ids": X} if isinstance(X, Tensor) else X
    return model(**{**inputs, "labels": Y}).loss


Join = Callable[[tuple[Inputs, Tensor], tuple[Inputs, Tensor]], tuple[Inputs, Tensor]]
ScoredParts = dict[str, dict[str, Parts]]
"""The parts of each parameter that are scored, by layer name and parameter name."""

ValData = tuple[Inputs, Tensor] | Mapping[str, tuple[Inputs, Tensor]]
"""Validation inputs and labels, or several named sets of them."""


def _pad_id(model: nn.Module) -> int:
    """A Hugging Face model's padding token; 0 where it has none."""
    config = getattr(model, "config", None)
    configs = (config, getattr(config, "text_config", None))
    return next((found for c in configs if (found := getattr(c, "pad_token_id", None)) is not None), 0)


class ValidationRows:
    """The validation rows on the model's device, set after set.

    Attributes:
        names: Names of the sets; `("",)` for one without a name.
        bounds: First row of each set, and the number of rows.
    """

    def __init__(self, val_data: ValData | None, device: torch.device, join: Join) -> None:
        if val_data is None:
            raise GhostConfigError(
                "val_data is missing: give (X_val, Y_val), the rows whose loss the scores are about."
            )
        sets = dict(val_data) if isinstance(val_data, Mapping) else {"": val_data}
        if not sets:
            raise GhostConfigError(
                "val_data is an empty mapping: give at least one named set (X_val, Y_val)."
            )
        self.names, self.bounds = tuple(sets), [0]
        parts = []
        for name, pair in sets.items():
            what = f"val_data[{name!r}]" if name else "val_data"
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise GhostConfigError(f"{what} should be (X_val, Y_val), not {shown(pair)}.")
            X, Y = pair
            rows = row_count(X, what)
            check_labels(Y, rows, what)
            parts.append((to_device(X, device), Y.to(device)))
            self.bounds.append(self.bounds[-1] + rows)
        self.X, self.Y = functools.reduce(join, parts)
        self.rows = self.bounds[-1]

    def take(self, rows: Tensor | slice) -> tuple[Inputs, Tensor]:
        """The given rows."""
        return take_rows(self.X, rows), self.Y[rows]

    def digest(self) -> str:
        """What ranks compare, to see that they have the same rows."""
        found = leaves((self.X, self.Y))
        values = ((path, leaf.values if isinstance(leaf, Items) else leaf) for path, leaf in found)
        return tensors_fingerprint((path, leaf) for path, leaf in values if isinstance(leaf, Tensor))

    def spans(self) -> list[tuple[str, int, int]]:
        """Name, first row and end of each set."""
        return list(zip(self.names, self.bounds, self.bounds[1:], strict=False))


_OTHER_STATE = (
    "state is not of a manager with val_mode={mode!r} and this validation data: go on with the settings that "
    "it was taken from."
)


class Validation(ABC):
    """How an engine brings the validation gradient to the layers.

    Attributes:
        columns: Names of the scores' columns: `("",)`, or the validation sets.
        choices: Which algebra each matrix's scores are taken by.
    """

    instrument: Instrument
    choices: Choices
    columns: tuple[str, ...]
    sizes: tuple[int, ...]
    """Validation rows of each column that join a training batch."""

    @abstractmethod
    def begin(self, Y: Tensor, first: bool) -> None:
        """Get ready for a training micro-batch with labels `Y`, the first of its step or a later one."""

    @abstractmethod
    def release(self) -> None:
        """Let go of what was kept from step to step and can be computed again."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 (hex) over the validation rows."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What decides the coming steps' validation gradients, between two steps."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            GhostConfigError: It is of other settings or other validation data.
        """

    @abstractmethod
    def join(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        """What goes through the model."""

    @abstractmethod
    def val_rows(self) -> Tensor:
        """Which validation rows this step's columns are about, in their order, `[v]` int64."""

    @abstractmethod
    def loss_factor(self) -> Tensor | None:
        """Factor on the model's loss that leaves the training rows' own loss in it; None for 1."""

    @abstractmethod
    def score_factor(self, share: float | Tensor, world_size: int, scale: Tensor | None) -> Tensor | float:
        """Factor on the probes' gradients, one for all columns or one each.

        Args:
            share: The factor on this micro-batch's loss in the step's loss.
            world_size: How many ranks average their gradients: the loss here had so many times the share.
            scale: The loss scale, if any.
        """


class JointValidation(Validation):
    """Each step takes the next `val_batch_size` rows of each validation set, in turn, into its passes.

    With `n` the numbers of labels that the model's mean counts, a joint mean loss is `(n_t L_t + n_v L_v) /
    (n_t + n_v)`. Multiplied by
    `(n_t + n_v) / n_t` its gradient on the training rows is `∇L_t`, on the validation rows `(n_v / n_t)
    ∇L_v`, and so on those of a set s `(n_s / n_t) ∇L_s`.
    """

    def __init__(
        self, model: nn.Module, state: StepState, layers: list[Layer], scored: ScoredParts,
        config: GhostConfig, val_data: ValData | None, kept: Kept, rule: UpdateRule | None = None,
    ) -> None:  # fmt: skip
        parameter = next(iter(layers[0].params.values()))
        self._dtype = accumulation_dtype(parameter.dtype)
        self._kept = kept
        self._reduction = config.loss_reduction or infer_reduction(model)
        self._pad_id = _pad_id(model)
        self._val = ValidationRows(val_data, device_of(parameter), self._join)
        self._batches = [min(config.val_batch_size or hi - lo, hi - lo) for _, lo, hi in self._val.spans()]
        self._cursors = [0 for _ in self._batches]
        self._pairwise = config.pairwise
        self.columns = self._val.names
        self.sizes = (1,) * sum(self._batches) if config.pairwise else tuple(self._batches)
        self._refuse_uncounted_rows()
        self._take(self._next_rows())
        self._train_count = self._val_counts.sum()
        self._cursors = [0 for _ in self._batches]
        self.choices = Choices(config.chunk_mb)
        if isinstance(rule, AdamRule):
            slopes = slope_taps(ConcatSlopeTap, layers, scored, state, self.choices)
            self.instrument = Instrument(model, state, list(slopes), [], detach_params=True)
        else:
            self.instrument = self._instrument(model, state, layers, scored, config)

    def _instrument(
        self,
        model: nn.Module,
        state: StepState,
        layers: list[Layer],
        scored: ScoredParts,
        config: GhostConfig,
    ) -> Instrument:
        names = {layer.name for layer in layers if scored[layer.name]}
        # Ties that travel along the graph keep nothing; the ledger settles them as it does other shared ones.
        found = [] if config.defers else find_ties(layers)
        ties = [tie for tie in found if {tie.table.name, tie.head.name} & names]
        for tie in ties:  # each needs the other's validation gradient
            scored = scored | {tie.table.name: {"weight": (None,)}, tie.head.name: {"weight": (None,)}}
        tied = {id(tie.table.params["weight"]) for tie in ties}
        shared = {
            key for key, uses in shared_parameters(layers).items()
            if key not in tied and any(param in scored[layer.name] for layer, param in uses)
        }  # fmt: skip
        make = functools.partial(DeferringConcatTap, kept=self._kept) if config.defers else ConcatTap
        taps: list[Tap] = [
            make(
                layer, scored[layer.name], config.algebra, state,
                frozenset(key for key, p in layer.params.items() if id(p) in shared),
                choices=self.choices,
            )
            for layer in layers
        ]  # fmt: skip
        return Instrument(model, state, taps, ties, detach_params=True)

    def _refuse_uncounted_rows(self) -> None:
        for batch, (name, lo, hi) in zip(self._batches, self._val.spans(), strict=True):
            for first in range(0, hi - lo, math.gcd(batch, hi - lo)):
                rows = self._window(lo, hi, first, batch)
                if int(count(self._val.Y[rows], self._reduction)) == 0:
                    raise GhostConfigError(
                        f"val_data{f'[{name!r}]' if name else ''} has no label that the loss counts in the "
                        f"{batch} rows from row {first} on, so their gradient is undefined: remove rows "
                        "without labels, or raise val_batch_size."
                    )

    def _window(self, lo: int, hi: int, first: int, rows: int) -> Tensor:
        """`rows` rows of the set `[lo, hi)` from its row `first` on; the first row follows the last."""
        return lo + (first + torch.arange(rows, device=self._val.Y.device)) % (hi - lo)

    def _next_rows(self) -> Tensor:
        """The next rows of each set."""
        windows = []
        for s, (_, lo, hi) in enumerate(self._val.spans()):
            windows.append(self._window(lo, hi, self._cursors[s], self._batches[s]))
            self._cursors[s] = (self._cursors[s] + self._batches[s]) % (hi - lo)
        return torch.cat(windows)

    def _take(self, rows: Tensor) -> None:
        self._rows = rows
        self._X, self._Y = self._val.take(rows)
        counts = [count(Y, self._reduction) for Y in self._Y.split(self._batches)]
        self._val_counts = torch.stack(counts).to(self._dtype)  # [sets]

    def begin(self, Y: Tensor, first: bool) -> None:
        # A batch without a counted label has no mean; with a count of one its gradient and scores are zero.
        self._train_count = count(Y, self._reduction).clamp(min=1).to(self._dtype)
        if first:  # a step's micro-batches meet the same validation rows
            self._take(self._next_rows())

    def release(self) -> None:
        """Nothing is kept but the rows."""

    def digest(self) -> str:
        return self._val.digest()

    def state_dict(self) -> dict[str, Any]:
        return {"cursors": list(self._cursors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        cursors = state.get("cursors")
        spans = self._val.spans()
        if (
            cursors is None
            or len(cursors) != len(spans)
            or any(at >= hi - lo for at, (_, lo, hi) in zip(cursors, spans, strict=True))
        ):
            raise GhostConfigError(_OTHER_STATE.format(mode="concat"))
        self._cursors = list(cursors)

    def join(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        return self._join((X, Y), (self._X, self._Y))

    def _join(self, first: tuple[Inputs, Tensor], then: tuple[Inputs, Tensor]) -> tuple[Inputs, Tensor]:
        causal = self._reduction is LossReduction.CAUSAL_TOKEN_MEAN
        X = join_inputs(first[0], then[0], right_padding_is_safe=causal, pad_id=self._pad_id)
        return X, join_labels(first[1], then[1])

    def val_rows(self) -> Tensor:
        return self._rows

    def loss_factor(self) -> Tensor | None:
        if self._reduction is LossReduction.SUM:
            return None
        return (self._train_count + self._val_counts.sum()) / self._train_count

    def score_factor(self, share: float | Tensor, world_size: int, scale: Tensor | None) -> Tensor:
        # A pair's validation sample counts as it does in the mean over all rows.
        counts = self._val_counts.sum() if self._pairwise else self._val_counts  # all 1 for a sum
        if self._reduction is LossReduction.SUM:
            counts = torch.ones_like(counts)
        ratio = self._train_count / counts
        if not isinstance(share, Tensor) and share == 0:  # nothing counted in this micro-batch
            return torch.zeros_like(ratio)
        # The probes hold products of two scaled gradients; the training side keeps its share of the step's
        # loss.
        ratio = ratio / (share * world_size**2)
        if isinstance(share, Tensor):  # the same, without asking a GPU
            ratio = torch.where(share.to(ratio.device) == 0, 0.0, ratio)
        return ratio if scale is None else ratio / (scale * scale)


def weighted_sums(
    parts: Iterable[tuple[float | Tensor, Sequence[Tensor | None]]], params: Sequence[Tensor],
    dtype: torch.dtype, device: torch.device,
) -> list[Tensor]:  # fmt: skip
    """Weighted sums of one tensor a parameter, on the given device; None stands for zeros. A part that is all
    there is stays uncopied: with few validation rows each pass over the model's parameters is felt.
    """
    totals: list[Tensor | None] = [None] * len(params)
    for weight, tensors in parts:
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                wide = tensor.to(dtype)
                part = (wide if isinstance(weight, float) and weight == 1.0 else wide * weight).to(device)
                total = totals[i]
                totals[i] = part if total is None else total + part
    return [
        torch.zeros_like(p, dtype=dtype, device=device) if total is None else total
        for p, total in zip(params, totals, strict=True)
    ]


def stack_columns(columns: Sequence[list[Tensor]]) -> list[Tensor]:
    """`[C, *shape]` of each parameter from C columns' tensors; of one column a view."""
    if len(columns) == 1:
        return [tensor[None] for tensor in columns[0]]
    return [torch.stack(parts) for parts in zip(*columns, strict=True)]


class SeparateValidation(Validation):
    """Plain backwards over all validation rows, every `val_every` steps."""

    def __init__(
        self, model: nn.Module, state: StepState, layers: list[Layer], scored: ScoredParts,
        config: GhostConfig, val_data: ValData | None, loss_fn: LossFn | None, scaler: Any, kept: Kept,
        rule: UpdateRule | None = None,
    ) -> None:  # fmt: skip
        self._model, self._loss_fn, self._every = model, loss_fn or model_loss, config.val_every
        self._kept = kept
        self._scored, self._rule, self.choices = scored, rule, Choices(config.chunk_mb)
        taps = self._taps(layers, config, state)
        layers = [tap.layer for tap in taps]
        parameter = next(iter(layers[0].params.values()))
        self._dtype = accumulation_dtype(parameter.dtype)
        self._reduction = config.loss_reduction
        self._val = ValidationRows(val_data, device_of(parameter), self._join)
        self.columns, self.sizes = self._val.names, (0,)
        batch = config.val_batch_size or self._val.rows
        if self._reduction is None and (config.pairwise or batch < self._val.rows):
            self._reduction = infer_reduction(model)  # micro-batches are weighed by what they count
        self._micro_batches = self._pairs() if config.pairwise else [
            self._split(lo, hi, batch) for _, lo, hi in self._val.spans()
        ]  # fmt: skip
        self.sizes = (0,) * len(self._micro_batches)
        self.instrument = Instrument(model, state, taps, [], detach_params=not config.bitwise)
        self._names = {tap.layer.qualified(key): tap.layer.params[key] for tap in taps for key in tap.scored}
        self._device = device_of(parameter)
        self._kept_on = self._keeping_device(config, parameter)
        self._scaler = scaler
        self._age: int | None = None  # steps since the validation gradient was taken

    def _keeping_device(self, config: GhostConfig, parameter: Tensor) -> torch.device:
        """Where validation gradients are added up and kept."""
        if config.val_grad_device is ValGradDevice.MODEL:
            return self._device
        if isinstance(parameter, DTensor):
            raise GhostConfigError(
                "val_grad_device='cpu' is nothing that a model under fully_shard can have, whose validation "
                "gradient is sharded as it is: leave it at 'model'."
            )
        if self._device.type == "cpu":
            log.info("val_grad_device='cpu' changes nothing: the model is on the CPU.")
        return torch.device("cpu")

    def _taps(self, layers: list[Layer], config: GhostConfig, state: StepState) -> list[Tap]:
        if isinstance(self._rule, AdamRule):
            return list(slope_taps(TargetSlopeTap, layers, self._scored, state, self.choices))
        if config.defers:  # layers that are not scored, too: their gradients wait for the samples' weights
            scored, how = self._scored, config.algebra
            return [
                DeferringTargetTap(layer, scored[layer.name], how, self._kept, choices=self.choices)
                for layer in layers
            ]
        return [self._tap(layer, config) for layer in layers if self._scored[layer.name]]

    def _tap(self, layer: Layer, config: GhostConfig) -> Tap:
        make = WatchTap if config.bitwise else TargetTap
        return make(layer, self._scored[layer.name], config.algebra, choices=self.choices)

    @staticmethod
    def _join(first: tuple[Inputs, Tensor], then: tuple[Inputs, Tensor]) -> tuple[Inputs, Tensor]:
        X = join_inputs(first[0], then[0], right_padding_is_safe=False)
        return X, join_labels(first[1], then[1])

    def begin(self, Y: Tensor, first: bool) -> None:
        if first:
            self._age = None if self._age is None else self._age + 1
            if self._age is None or self._age >= self._every:
                self.release()  # before the new ones take memory
                self.instrument.state.targets, self._age = self.val_grad(), 0

    def release(self) -> None:
        self.instrument.state.targets, self._age = {}, None

    def digest(self) -> str:
        return self._val.digest()

    def state_dict(self) -> dict[str, Any]:
        if self._every == 1:  # the next step takes a validation gradient of its own
            return {"age": None, "val_grad": {}}
        return {
            "age": self._age,
            "val_grad": {name: local(grad) for name, grad in self.instrument.state.targets.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        targets = state.get("val_grad")
        if targets is None or (targets and targets.keys() != self._names.keys()):
            raise GhostConfigError(_OTHER_STATE.format(mode="separate"))
        self._age = state["age"]
        self.instrument.state.targets = {
            name: sharded_as(grad.to(self._kept_on), self._names[name]) for name, grad in targets.items()
        }

    def val_grad(self) -> dict[str, Tensor]:
        """`∇L_val` of each column by qualified parameter name, `[C, *shape]`, in float32 at least."""
        params = {id(p): p for p in self._names.values()}
        columns = [self._gradient(list(params.values()), parts) for parts in self._micro_batches]
        stacked = dict(zip(params, stack_columns(columns), strict=True))
        return {name: stacked[id(p)] for name, p in self._names.items()}

    def _gradient(
        self, params: list[nn.Parameter], micro_batches: list[tuple[float, Inputs, Tensor]]
    ) -> list[Tensor]:
        """The gradient of one column's loss by each of `params`."""
        scale = 1.0 if self._scaler is None else self._scaler.scale(torch.ones((), device=self._device))
        parts = ((weight / scale, self._pass_gradients(X, Y, params)) for weight, X, Y in micro_batches)
        return weighted_sums(parts, params, self._dtype, self._kept_on)

    def _pass_gradients(self, X: Inputs, Y: Tensor, params: list[nn.Parameter]) -> list[Tensor | None]:
        """The gradient of the rows' loss by each of `params`."""
        with self._beside_training():
            loss = self._loss_fn(self._model, plain(X), Y)
            if self._scaler is not None:  # float16 gradients would underflow as training's would
                loss = self._scaler.scale(loss)
            return gradients(loss, self._model, params)

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        """With gradients, and random numbers that training does not notice."""
        with torch.random.fork_rng(self._cuda_devices()), torch.enable_grad():
            yield

    def _cuda_devices(self) -> list[torch.device]:
        """GPUs whose random state the validation pass draws from."""
        return [self._device] if self._device.type == "cuda" else []

    def _split(self, lo: int, hi: int, batch: int) -> list[tuple[float, Inputs, Tensor]]:
        """Weight, inputs and labels of each micro-batch of a set's rows; the weights make the losses' sum the
        loss of all rows. A micro-batch without a counted label has no mean loss and adds nothing.
        """
        self._refuse_uncounted(self._val.Y[lo:hi])
        parts = [self._val.take(slice(at, min(at + batch, hi))) for at in range(lo, hi, batch)]
        if len(parts) == 1 or self._reduction is LossReduction.SUM:
            return [(1.0, X, Y) for X, Y in parts]
        assert self._reduction is not None
        counts = [int(count(Y, self._reduction)) for _, Y in parts]
        return [(n / sum(counts), X, Y) for n, (X, Y) in zip(counts, parts, strict=True) if n]

    def _refuse_uncounted(self, Y: Tensor) -> None:
        """Refuse validation labels of which the loss counts none, as far as it is known how it counts."""
        # No Hugging Face model counts labels that are all -100.
        models_own = LossReduction.TOKEN_MEAN if self._loss_fn is model_loss else LossReduction.SUM
        if int(count(Y, self._reduction or models_own)) == 0:
            raise GhostConfigError("val_data has no label that the loss counts: its gradient is undefined.")

    def _pairs(self) -> list[list[tuple[float, Inputs, Tensor]]]:
        """One column a row, weighed as the row is in the loss of all rows."""
        assert self._reduction is not None
        rows = [self._val.take(slice(i, i + 1)) for i in range(self._val.rows)]
        if self._reduction is LossReduction.SUM:
            return [[(1.0, X, Y)] for X, Y in rows]
        self._refuse_uncounted(self._val.Y)
        counts = [int(count(Y, self._reduction)) for _, Y in rows]
        return [[(n / sum(counts), X, Y)] if n else [] for n, (X, Y) in zip(counts, rows, strict=True)]

    def join(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        return X, Y

    def val_rows(self) -> Tensor:
        return torch.arange(self._val.rows)

    def loss_factor(self) -> None:
        return None

    def score_factor(self, share: float | Tensor, world_size: int, scale: Tensor | None) -> Tensor | float:
        del share  # part of the training gradient, and the validation gradient never had it
        return 1.0 / world_size if scale is None else 1.0 / (world_size * scale)
