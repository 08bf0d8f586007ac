"""What a forward pass keeps for the backward, counted on tensors that have shapes and no memory."""

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from runners.choices import TaskName


class KeptValues(saved_tensors_hooks):
    """Context in which forward passes run: counts the values that autograd saves, weights left out.

    What several operations save counts once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._note, lambda saved: saved)
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        # Storages are held, so that none is freed and another given its number.
        self._kept: dict[int, tuple[torch.UntypedStorage, int]] = {}

    @property
    def total(self) -> int:
        """Number of values so far."""
        return sum(storage.nbytes() // itemsize for storage, itemsize in self._kept.values())

    def _note(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in self._weights:
            self._kept[storage._cdata] = storage, saved.element_size()
        return saved


def kept_values(
    model: nn.Module, task: TaskName, rows: int, seq_len: int | None, input_shape: tuple[int, ...] | None
) -> tuple[int, int]:
    """Values that a forward over `rows` rows keeps for the backward, and values of its logits.

    A row of text has `seq_len` tokens, of source and of target alike; a row of text with images has one.
    Causal attention is counted as for rows of different lengths, with a mask; without one it keeps a little
    less.

    Args:
        model: On any device, the meta device too; it is left alone.
    """
    model = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        kept = KeptValues(model)
        with kept:
            logits = _logits(model, task, (rows, seq_len or 0), (rows, *(input_shape or ())))
        return kept.total, logits.numel()


def _logits(model: nn.Module, task: TaskName, text: tuple[int, ...], numbers: tuple[int, ...]) -> Tensor:
    """`text` and `numbers`: shapes of token ids and of a table or images."""
    dtype = next(model.parameters()).dtype
    if not isinstance(model, PreTrainedModel):
        return model(torch.zeros(numbers, dtype=dtype))  # [b, classes]
    if task == TaskName.image_classes:
        return model(pixel_values=torch.zeros(numbers, dtype=dtype)).logits
    ids = torch.zeros(text, dtype=torch.int64)
    if task == TaskName.seq2seq:
        return model(input_ids=ids, decoder_input_ids=ids).logits
    if task == TaskName.image_text:
        # Apart, since where the images go in the text depends on the ids, which have no values here.
        vision = model.config.vision_config
        images = torch.zeros(text[0], 3, vision.image_size, vision.image_size, dtype=dtype)
        model.get_image_features(pixel_values=images)  # type: ignore[operator]
    return model(input_ids=ids).logits
