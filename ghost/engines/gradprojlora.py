"""Every sample's gradient, randomly projected: a row of numbers for each sample whose inner products are
those of the gradients.
"""

import logging
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghost.batch import Inputs, plain
from ghost.choice import Algebra
from ghost.config import GhostConfig
from ghost.distributed import ALONE, Ranks
from ghost.engines.base import LayerScores, LossFn, register_engine
from ghost.engines.tapped import TappedEngine
from ghost.errors import GhostConfigError, ProtocolError
from ghost.fingerprint import model_fingerprint
from ghost.instrument import Instrument
from ghost.loss import count, infer_reduction, row_counts
from ghost.projection import VERSION
from ghost.projectors import chosen_parameters, plan
from ghost.store import StoreWriter
from ghost.taps import Projector, ProjectTap, Tap
from ghost.validation import model_loss

log = logging.getLogger(__name__)

STORE = "projections"
"""The store's folder in `result_dir`."""


@register_engine
class GradProjLoRAEngine(TappedEngine):
    """For every sample the projections `P_out g_i P_inᵀ` of its gradient, parameter after parameter, in one
    row.

    `g_i` is the gradient of the sample's *own* loss, its own mean over its own labels (for a loss that is a
    sum, its own sum), so a row does not depend on the batch that it was computed in. A parameter with several
    uses (tied weights) has one projection, of the sum over its uses. `ghost.projection` defines the matrices,
    and `layout` says which columns belong to which parameter. A pass over a corpus::

        engine = GradProjLoRAEngine(model, GhostConfig(engine="gradprojlora", proj_rank_total=256))
        with engine.attached():
            rows = engine.project(X, Y)    # [b, K]; no weight gradient is computed

    Beside a training step, with `weight_grads=True`, the layers' own backwards are left alone, bit for bit,
    and `rows` holds the latest micro-batch's. A weight that is read outside its layer is then not noticed,
    and the rows lack that use.

    Attributes:
        layout: The columns of a row.
        projection: What, with the layout, determines the matrices.
        left_out: Trainable parameters that are not projected.
        rows: The latest rows `[b, K]`, float32 (float64 for float64 models).

    Raises:
        UnsupportedModelError: A trainable parameter or layer cannot be handled exactly.
        GhostConfigError: Settings or selection cannot work.
    """

    name = "gradprojlora"
    needs_optimizer = False
    step_wide = False  # a row is of one sample, wherever the others are

    def __init__(
        self, model: nn.Module, config: GhostConfig, val_data: Any = None,
        loss_fn: LossFn | None = None, scaler: Any = None, ranks: Ranks = ALONE,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, config, val_data, loss_fn, scaler, ranks, optimizer)
        _refuse_scoring_settings(config)
        self._reduction = config.loss_reduction or infer_reduction(model, "give a loss_fn of such a kind")
        self._loss_fn = loss_fn or model_loss
        self._chosen = chosen_parameters(model, self.layers, config)
        self.left_out = [
            name for name, p in model.named_parameters() if p.requires_grad and id(p) not in self._chosen
        ]
        if config.strict and self.left_out:
            raise GhostConfigError(
                f"strict=True, but {len(self.left_out)} trainable parameters are not projected, such as "
                f"{self.left_out[0]!r}: widen the selection, or set strict=False."
            )
        self.projection = {
            "kind": config.proj_kind.value, "seed": config.proj_seed, "version": VERSION,
            "rank_total": config.proj_rank_total, "rank_min": config.proj_rank_min,
        }  # fmt: skip
        self.layout, projectors = plan(model, self.layers, self._chosen, config)
        self._instrument = Instrument(
            model, self.state, self._taps(projectors), [], detach_params=not config.weight_grads
        )
        self.rows = torch.zeros(0, self.layout.width)
        self._uncounted = torch.zeros((), dtype=torch.int64)
        self._writer: StoreWriter | None = None
        self._interrupted, self._overflowed = False, 0

    @property
    def instrument(self) -> Instrument:
        return self._instrument

    def coverage(self) -> dict[str, Any]:
        """What rows speak of: `parameters` and `projected_parameters` (numbers), `projected_parameter_share`,
        and the names `left_out`.
        """
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        projected = sum(part.size_out * part.size_in for part in self.layout.slices)
        return {
            "parameters": trained,
            "projected_parameters": projected,
            "projected_parameter_share": projected / trained,
            "left_out": self.left_out,
        }

    @property
    def uncounted(self) -> int:
        """How many samples had no label that the loss counts; their rows are zeros."""
        return int(self._uncounted)

    def project(self, X: Inputs, Y: Tensor, loss_fn: LossFn | None = None) -> Tensor:
        """The rows of a batch, `[b, K]`, by one forward and a backward without weight gradients.

        Args:
            X, Y: Inputs and labels.
            loss_fn: `loss_fn(model, X, Y)`, counted as `loss_reduction` says; by default the engine's, or a
                Hugging Face model's own loss.
        """
        self._begin(X, Y, 1.0)
        try:
            X_fwd, Y_fwd = self.forward_inputs(X, Y)
            with torch.enable_grad():
                loss = (loss_fn or self._loss_fn)(self.model, X_fwd, Y_fwd)
                self.check_loss(loss)
                # Where parameters are detached, probes are the only leaves, and a backward without `inputs`
                # reaches those inside of re-entrant activation checkpointing too.
                loss.backward(inputs=list(self._probes.values()) if self.config.weight_grads else None)
                self.rows = self._gather(None)
        finally:
            self.abandon()
        return self.rows

    def begin(self, X: Inputs, Y: Tensor, first: bool, share: float | Tensor) -> None:
        del first  # micro-batches have nothing in common
        self._interrupted = True  # until it is collected
        self._begin(X, Y, share * self.ranks.world_size)

    def _begin(self, X: Inputs, Y: Tensor, share: float | Tensor) -> None:
        rows = self._check_batch(X, Y)
        counts = row_counts(Y, self._reduction)  # [b]
        self._counted = counts > 0
        # The batch's mean of N labels has a part n_i / N of the sample's own mean of n_i.
        self._factor = count(Y, self._reduction) / (counts.clamp(min=1).to(self._dtype) * share)
        self._open(X, rows, (), {})

    def _new_probes(self) -> dict[tuple[str, str], Tensor]:
        b, device = self.state.rows.train, self._device
        self._probes = {
            part.parameter: torch.zeros(
                b, part.stop - part.start, dtype=self._dtype, device=device, requires_grad=True
            )
            for part in self.layout.slices
        }
        return {
            (tap.layer.name, key): self._probes[self._chosen[id(tap.layer.params[key])]]
            for tap in self._instrument.taps
            for key in tap.scored
        }

    def forward_inputs(self, X: Inputs, Y: Tensor) -> tuple[Inputs, Tensor]:
        self._note_units(X)
        return plain(X), Y

    def loss_factor(self) -> None:
        return None

    def scale_outputs(self) -> None:
        self.state.loss_unseen = True

    def collect(self) -> LayerScores:
        """After the backward: `rows` holds the projections. There are no scores."""
        if not self.state.active:
            raise ProtocolError(
                "there is no step to collect projections from: begin() comes first, then forward and "
                "backward."
            )
        try:
            self.rows = self._gather(self._loss_scale())
        finally:
            self.abandon()
        self._interrupted = False
        return {}

    def _gather(self, scale: Tensor | None) -> Tensor:
        """The rows `[b, K]` from the probes' gradients under a loss scale."""
        grads = [probe.grad for probe in self._probes.values()]
        self._instrument.refuse_hidden_layers()
        self._check_pass(any(grad is not None for grad in grads))
        found = [
            probe.detach() if grad is None else grad  # a layer that had nothing to do in this pass
            for probe, grad in zip(self._probes.values(), grads, strict=True)
        ]
        factor = self._factor if scale is None else self._factor / scale
        uncounted = ~self._counted
        self._uncounted = self._uncounted.to(uncounted.device) + uncounted.sum()
        rows = torch.cat(found, dim=1) * factor[:, None]  # [b, K]
        return rows.masked_fill(uncounted[:, None], 0.0)

    def keep(self, sample: Tensor) -> None:
        """Hand the latest rows to the store in `result_dir`, if there is one.

        Raises:
            GhostConfigError: It holds a store already.
            StoreError: Earlier rows could not be written.
        """
        if self.config.result_dir is None:
            return
        if self._writer is None:
            self._writer = self._new_writer(Path(self.config.result_dir) / STORE)
        rows = self.rows
        if self.scaler is not None:  # overflows are in the nature of a loss scale, and their step is skipped
            finite = rows.isfinite().all(1)
            rows, sample = rows[finite], sample[finite.to(sample.device)]
            self._overflowed += len(finite) - len(rows)
        self._writer.append(sample, rows)

    def close(self) -> None:
        """Complete the store; after a micro-batch that failed it stays incomplete, for it lacks that one."""
        if self._writer is not None and self._interrupted:
            log.warning("the last micro-batch failed: %s is left incomplete.", self._writer.directory)
            self._writer.abandon()
        elif self._writer is not None:
            self._writer.close()
        if self.uncounted:
            log.warning("%d samples had no label that the loss counts: their rows are zeros.", self.uncounted)
        if self._overflowed:
            log.warning("%d gradients overflowed under the loss scale: they have no rows.", self._overflowed)

    def _new_writer(self, directory: Path) -> StoreWriter:
        rank, world_size = _process()
        # Weights that are trained while their gradients are projected have no fingerprint.
        weights = "changing" if self.config.weight_grads else model_fingerprint(self.model)
        writer = StoreWriter(
            directory, self.layout, projection=self.projection, fingerprints={"model": weights},
            dtype=self.config.proj_dtype, shard_format=self.config.proj_format,
            batches_per_shard=self.config.proj_save_interval, rank=rank, world_size=world_size,
        )  # fmt: skip
        if writer.next_batch:
            writer.abandon()
            raise GhostConfigError(
                f"result_dir={self.config.result_dir!r} holds projections of an earlier run: give another "
                "folder."
            )
        return writer

    def _taps(self, projectors: Mapping[str, Projector]) -> list[Tap]:
        """A tap on each layer that is projected; without weight gradients on all others too, since these run
        on detached parameters.
        """
        taps: list[Tap] = []
        for layer in self.layers:
            mine = {key: self._chosen[id(p)] for key, p in layer.params.items() if id(p) in self._chosen}
            if mine or not self.config.weight_grads:
                how = {key: projectors[name] for key, name in mine.items()}
                taps.append(ProjectTap(layer, dict.fromkeys(mine, (None,)), Algebra.AUTO, how))
        return taps


def _refuse_scoring_settings(config: GhostConfig) -> None:
    """Raise `GhostConfigError` for a setting that means something to scores alone."""
    usual = {f.name: f.default for f in fields(GhostConfig)}
    for name in (
        *("val_mode", "val_every", "val_grad_device", "order", "bitwise", "preconditioner", "credit"),
        *("pairwise", "resolution", "algebra", "chunk_mb", "storage_dtype"),
    ):
        value = getattr(config, name)
        if value != usual[name]:
            shown = value.value if isinstance(value, Enum) else value
            raise GhostConfigError(
                f"{name}={shown!r} has no effect with engine='gradprojlora', which scores nothing: leave it "
                "out."
            )


def _process() -> tuple[int, int]:
    """This process's rank in its group, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
