"""Scores inside Lightning's automatic optimisation, as a callback.

Lightning's hooks suffice: a batch is seen before its `training_step`, and the gradients behind the last
backward of a step and before they are clipped. What goes through the model stays the user's affair, so
validation rows go through a pass of their own (`val_mode="separate"`).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghost.batch import Inputs
from ghost.config import GhostConfig
from ghost.engines import LossFn
from ghost.errors import BatchError, GhostConfigError
from ghost.integrations.indices import SAMPLE_INDEX
from ghost.integrations.settings import scoring_settings
from ghost.integrations.table import write_values
from ghost.manager import GhostEngineManager
from ghost.validation import model_loss

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.strategies import SingleDeviceStrategy
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.plugins import MixedPrecision
        from pytorch_lightning.strategies import SingleDeviceStrategy
    except ImportError as error:
        raise ImportError(
            "ghost.integrations.lightning needs Lightning: pip install 'ghostrunner[lightning]'."
        ) from error

Split = Callable[[Any], tuple[Inputs, Tensor, Tensor]]
"""From a batch as `training_step` gets it to inputs, labels and its rows' running indices, `[b]` integers."""


def split_batch(batch: Any) -> tuple[Inputs, Tensor, Tensor]:
    """Inputs, labels and indices of `(X, Y, index)`, or of a mapping with `labels` and `sample_index`.

    Raises:
        BatchError: The batch is neither.
    """
    if isinstance(batch, Mapping) and {"labels", SAMPLE_INDEX} <= batch.keys():
        X = {key: value for key, value in batch.items() if key not in ("labels", SAMPLE_INDEX)}
        return X, batch["labels"], batch[SAMPLE_INDEX]
    if isinstance(batch, tuple | list) and len(batch) == 3:
        return batch[0], batch[1], batch[2]
    kind = f"mapping of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise BatchError(
        f"a training batch is a {kind}, in which GhostCallback finds no samples' indices: wrap the data set "
        "in ghost.integrations.indices.IndexedRows, or give split."
    )


class GhostCallback(Callback):
    """A score for every training sample of every step of `Trainer.fit`.

    Args:
        config: Settings, as for `GhostEngineManager`; `val_mode` is "separate", and the `Trainer` says
            `gradient_accumulation_steps`. With `result_dir` the score shards are written to its folder
            `scores`, and after training `values.parquet` beside it.
        val_data: `(X_val, Y_val)`, or several by name: the rows whose loss the scores are about.
        loss_fn: `loss_fn(module, X, Y)`, the loss of a validation batch, taken in the `Trainer`'s precision;
            by default `module(**X, labels=Y).loss`.
        module: The part of the LightningModule that is `loss_fn`'s module, by name; all of it by default. It
            has all trainable parameters.
        split: Takes a training batch apart; by default `split_batch`.
        **manager_kwargs: Further keyword arguments of `GhostEngineManager`.

    Attributes:
        manager: The latest training's manager; None before it.
    """

    def __init__(
        self, config: Any, *, val_data: Any, loss_fn: LossFn = model_loss, module: str = "",
        split: Split = split_batch, **manager_kwargs: Any,
    ) -> None:  # fmt: skip
        self._config = _settings(config)
        self._val_data, self._loss_fn, self._module, self._split = val_data, loss_fn, module, split
        self._manager_kwargs = manager_kwargs
        self._state: dict[str, Any] | None = None
        self.manager: GhostEngineManager | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be scored."""
        self.manager = None
        _refuse(trainer, pl_module)
        _part(pl_module, self._module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the model."""
        if trainer.global_step > 0 and self._state is None:
            raise GhostConfigError(
                f"training goes on from step {trainer.global_step} without a GhostCallback's state: choose a "
                "checkpoint that was written with one, or start anew."
            )
        config = replace(self._config, gradient_accumulation_steps=trainer.accumulate_grad_batches)

        def loss_fn(module: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                return self._loss_fn(module, trainer.precision_plugin.convert_input(X), Y)

        self.manager = GhostEngineManager(
            config, _part(pl_module, self._module), trainer.optimizers[0], val_data=self._val_data,
            loss_fn=loss_fn, state=self._state, **self._manager_kwargs,
        )  # fmt: skip

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the batch's `training_step`."""
        manager, steps = self._attached(), trainer.accumulate_grad_batches
        X, Y, index = self._split(batch)
        if manager.engine.reads_gradients and batch_idx % steps == 0:
            trainer.optimizers[0].zero_grad()  # Lightning does so too, but behind the forward
        manager.attach_train_batch(X, Y, trainer.global_step, index, share=1 / steps)
        manager.prepare_forward_input(X, Y)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Refuse a loss that reads parameters where scoring cannot see it."""
        self._attached().engine.check_loss(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Behind a step's last backward, before clipping."""
        self._attached().prepare_gradients()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is pending, put the model back, write the table of values."""
        self._leave()
        if self._config.result_dir is not None:
            write_values(Path(self._config.result_dir))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is pending and put the model back."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps in its checkpoints."""
        return {} if self.manager is None else self.manager.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint has for the manager to come."""
        self._state = state_dict

    def _attached(self) -> GhostEngineManager:
        assert self.manager is not None  # made when training started
        return self.manager

    def _leave(self) -> None:
        self._state = None
        if self.manager is not None:
            self.manager.cleanup()


def _settings(config: Any) -> GhostConfig:
    """The manager's settings, as far as Lightning decides them."""
    read = scoring_settings(config, "GhostCallback", "change the batch that training_step gets")
    if read.gradient_accumulation_steps != 1:
        raise GhostConfigError(
            f"gradient_accumulation_steps={read.gradient_accumulation_steps} is the Trainer's to say: leave "
            "it out, and set accumulate_grad_batches."
        )
    return read


def _refuse(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise `GhostConfigError` for a training whose scores could not be right."""
    precision, optimizers = trainer.precision_plugin, trainer.optimizers
    name = type(pl_module).__name__
    message = None
    if not pl_module.automatic_optimization:
        message = f"{name} optimises manually: use GhostEngineManager itself in its training_step."
    elif not isinstance(trainer.strategy, SingleDeviceStrategy):
        message = f"strategy={type(trainer.strategy).__name__} is not supported: use one device."
    elif isinstance(precision, MixedPrecision) and precision.scaler is not None:
        message = f"precision={precision.precision!r} scales the loss: use 'bf16-mixed' or '32-true'."
    elif str(trainer.gradient_clip_algorithm or "norm").lower().endswith("value"):
        message = "gradient_clip_algorithm='value' has no one coefficient for values: use 'norm'."
    elif len(optimizers) != 1:
        message = f"{name} has {len(optimizers)} optimizers: GhostCallback takes one."
    elif isinstance(optimizers[0], torch.optim.LBFGS):
        message = "LBFGS takes several backwards a step, with a score each: use another optimizer."
    if message is not None:
        raise GhostConfigError(message)


def _part(pl_module: LightningModule, name: str) -> nn.Module:
    """The part of a LightningModule, with all its trainable parameters.

    Raises:
        GhostConfigError: There is no such part, or something outside of it is trained.
    """
    names = [found for found, _ in pl_module.named_modules()]
    if name not in names:
        children = ", ".join(found for found, _ in pl_module.named_children())
        raise GhostConfigError(
            f"module={name!r} is no part of {type(pl_module).__name__}, which has {children}."
        )
    part = pl_module.get_submodule(name)
    inside = {id(p) for p in part.parameters()}
    for found, p in pl_module.named_parameters():
        if p.requires_grad and id(p) not in inside:
            raise GhostConfigError(
                f"module={name!r} does not have the trainable parameter {found!r}, which would not be "
                "scored: name a part that has all of them."
            )
    return part
