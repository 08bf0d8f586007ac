"""Scores inside Hugging Face's `Trainer`.

A class derived from `Trainer` and not a callback: a callback is shown no batch, and its hook before the
optimizer's step comes after the gradients are clipped, too late to tell by how much. `training_step` has
both. What the `Trainer` makes of the loss stays its own affair: validation rows go through a pass of their
own (`val_mode="separate"`), the batch is the user's, and its samples' gradients are taken inside the backward
that the `Trainer` runs, divided by whatever number of tokens or micro-batches it divides by.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ghost.config import GhostConfig
from ghost.engines import LossFn
from ghost.errors import BatchError, GhostConfigError
from ghost.integrations.indices import SAMPLE_INDEX, IndexedCollator, IndexedRows
from ghost.integrations.settings import scoring_settings
from ghost.integrations.table import write_values
from ghost.loss import IGNORED_LABEL, LossReduction, count, infer_reduction
from ghost.manager import GhostEngineManager
from ghost.scores import save_atomically

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "ghost.integrations.hf_trainer needs transformers and accelerate: pip install 'ghostrunner[trainer]'."
    ) from error

STATE_FILE = "ghost.pt"
"""The manager's state, in a checkpoint's folder."""

_LABELS = "labels"
_ROUNDING = 0.02
"""Of the ratio of two losses, in half precision."""
_MODELS_OWN_LOSS = ("transformers.", "trl.trainer.sft_trainer")
"""Modules of trainers whose `compute_loss` gives the model's own loss."""


class GhostTrainer(Trainer):
    """`Trainer`, with a score for every training sample of every step.

    A sample is known by its row number in `train_dataset`, or by the integer under `sample_index` where rows
    have one. Together with another trainer: `class Scored(GhostTrainer, SFTTrainer)`.

    Args:
        ghost: Settings, as for `GhostEngineManager`; `val_mode` is "separate", and the training arguments say
            `gradient_accumulation_steps`. With `result_dir` the score shards are written to its folder
            `scores`, and after training `values.parquet` beside it.
        val_data: The rows whose loss the scores are about: a data set, whose rows the data collator makes one
            batch of, `(X_val, Y_val)`, or several of either by name.
        loss_fn: `loss_fn(model, X, Y)`, the loss of a validation batch; by default the model's own.
        manager_kwargs: Further keyword arguments of `GhostEngineManager`.
        *args, **kwargs: `Trainer`'s own.

    Attributes:
        manager: The latest training's manager; None before its first step.

    Raises:
        GhostConfigError: Training arguments and settings do not go together.
    """

    def __init__(
        self, *args: Any, ghost: Any, val_data: Any, loss_fn: LossFn | None = None,
        manager_kwargs: Mapping[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.manager: GhostEngineManager | None = None
        self._ghost_config = _settings(ghost, self.args)
        self._ghost_val_data, self._ghost_loss_fn = val_data, loss_fn
        self._ghost_kwargs = dict(manager_kwargs or {})
        self._ghost_state: dict[str, Any] | None = None
        self._ghost_heeds: bool | None = None  # whether the loss is divided by a step's items, once known
        self._ghost_reduction = self._ghost_config.loss_reduction or _known_reduction(self.model)
        _refuse_arguments(self, loss_fn)
        _refuse_unknown_loss(self, self._ghost_config, loss_fn)
        self.add_callback(_StateKeeper(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; at the end all scores are on disk and the model is put back.

        Raises:
            GhostConfigError: The checkpoint is of a training without scores.
        """
        self.manager, self._ghost_state, self._ghost_heeds = None, None, None
        if resume_from_checkpoint:
            self._ghost_state = _saved_state(resume_from_checkpoint, self.args.output_dir)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.manager is not None:
                self.manager.cleanup()
        self.accelerator.wait_for_everyone()  # each rank has shards of its own
        if self._ghost_config.result_dir is not None and self.is_world_process_zero():
            write_values(Path(self._ghost_config.result_dir))
        return output

    def get_train_dataloader(self) -> DataLoader[Any]:
        """`Trainer`'s, whose batches have their rows' indices under `sample_index`."""
        self._set_signature_columns_if_needed()
        given = self.train_dataset, self.data_collator, self._signature_columns
        columns = [*(self._signature_columns or ()), SAMPLE_INDEX]  # those that are not removed
        if self.train_dataset is not None and not isinstance(self.train_dataset, IterableDataset):
            self.train_dataset = IndexedRows(self.train_dataset)
        self.data_collator = IndexedCollator(self.data_collator)
        self._signature_columns = columns  # type: ignore[assignment]
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator, self._signature_columns = given

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """`Trainer.training_step`, scored."""
        if self.manager is None:
            self.manager = self._new_manager(model)
        X = dict(inputs)
        index, Y = _taken(X, SAMPLE_INDEX), _taken(X, _LABELS)
        share = self._micro_batch_share(X, Y, num_items_in_batch)
        model.train()  # an evaluation may have come before, and the validation pass is here
        self.manager.attach_train_batch(X, Y, self.state.global_step, index, share)
        X_fwd, Y_fwd = self.manager.prepare_forward_input(X, Y)
        loss = super().training_step(model, {**X_fwd, _LABELS: Y_fwd}, num_items_in_batch)  # type: ignore[dict-item]
        if self.accelerator.sync_gradients:
            self.manager.prepare_gradients()
        return loss

    def _micro_batch_share(
        self, X: dict[str, Any], Y: Tensor, items: Tensor | int | None
    ) -> float | Tensor | None:
        """The factor on a micro-batch's mean loss in the step's, that of all ranks; None without a policy.

        Args:
            items: What counts in the whole step, where the `Trainer` knows it.
        """
        if self._ghost_config.policy is None or self._ghost_reduction is None:
            return None
        if not self._divided_by_loss(items):
            return 1 / (self.current_gradient_accumulation_steps * self.accelerator.num_processes)
        # Ranks' gradients are averaged, unless the `Trainer` has multiplied each loss by their number.
        is_of_all = items is not None and self.args.average_tokens_across_devices
        ranks = 1 if is_of_all else self.accelerator.num_processes
        if items is None or not self._heeds_items(X, Y):
            return 1 / ranks  # a step's loss is the sum of its micro-batches' means
        return count(Y, self._ghost_reduction).double() / (items * ranks)

    def _divided_by_loss(self, items: Tensor | int | None) -> bool:
        """Whether the `Trainer` takes the loss to be divided for the whole step already, and does not divide
        it by the number of micro-batches: as in its `training_step`.
        """
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)  # since transformers 5
        if said is not None:
            return said
        return (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None

    def _heeds_items(self, X: dict[str, Any], Y: Tensor) -> bool:
        """Whether the loss is a sum, divided by what counts in the whole step: that of many models is handed
        the number, and is the mean over its own rows.

        No signature tells, so the loss is asked with two numbers, once a training. Labels that do not count
        would leave nothing to compare, and stand as class 0.

        Raises:
            GhostConfigError: It is neither.
        """
        if self._ghost_heeds is None:
            batch = self._prepare_inputs({**X, _LABELS: Y.masked_fill(Y == IGNORED_LABEL, 0)})
            once, twice = (self._loss_by(batch, items) for items in (Y.numel(), 2 * Y.numel()))
            ratio = twice / once if once else math.nan
            if min(abs(ratio - 0.5), abs(ratio - 1.0)) > _ROUNDING or math.isnan(ratio):
                raise GhostConfigError(
                    f"a policy cannot weigh micro-batches whose loss goes from {once:g} to {twice:g} with "
                    "twice the num_items_in_batch: it should be a sum divided by it, or a mean without it."
                )
            self._ghost_heeds = ratio < 0.75
        return self._ghost_heeds

    def _loss_by(self, batch: dict[str, Any], items: int) -> float:
        """The training loss by a number of items, with no trace in the model or the random numbers."""
        device, model = self.args.device, self.model
        assert isinstance(model, nn.Module)
        devices, number = [device] if device.type == "cuda" else [], torch.tensor(items, device=device)
        model.eval()  # `training_step` puts it back
        with torch.random.fork_rng(devices), torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, dict(batch), num_items_in_batch=number)
        assert isinstance(loss, Tensor)
        return float(loss)

    def _new_manager(self, model: nn.Module) -> GhostEngineManager:
        optimizer = self.optimizer
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return GhostEngineManager(
            self._ghost_config, model, optimizer, val_data=self._validation_rows(self._ghost_val_data),
            loss_fn=self._ghost_loss_fn, scaler=self.accelerator.scaler, state=self._ghost_state,
            **self._ghost_kwargs,
        )  # fmt: skip

    def _validation_rows(self, val_data: Any) -> Any:
        """Validation data as the manager takes it."""
        if isinstance(val_data, Mapping):
            return {name: self._validation_rows(part) for name, part in val_data.items()}
        if val_data is None or isinstance(val_data, tuple):
            return val_data
        loader = self.get_test_dataloader(val_data)  # leaves out columns that the model does not know
        rows: Any = loader.dataset
        with torch.random.fork_rng(devices=[]):  # a collator that masks at random draws beside training
            batch = dict(loader.collate_fn([rows[i] for i in range(len(rows))]))
        batch.pop(SAMPLE_INDEX, None)  # a column of its own is no input
        return batch, _taken(batch, _LABELS)


class _StateKeeper(TrainerCallback):
    """Puts the manager's state beside what else is in a checkpoint."""

    def __init__(self, trainer: GhostTrainer) -> None:
        self._trainer = trainer

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a checkpoint: write `ghost.pt`, unless training cannot go on from it anyway."""
        if args.save_only_model or self._trainer.manager is None:
            return
        found = self._trainer.manager.state_dict()  # on every rank, each of which writes its rows
        if args.should_save:
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_atomically(found, folder / STATE_FILE)


def _taken(batch: dict[str, Any], key: str) -> Tensor:
    """The batch's entry, no longer in it."""
    if key not in batch:
        raise BatchError(
            f"a batch has no {key!r}, only {', '.join(sorted(batch))}: GhostTrainer needs the rows' labels "
            f"under {_LABELS!r}, and training batches of its own get_train_dataloader()."
        )
    return batch.pop(key)


def _known_reduction(model: Any) -> LossReduction | None:
    """What the model's loss is a mean of, where that can be told."""
    try:
        return infer_reduction(model)
    except GhostConfigError:
        return None


def _settings(ghost: Any, args: TrainingArguments) -> GhostConfig:
    """The manager's settings, as far as the `Trainer` decides them."""
    joined = "add rows to batches whose tokens the Trainer counts"
    config, steps = scoring_settings(ghost, "GhostTrainer", joined), args.gradient_accumulation_steps
    if config.gradient_accumulation_steps not in (1, steps):
        raise GhostConfigError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} contradicts the training "
            f"arguments' {steps}: leave it out."
        )
    return replace(config, gradient_accumulation_steps=steps)


def _refuse_arguments(trainer: GhostTrainer, loss_fn: LossFn | None) -> None:
    """Raise `GhostConfigError` for training arguments under which scores could not be right."""
    args, distributed, optim = trainer.args, trainer.accelerator.distributed_type, str(trainer.args.optim)
    own = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    other_loss = "changes the training loss, and validation rows would go by the model's own"
    message = None
    if loss_fn is None and args.label_smoothing_factor != 0:
        smoothing = args.label_smoothing_factor
        message = f"label_smoothing_factor={smoothing} {other_loss}: set it to 0, or give loss_fn."
    elif args.auto_find_batch_size:
        message = (
            "auto_find_batch_size=True starts over when memory runs out, and steps would be scored twice: "
            "set it to False."
        )
    elif args.n_gpu > 1:
        message = f"n_gpu={args.n_gpu} splits batches by DataParallel: use one GPU, or DDP by torchrun."
    elif distributed not in own:
        message = (
            f"distributed_type={distributed.value} is not supported: use one process, or DDP by torchrun."
        )
    elif "lomo" in optim.lower() or "layerwise" in optim.lower():
        message = f"optim={optim!r} steps inside the backward, before scores are known: choose another."
    if message is not None:
        raise GhostConfigError(message)


def _own_compute_loss(trainer: Trainer) -> type | None:
    """The class that computes the loss in its own way; None where that is the model's own loss."""
    first = next(kind for kind in type(trainer).__mro__ if "compute_loss" in kind.__dict__)
    return None if first.__module__.startswith(_MODELS_OWN_LOSS) else first


def _refuse_unknown_loss(trainer: GhostTrainer, config: GhostConfig, loss_fn: LossFn | None) -> None:
    """Raise `GhostConfigError` where training goes by a loss that nobody described."""
    own = _own_compute_loss(trainer)
    if trainer.compute_loss_func is None and own is None:
        return
    what = "compute_loss_func" if own is None else f"{own.__name__}.compute_loss"
    if loss_fn is None:
        raise GhostConfigError(
            f"{what} changes the training loss, and validation rows would go by the model's own: give "
            "loss_fn too."
        )
    if config.policy is not None and config.loss_reduction is None:
        raise GhostConfigError(
            f"loss_reduction=None with {what}: a policy weighs samples by what the loss is a mean of, so set "
            "it."
        )


def _saved_state(checkpoint: str | bool, output_dir: str | None) -> dict[str, Any] | None:
    """The manager's state in a checkpoint, or in the latest one; None where there is no checkpoint at all,
    which the `Trainer` will say.
    """
    folder = get_last_checkpoint(str(output_dir)) if checkpoint is True else str(checkpoint)
    if folder is None or not Path(folder).is_dir():
        return None
    path = Path(folder) / STATE_FILE
    if not path.exists():
        raise GhostConfigError(
            f"{folder} has no {STATE_FILE}, so it is no checkpoint of a GhostTrainer to go on from: choose "
            "another, or start anew."
        )
    return torch.load(path, weights_only=True)
