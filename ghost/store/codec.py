"""Rows as they are stored: formats, and what each of them would lose."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ghost.errors import StoreError, shown
from ghost.layout import Layout


@dataclass(frozen=True)
class StoredRows:
    """Rows in their stored format.

    Attributes:
        ids: `[n]` int64.
        values: `[n, K]` in the format's dtype.
        norms: `[n, S]` float32, the length of each slice of the rows as they are read back.
        scales: `[n]` float32, what int8 values are multiplied by; None for other formats.
    """

    ids: Tensor
    values: Tensor
    norms: Tensor
    scales: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        columns = (self.ids, self.values, self.norms, self.scales)
        return sum(column.nbytes for column in columns if column is not None)

    def __getitem__(self, index: Tensor) -> "StoredRows":
        """The rows at `index`, copied."""
        scales = None if self.scales is None else self.scales[index]
        return StoredRows(self.ids[index], self.values[index], self.norms[index], scales)

    @classmethod
    def joined(cls, parts: "list[StoredRows]") -> "StoredRows":
        """Rows one behind the other."""
        scales = [part.scales for part in parts if part.scales is not None]
        return cls(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.cat([part.norms for part in parts]),
            torch.cat(scales) if scales else None,
        )


@dataclass(frozen=True)
class Codec:
    """A format of stored rows.

    Attributes:
        name: As `dtype` names it.
        dtype: Of the values.
        bits: Of the values in an `.npy` file, which does not know bfloat16.
        kept: The least part of its length that a row must keep.
        scaled: Whether every row has a factor of its own.
    """

    name: str
    dtype: torch.dtype
    bits: torch.dtype
    kept: float
    scaled: bool = False

    def encode(self, ids: Tensor, rows: Tensor, layout: Layout) -> StoredRows:
        """Rows on the CPU in this format.

        Args:
            ids: `[n]` int64.
            rows: `[n, K]`, float32 or float64.

        Raises:
            StoreError: A row is not finite, or too large or too small for the format; names the sample.
        """
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)  # [n]
        _refuse(
            ids, ~lengths.isfinite(), lambda i: "has a projected gradient that is not finite", "leave it out"
        )
        scales = rows.abs().amax(1).float() / 127 if self.scaled else None
        values = rows.to(self.dtype) if scales is None else _rounded(rows, scales)
        norms = slice_norms(self.decode(values, scales), layout)
        stored = torch.linalg.vector_norm(norms, dim=1, dtype=torch.float64)
        wider = "leave the sample out, or store rows in another format"
        _refuse(
            ids, ~stored.isfinite(), lambda i: f"has a projected gradient too large for {self.name}", wider
        )
        _refuse(
            ids, stored < self.kept * lengths,
            lambda i: f"keeps {stored[i] / lengths[i]:.0%} of its projected gradient's length in {self.name}",
            wider,
        )  # fmt: skip
        return StoredRows(ids, values, norms, scales)

    def decode(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """`[n, K]` float32."""
        rows = values.to(torch.float32)
        return rows if scales is None else rows * scales[:, None]


def _rounded(rows: Tensor, scales: Tensor) -> Tensor:
    divisors = torch.where(scales > 0, scales, 1)[:, None]
    return (rows / divisors).round_().clamp_(-127, 127).to(torch.int8)


def slice_norms(rows: Tensor, layout: Layout) -> Tensor:
    """`[n, S]` float32: the length of each slice of float32 rows `[n, K]`."""
    squares = rows.double().square_().numpy()
    starts = [part.start for part in layout.slices]
    return torch.from_numpy(np.sqrt(np.add.reduceat(squares, starts, axis=1))).float()


def _refuse(ids: Tensor, bad: Tensor, what: Callable[[int], str], remedy: str) -> None:
    if not bad.any():
        return
    first = int(bad.nonzero()[0])
    more = f" ({int(bad.sum())} of its batch do)" if int(bad.sum()) > 1 else ""
    raise StoreError(f"sample {int(ids[first])} {what(first)}{more}: {remedy}.")


CODECS = {
    codec.name: codec
    for codec in (
        Codec("float32", torch.float32, torch.float32, kept=0.99),
        Codec("float16", torch.float16, torch.float16, kept=0.99),
        Codec("bfloat16", torch.bfloat16, torch.uint16, kept=0.99),
        # Small entries beside a large one are rounded away, which is the format's known loss.
        Codec("int8", torch.int8, torch.int8, kept=1e-6, scaled=True),
    )
}


def codec(dtype: str) -> Codec:
    """The format of a name.

    Raises:
        StoreError: There is none.
    """
    if dtype not in CODECS:
        raise StoreError(f"dtype is {shown(dtype)}: it should be one of {', '.join(CODECS)}.")
    return CODECS[dtype]
