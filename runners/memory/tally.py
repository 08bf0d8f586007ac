"""Bytes that tensors hold at once, counted while operations run."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _entries(mask: Tensor) -> Tensor:
    """What `nonzero` gives of a mask that is all true."""
    return mask.new_empty(mask.numel(), mask.dim(), dtype=torch.int64)


def _chosen(values: Tensor, index: Sequence[Tensor | None]) -> Any:
    """`values[mask]` for a mask that is all true; None for any other index."""
    if len(index) != 1 or index[0] is None or index[0].dtype is not torch.bool:
        return None
    return values.new_empty(index[0].numel(), *values.shape[index[0].dim() :])


# What code asks of a tensor's values. One that has none is taken for ones: finite, equal, true.
_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._local_scalar_dense.default: lambda _: 1,
    torch.ops.aten.equal.default: lambda *_: True,
    torch.ops.aten.allclose.default: lambda *_: True,
    torch.ops.aten.nonzero.default: _entries,
    torch.ops.aten.index.Tensor: _chosen,
}


SMALL = 32 * 2**20
"""Bytes of a block up to which the C library may take it from its heap, which does not shrink (glibc)."""


class Tally(TorchDispatchMode):
    """Context in which every operation's new storage counts, under the label in force, until it is freed.

    Tensors may be real or without memory (`FakeTensor`). What an operation takes and gives back within itself
    is not seen.

    Args:
        device: Where storage counts.

    Attributes:
        label: What new storage counts under.
        peak: Bytes by label when most was held at once.
        small: How many of these were in storages below `SMALL`.
    """

    def __init__(self, device: torch.device, label: str) -> None:
        super().__init__()
        self.label = label
        self._kind = device.type
        self.peak: Mapping[str, int] = {}
        self.small = self._small = 0
        self._held: Counter[str] = Counter()
        self._live = self._most = 0
        self._labels: dict[int, str] = {}  # by storage

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Within the block, new storage counts under `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def note(self, tensor: Tensor, label: str | None = None) -> None:
        """Count a tensor's storage from now on under `label`, or, where it is new, under the one in force."""
        if tensor.device.type != self._kind:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._labels:
            self._labels[key] = label or self.label
            weakref.finalize(storage, self._freed, key, size)
            self._add(self._labels[key], size)
        elif label is not None:
            self._held[self._labels[key]] -= size
            self._held[label] += size
            self._labels[key] = label

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = None
        if func in _ANSWERS and any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args)):
            found = _ANSWERS[func](*args)
        if found is None:
            found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return found

    def _add(self, label: str, size: int) -> None:
        self._held[label] += size
        self._live += size
        self._small += size if size < SMALL else 0
        if self._live > self._most:
            self._most, self.peak, self.small = self._live, dict(self._held), self._small

    def _freed(self, key: int, size: int) -> None:
        self._held[self._labels.pop(key)] -= size
        self._live -= size
        self._small -= size if size < SMALL else 0
