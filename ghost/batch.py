"""Batches as users have them: tensors, or dicts with any keys of tensors, other values, and containers of
both. Rows of two batches are put together key by key.
"""

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghost.errors import BatchError, shown
from ghost.items import Items, check_items, items_of, joined_items
from ghost.loss import IGNORED_LABEL
from ghost.nesting import children, leaves, mapped, rebuilt, within

Inputs = Tensor | Mapping[str, Any]


def row_count(inputs: Inputs, what: str) -> int:
    """Number of samples in a batch.

    Raises:
        BatchError: There is no tensor, there are no rows, tensors disagree, or items are of no row.
    """
    if not isinstance(inputs, Tensor | Mapping):
        raise BatchError(f"{what} is a {type(inputs).__name__}: give a tensor or a dict of tensors.")
    sizes = {path: value.shape[0] for path, value in leaves(inputs) if _has_rows(value)}
    if not sizes:
        raise BatchError(f"{what} holds no tensor with a row per sample.")
    if len(set(sizes.values())) > 1:
        raise BatchError(f"{what} has tensors of different numbers of rows: {sizes}.")
    rows = next(iter(sizes.values()))
    if rows == 0:
        raise BatchError(f"{what} is empty: a batch needs at least one row.")
    for path, value in leaves(inputs):
        if isinstance(value, Items):
            check_items(value, rows, f"{what} has items {path!r}")
    return rows


def check_labels(labels: Any, rows: int, what: str) -> None:
    """Raise `BatchError` unless there is one label row for each of the batch's rows."""
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        raise BatchError(
            f"the labels of {what} should be a tensor with a row per sample, not {shown(labels)}."
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
        raise BatchError(f"batch_idx={shown(batch_idx)} should be integers, one per row.") from error
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
    """T where the inputs are `[rows, T, …]`: the first ids' or mask's, or else the first tensor's."""
    tensors = [value for _, value in leaves(inputs) if isinstance(value, Tensor) and value.dim() > 1]
    ids = [tensor for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point()]
    return next((tensor.shape[1] for tensor in (*ids, *tensors)), None)


def take_rows(inputs: Inputs, rows: Tensor | slice) -> Inputs:
    """The given rows of every tensor, in their order, and their items; what is no tensor passes through."""

    def take(value: Any) -> Any:
        if isinstance(value, Items):
            return items_of(
                value, torch.arange(row_count(inputs, "the batch"), device=value.row.device)[rows]
            )
        return value[rows] if _has_rows(value) else value

    return mapped(take, inputs)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Every tensor on `device`; what is no tensor passes through."""

    def move(value: Any) -> Any:
        if isinstance(value, Items):
            return Items(value.values.to(device), value.row.to(device))
        return value.to(device) if isinstance(value, Tensor) else value

    return mapped(move, inputs)


def plain(inputs: Any) -> Any:
    """What a model takes: the values in place of their `Items`, and nothing where there are none."""
    if isinstance(inputs, Items):
        return inputs.values if len(inputs.row) else None
    entries = children(inputs)
    if entries is None:
        return inputs
    kept = {key: plain(entry) for key, entry in entries.items()}
    if isinstance(inputs, Mapping) and not is_dataclass(inputs):
        kept = {key: entry for key, entry in kept.items() if not _is_empty(entries[key])}
    return rebuilt(inputs, kept)


def item_rows(inputs: Inputs) -> list[Tensor]:
    """The `row` tensor of every `Items`, in order."""
    return [value.row for _, value in leaves(inputs) if isinstance(value, Items)]


def join_inputs(train: Inputs, val: Inputs, right_padding_is_safe: bool, pad_id: int = 0) -> Inputs:
    """Training rows, then validation rows, of every tensor.

    Rows of different lengths are padded on the right. That changes nothing where later positions cannot be
    seen (`right_padding_is_safe`: causal models whose padded labels are ignored) or an attention mask hides
    them.

    Raises:
        BatchError: Keys, kinds, ranks, lengths, dtypes or devices do not fit together.
    """
    if isinstance(train, Tensor) != isinstance(val, Tensor):
        raise BatchError(
            f"training inputs are a {type(train).__name__} and validation inputs a {type(val).__name__}: "
            "give both alike."
        )
    path = "inputs" if isinstance(train, Tensor) else ""
    joiner = _Joiner(row_count(train, "the training batch"), pad_id)
    return joiner.join(path, train, val, right_padding_is_safe)


def join_labels(train: Tensor, val: Tensor) -> Tensor:
    """Training labels, then validation labels; shorter rows end in -100."""
    return _Joiner(len(train), IGNORED_LABEL).tensors("labels", train, val, padding_is_safe=True)


_MASKS = {
    "attention_mask": ("input_ids", "inputs_embeds"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_inputs_embeds"),
}
"""Masks that may be on one side only, and the inputs whose positions they are of: where there is no mask all
positions are real, whatever the model. What missing `token_type_ids` or `position_ids` mean differs between
models (BERT adds the embedding of type 0, GPT-2 none), so those are given on both sides or on none.
"""

_ID_KEYS = ("inputs", "input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class _Joiner:
    """Puts validation rows behind `train_rows` training rows; shorter rows of ids end in `pad_id`."""

    train_rows: int
    pad_id: int

    def join(self, path: str, train: Any, val: Any, padding_is_safe: bool) -> Any:
        """Both sides of one key, and of all that is in it."""
        if isinstance(train, Items) or isinstance(val, Items):
            return self.items(path, train, val)
        are_mappings = isinstance(train, Mapping) and isinstance(val, Mapping)
        if not are_mappings and not _holds_tensors(train) and not _holds_tensors(val):
            return _shared(path, train, val)
        a, b = children(train), children(val)
        if a is None and b is None:
            return self._single(path, train, val, padding_is_safe)
        if a is None or b is None or isinstance(train, Mapping) != isinstance(val, Mapping):
            raise BatchError(
                f"{path!r} is a {type(train).__name__} in training and a {type(val).__name__} in validation: "
                "give both alike."
            )
        if are_mappings:
            a, b = _with_masks(a, b)
            padding_is_safe = padding_is_safe or a.get("attention_mask") is not None
        _refuse_missing(path, a, b)
        joined = {
            key: self.join(within(path, key), a.get(key), b.get(key), padding_is_safe)
            for key in (*a, *(key for key in b if key not in a and b[key] is not None))
        }
        return rebuilt(train, joined)

    def items(self, path: str, train: Any, val: Any) -> Items:
        """Training items, then validation items; a side may have none."""
        for side in (train, val):
            if side is not None and not isinstance(side, Items):
                raise BatchError(
                    f"{path!r} is Items on one side and a {type(side).__name__} on the other: give both "
                    "alike."
                )
        if train is not None and val is not None and len(train.row) and len(val.row):
            _check_alike(path, train.values, val.values)
            if train.values.shape[1:] != val.values.shape[1:]:
                raise BatchError(_shape_message(path, train.values, val.values) + ".")
        return joined_items(train, val, self.train_rows)

    def _single(self, path: str, train: Any, val: Any, padding_is_safe: bool) -> Any:
        if _has_rows(train) != _has_rows(val):
            raise BatchError(
                f"{path!r} has a row per sample on one side only: give it alike for training and validation."
            )
        if not _has_rows(train):
            return _shared(path, train, val)
        return self.tensors(path, train, val, padding_is_safe)

    def tensors(self, path: str, train: Tensor, val: Tensor, padding_is_safe: bool) -> Tensor:
        """Training rows, then validation rows, of one tensor."""
        _check_alike(path, train, val)
        if train.shape[1:] == val.shape[1:]:
            return torch.cat([train, val])
        key = path.rpartition(".")[2]
        if train.dim() != 2 or val.dim() != 2 or not _can_be_padded(key, train.dtype):
            raise BatchError(_shape_message(path, train, val) + ".")
        # A decoder sees no later positions, and what it predicts there has the label -100.
        if not padding_is_safe and key != "labels" and not key.startswith("decoder_"):
            raise BatchError(
                _shape_message(path, train, val)
                + ", or an attention_mask so that shorter ones can be padded."
            )
        pad = IGNORED_LABEL if key == "labels" else self.pad_id if key in _ID_KEYS else 0
        length = max(train.shape[1], val.shape[1])
        return torch.cat([F.pad(t, (0, length - t.shape[1]), value=pad) for t in (train, val)])


def _with_masks(train: dict[Any, Any], val: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Both sides with a mask of ones where only the other side has one."""
    sides = dict(train), dict(val)
    for mask, sources in _MASKS.items():
        for side, other in (sides, sides[::-1]):
            given = other.get(mask)
            positions = [side[key].shape[:2] for key in sources if _has_rows(side.get(key))]
            if side.get(mask) is None and isinstance(given, Tensor) and given.dim() == 2 and positions:
                side[mask] = given.new_ones(positions[0])
    return sides


def _refuse_missing(path: str, train: dict[Any, Any], val: dict[Any, Any]) -> None:
    """Raise `BatchError` where a key is missing or None on one side, and has something on the other that is
    more than items.
    """
    missing = [
        within(path, key)
        for key in {**train, **val}
        if (train.get(key) is None) != (val.get(key) is None)
        and not any(isinstance(side.get(key), Items) for side in (train, val))
    ]
    if missing:
        raise BatchError(
            f"the input keys {sorted(missing)} are on one side only: give them for training and validation."
        )


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _holds_tensors(node: Any) -> bool:
    return any(isinstance(value, Tensor | Items) for _, value in leaves(node))


def _is_empty(value: Any) -> bool:
    return isinstance(value, Items) and len(value.row) == 0


def _shared(path: str, train: Any, val: Any) -> Any:
    """A value without rows: a number must be one for the joint batch, anything else passes through."""
    sides = [side.item() if isinstance(side, Tensor) else side for side in (train, val)]
    numbers = [side for side in sides if isinstance(side, bool | int | float | complex)]
    if numbers and (len(numbers) < 2 or numbers[0] != numbers[1]):
        raise BatchError(
            f"{path!r} is {shown(sides[0])} in training and {shown(sides[1])} in validation: a joint batch "
            "has one value."
        )
    return train


def _can_be_padded(key: str, dtype: torch.dtype) -> bool:
    """Whether rows of `[rows, T]` may become longer: those of ids, labels and masks."""
    if key == "labels":
        return not dtype.is_floating_point and dtype.is_signed  # -100 must fit
    return key in _MASKS or not (dtype.is_floating_point or dtype.is_complex)


def _check_alike(path: str, train: Tensor, val: Tensor) -> None:
    for a, b in ((train.dtype, val.dtype), (train.device, val.device)):
        if a != b:
            raise BatchError(f"{path!r} is {a} in training and {b} in validation: give both alike.")


def _shape_message(path: str, train: Tensor, val: Tensor) -> str:
    return (
        f"{path!r} has rows of shape {tuple(train.shape[1:])} in training and {tuple(val.shape[1:])} in "
        "validation: give rows of one shape"
    )
