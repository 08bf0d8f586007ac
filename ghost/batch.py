"""Batches as users have them: tensors, or dicts of tensors with any keys. Rows of two batches are put
together key by key.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghost.errors import BatchError
from ghost.loss import IGNORED_LABEL

Inputs = Tensor | Mapping[str, Any]


def row_count(inputs: Inputs, what: str) -> int:
    """Number of samples in a batch.

    Raises:
        BatchError: There is no tensor, there are no rows, or tensors disagree.
    """
    if not isinstance(inputs, Tensor | Mapping):
        raise BatchError(f"{what} is a {type(inputs).__name__}: give a tensor or a dict of tensors.")
    tensors = {"": inputs} if isinstance(inputs, Tensor) else inputs
    sizes = {key: t.shape[0] for key, t in tensors.items() if _has_rows(t)}
    if not sizes:
        raise BatchError(f"{what} holds no tensor with a row per sample.")
    if len(set(sizes.values())) > 1:
        raise BatchError(f"{what} has tensors of different numbers of rows: {sizes}.")
    rows = next(iter(sizes.values()))
    if rows == 0:
        raise BatchError(f"{what} is empty: a batch needs at least one row.")
    return rows


def check_labels(labels: Any, rows: int, what: str) -> None:
    """Raise `BatchError` unless there is one label row for each of the batch's rows."""
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        raise BatchError(
            f"the labels of {what} should be a tensor with a row per sample, not {labels!r:.60}."
        )
    if labels.shape[0] != rows:
        raise BatchError(f"{what} has {rows} input rows but {labels.shape[0]} label rows: give one each.")


def sample_indices(batch_idx: Any, rows: int) -> Tensor:
    """Running indices of a batch's rows as `[rows]` int64 on the CPU.

    Raises:
        BatchError: They are no integers, or not one a row.
    """
    try:
        given = torch.as_tensor(batch_idx)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(f"batch_idx={batch_idx!r:.60} should be integers, one per row.") from error
    if given.is_floating_point() or given.is_complex() or given.dtype is torch.bool:
        raise BatchError(f"batch_idx holds {given.dtype}: its entries should be integers, one per row.")
    if given.shape != (rows,):
        raise BatchError(
            f"batch_idx has shape {tuple(given.shape)}, but the training batch has {rows} rows: give one "
            "index each."
        )
    given = given.to("cpu", torch.int64)
    if bool((given < 0).any()):
        raise BatchError(
            f"batch_idx has the negative entry {int(given.min())}: give running indices from 0 on."
        )
    return given


def token_count(inputs: Inputs) -> int | None:
    """T where the (first) input is `[rows, T, …]`."""
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    return next((t.shape[1] for t in tensors if isinstance(t, Tensor) and t.dim() > 1), None)


def take_rows(inputs: Inputs, rows: Tensor | slice) -> Inputs:
    """The given rows of every tensor; what is no tensor passes through."""
    if isinstance(inputs, Tensor):
        return inputs[rows]
    return {k: t[rows] if _has_rows(t) else t for k, t in inputs.items()}


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Every tensor on `device`; what is no tensor passes through."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {k: t.to(device) if isinstance(t, Tensor) else t for k, t in inputs.items()}


def join_inputs(train: Inputs, val: Inputs, right_padding_is_safe: bool, pad_id: int = 0) -> Inputs:
    """Training rows, then validation rows, of every tensor.

    Rows of different lengths are padded on the right. That changes nothing where later positions cannot be
    seen (`right_padding_is_safe`: causal models whose padded labels are ignored) or an attention mask hides
    them.

    Raises:
        BatchError: Keys, ranks or lengths do not fit together.
    """
    if isinstance(train, Tensor) and isinstance(val, Tensor):
        if train.shape[1:] != val.shape[1:] and not right_padding_is_safe:
            raise BatchError(_length_message("inputs", train, val))
        return _join("inputs", train, val, pad_id)
    if isinstance(train, Tensor) or isinstance(val, Tensor):
        raise BatchError(
            f"training inputs are a {type(train).__name__} and validation inputs a {type(val).__name__}: "
            "give both alike."
        )
    train, val = _with_masks(train, val)
    missing = set(train) ^ set(val)
    if missing:
        raise BatchError(
            f"the input keys {sorted(missing)} are on one side only: give them for training and validation."
        )
    hidden = right_padding_is_safe or "attention_mask" in train
    joined = {}
    for key, value in train.items():
        other = val[key]
        if _has_rows(value) != _has_rows(other):
            raise BatchError(
                f"{key!r} has a row per sample on one side only: give it alike for training and validation."
            )
        if not _has_rows(value):
            joined[key] = _shared(key, value, other)
        elif value.shape[1:] != other.shape[1:] and not hidden:
            raise BatchError(_length_message(key, value, other))
        else:
            joined[key] = _join(key, value, other, pad_id if key == "input_ids" else 0)
    return joined


def join_labels(train: Tensor, val: Tensor) -> Tensor:
    """Training labels, then validation labels; shorter rows end in -100."""
    return _join("labels", train, val, IGNORED_LABEL)


def _with_masks(train: Mapping[str, Any], val: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An attention mask for the side that has none while the other has: all its positions are real."""
    sides = dict(train), dict(val)
    mask = next((side["attention_mask"] for side in sides if "attention_mask" in side), None)
    for side in sides:
        if isinstance(mask, Tensor) and "attention_mask" not in side and "input_ids" in side:
            side["attention_mask"] = torch.ones_like(side["input_ids"], dtype=mask.dtype)
    return sides


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _shared(key: str, train: Any, val: Any) -> Any:
    """A value without rows: a tensor must be one for the joint batch, anything else passes through."""
    if isinstance(train, Tensor) and not torch.equal(train, val):
        raise BatchError(
            f"{key!r} is {train.item()} in training and {val.item()} in validation: a joint batch has one "
            "value."
        )
    return train


def _join(key: str, train: Tensor, val: Tensor, pad: int) -> Tensor:
    if train.dtype != val.dtype:
        raise BatchError(
            f"{key!r} is {train.dtype} in training and {val.dtype} in validation: give both alike."
        )
    if train.shape[1:] == val.shape[1:]:
        return torch.cat([train, val])
    if train.dim() != 2 or val.dim() != 2 or train.is_floating_point():
        raise BatchError(_length_message(key, train, val))
    length = max(train.shape[1], val.shape[1])
    return torch.cat([F.pad(t, (0, length - t.shape[1]), value=pad) for t in (train, val)])


def _length_message(key: str, train: Tensor, val: Tensor) -> str:
    return (
        f"{key!r} has rows of shape {tuple(train.shape[1:])} in training and {tuple(val.shape[1:])} in "
        "validation: give rows of one shape, or an attention_mask so that shorter ones can be padded."
    )
