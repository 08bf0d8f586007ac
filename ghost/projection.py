"""The random matrices that gradients are projected with, and how many rows they have.

A parameter between `size_in` inputs and `size_out` outputs has the gradient `g` `[size_out, size_in]`; what
is kept of it is `P_out g P_inᵀ` `[k_out, k_in]` (LoGra: Choe et al. 2024, *What is Your Data Worth to GPT?*,
section 3.2). All matrices have `E[PᵀP] = I`, so inner products of projections are those of the gradients in
expectation. A side that is not made smaller is left as it is, without a matrix.

**What is bit-identical.** An entry is a function of version, kind, seed, parameter name, side, the side's
size, and its row and column alone: its random bits are those of Philox4x64-10 (a counter-based generator) at
the counter of the entry, under a key that BLAKE2b makes of version, seed, name and side. So no choice of
layers, order or device changes a matrix, and the first rows of a larger matrix are those of a smaller one, up
to the scale. Matrices are made on the CPU and copied to the device.

* `rademacher`: identical on every machine.
* `gaussian`: the Box–Muller value in float64, rounded to float32. The bits are identical on every machine; a
  mathematics library whose logarithm or cosine differs in the last of 53 bits changes one entry in 10⁸ or so,
  by the last of its 24.
* `orthonormal`: the QR decomposition of the Gaussian matrix by LAPACK: all of this holds to rounding (1e-6).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VERSION = 1
"""Of the way from a seed to the entries; stores keep it, and those of another version are not searched."""


class ProjectionKind(Enum):
    """How the entries of a matrix are distributed."""

    GAUSSIAN = "gaussian"
    RADEMACHER = "rademacher"
    ORTHONORMAL = "orthonormal"


@dataclass(frozen=True)
class Sides:
    """The matrices of one parameter; None leaves a side as it is.

    Attributes:
        out: P_out `[k_out, size_out]`.
        inputs: P_in `[k_in, size_in]`.
    """

    out: Tensor | None
    inputs: Tensor | None


def kept_sizes(size_out: int, size_in: int, rank_total: int, rank_min: int) -> tuple[int, int]:
    """`(k_out, k_in)` with a product near `rank_total` and neither below `rank_min`, but for sides that are
    smaller: these are kept whole.

    The longer side is kept longer, by the square root of the sides' ratio.
    """
    if size_out * size_in <= rank_total:
        return size_out, size_in
    ideal = math.sqrt(rank_total * math.sqrt(size_out / size_in))
    k_out = _within(ideal, rank_min, size_out)
    k_in = _within(rank_total / k_out, rank_min, size_in)
    return _within(rank_total / k_in, rank_min, size_out), k_in


def _within(ideal: float, least: int, size: int) -> int:
    return min(max(round(ideal), least), size)


def matrix(kind: ProjectionKind, seed: int, parameter: str, side: str, k: int, size: int) -> Tensor | None:
    """P `[k, size]` float32 for one side of a parameter, `"out"` or `"in"`; None where k is its size."""
    if k == size:
        return None
    label = "\0".join((str(VERSION), str(seed), parameter, side))
    key = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=16).digest(), "little")
    bits = np.random.Philox(key=key)
    return torch.from_numpy(_MAKE[kind](bits, k, size).astype(np.float32))


def _rademacher(bits: np.random.Philox, k: int, size: int) -> NDArray[np.float64]:
    """One bit an entry, the lowest of a word first: 1 is plus."""
    words = np.atleast_1d(bits.random_raw(-(-k * size // 64))).astype("<u8")
    signs = np.unpackbits(words.view(np.uint8), count=k * size, bitorder="little")
    return (2.0 * signs.astype(np.float64).reshape(k, size) - 1.0) / math.sqrt(k)


def _normal(bits: np.random.Philox, k: int, size: int) -> NDArray[np.float64]:
    """Standard normal entries, two words each."""
    words = bits.random_raw(2 * k * size).reshape(2, -1, order="F") >> np.uint64(11)  # 53 bits
    radius, angle = (words + 0.5) * 2.0**-53  # both in (0, 1]
    return (np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle)).reshape(k, size)


def _gaussian(bits: np.random.Philox, k: int, size: int) -> NDArray[np.float64]:
    return _normal(bits, k, size) / math.sqrt(k)


def _orthonormal(bits: np.random.Philox, k: int, size: int) -> NDArray[np.float64]:
    """Orthonormal rows spanning a uniformly random space, times `sqrt(size / k)`."""
    q, r = np.linalg.qr(_normal(bits, k, size).T)  # [size, k], [k, k]
    signed: Any = q * np.sign(np.diagonal(r))
    return signed.T * math.sqrt(size / k)


_MAKE: dict[ProjectionKind, Callable[[np.random.Philox, int, int], NDArray[np.float64]]] = {
    ProjectionKind.GAUSSIAN: _gaussian,
    ProjectionKind.RADEMACHER: _rademacher,
    ProjectionKind.ORTHONORMAL: _orthonormal,
}
