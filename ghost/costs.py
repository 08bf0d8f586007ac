"""What each algebra costs for given shapes: FLOPs, bytes and calls, weighed by what they take on a device.

Counted and not timed, so that a run picks the same algebras, and with them the same rounding, wherever and
whenever it runs with as many threads. The weights of the CPU were fitted once to measured times; a choice
among algebras needs their ratios alone, which differ far less between machines than the times do
(docs/log.md).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ghost import kernels
from ghost.algebra import CHUNK, accumulation_dtype, tile_shape


@dataclass(frozen=True)
class Problem:
    """The shapes of one layer's per-sample gradients and of what they are multiplied with.

    Attributes:
        rows: b, the training samples.
        tokens: T of each.
        m, n: The matrix.
        val_tokens: Tokens of all validation samples; 0 where the targets are matrices already.
        columns: C, of the scores.
        dtype: Of the factors.
        device: Its type.
        threads: CPU threads.
        wants_sum: Whether the summed gradient is wanted too.
    """

    rows: int
    tokens: int
    m: int
    n: int
    val_tokens: int
    columns: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    threads: int = 1
    wants_sum: bool = True


@dataclass(frozen=True)
class Weights:
    """Nanoseconds on one device.

    Attributes:
        flop: Of one FLOP of a large matrix product.
        byte: Of one byte that an operation reads or writes.
        call: Of one operation, however small.
    """

    flop: float
    byte: float
    call: float


# One thread of a CPU with 512-bit vectors. Those of float32 are fitted (docs/log.md); a float64 takes twice
# the bytes and twice the time; short floats have units of their own there, and their weight is counted.
CPU_FLOPS = {torch.float64: 1 / 80, torch.float32: 1 / 160}
CPU_SHORT_FLOP = 1 / 400
CPU_BYTE = 1 / 24
CPU_CALL = 5000.0
TILED_PRODUCT = 1.1
"""A product cut into tiles, over the whole product (fitted)."""

# The kernel on one thread of a CPU, fitted (docs/log.md).
CPU_TILE_NUMBER = 0.04
"""Of a number that is added to the total or multiplied with a target."""
CPU_PACKED = 0.03
"""Of a factor's number that is packed for a block."""
CPU_TILE, CPU_BLOCK = (14, 32), (196, 256)
CPU_KERNEL = 60_000.0
"""Of a call."""

# An accelerator, counted from data sheets and not measured.
CUDA_FLOPS = {torch.float64: 1 / 30e3, torch.float32: 1 / 50e3}
CUDA_SHORT_FLOP = 1 / 500e3
CUDA_BYTE = 1 / 2.5e3
CUDA_CALL = 5000.0
CUDA_TILE_FLOP = 1 / 50e3
"""Of a tile that the kernel holds."""


@lru_cache
def weights(dtype: torch.dtype, device: str, threads: int) -> Weights:
    """The weights of a dtype on a device: the CPU's with so many threads, or an accelerator's."""
    if device != "cpu":
        return Weights(CUDA_FLOPS.get(dtype, CUDA_SHORT_FLOP), CUDA_BYTE, CUDA_CALL)
    flop = CPU_FLOPS.get(dtype, CPU_SHORT_FLOP)
    return Weights(flop / threads, CPU_BYTE / threads, CPU_CALL)


def _product(w: Weights, size: int, rows: int, inner: int, columns: int) -> float:
    """One product of `[rows, inner]` with `[inner, columns]`."""
    read = inner * (rows + columns) * size
    return 2 * rows * inner * columns * w.flop + (read + rows * columns * size) * w.byte + w.call


def costs(problem: Problem, chunk: int = CHUNK) -> dict[str, float]:
    """Nanoseconds, about, of each algebra that can be taken, the summed gradient included where it is wanted.

    Args:
        chunk: Bytes that an algebra may hold at once.
    """
    # Asked each time: what the kernel takes depends on settings that a program may change as it runs.
    p = problem
    return _costs(p, chunk, p.wants_sum and kernels.serves(p.device, p.dtype, p.columns))


@lru_cache(maxsize=1 << 14)
def _costs(problem: Problem, chunk: int, in_kernel: bool) -> dict[str, float]:
    """`costs`, with the fused algebra taken by a kernel or, for more columns than `kernels.MOST_COLUMNS` and
    wherever else none serves, tile by tile through memory.
    """
    w, p = weights(problem.dtype, problem.device, problem.threads), problem
    size, wide = p.dtype.itemsize, accumulation_dtype(p.dtype).itemsize
    tokens = p.rows * p.tokens
    total = _product(w, size, p.m, tokens, p.n) if p.wants_sum else 0.0
    # Of each column a part of the validation tokens.
    val = _product(w, size, p.m, p.val_tokens, p.n) + p.columns * w.call if p.val_tokens else 0.0
    found = {"target": total + val + p.columns * _target(w, p, size, wide)}
    if p.wants_sum:
        found["fused"] = _tiled(w, p, size, wide, chunk)
    if in_kernel:
        found["fused"] = _in_cpu_kernel(w, p) if p.device == "cpu" else _in_gpu_kernel(w, p, size)
    if p.val_tokens:
        found["token_token"] = total + _token_token(w, p, size, wide, chunk)
    return found


def _target(w: Weights, p: Problem, size: int, wide: int) -> float:
    """Of one column: `left` times the target, then dots of what comes out."""
    tokens, short = p.rows * p.tokens, min(p.m, p.n)
    conversions = 0 if size == wide else 2 * (size + wide)
    passes = tokens * short * (4 * wide + conversions) * w.byte  # multiply in place, and sum
    return _product(w, size, tokens, max(p.m, p.n), short) + passes + 8 * w.call


def _token_token(w: Weights, p: Problem, size: int, wide: int, chunk: int) -> float:
    tokens = p.rows * p.tokens
    pairs = tokens * p.val_tokens
    products = _product(w, size, tokens, p.m, p.val_tokens) + _product(w, size, tokens, p.n, p.val_tokens)
    conversions = 0 if size == wide else size + wide
    chunks = math.ceil(pairs * 3 * wide / chunk)
    return products + pairs * (4 * wide + conversions) * w.byte + (5 * chunks + p.columns) * w.call


def _formed(w: Weights, p: Problem, size: int) -> tuple[float, float]:
    """The products that form all samples' gradients, and the validation gradient where it is not there yet;
    and the reading of their factors.
    """
    tokens = p.rows * p.tokens + p.val_tokens
    return 2 * p.m * p.n * tokens * w.flop, tokens * (p.m + p.n) * size * w.byte


def _in_cpu_kernel(w: Weights, p: Problem) -> float:
    """The tiles stay where they are formed; factors are packed anew for each block."""
    tokens = p.rows * p.tokens + p.val_tokens
    m, n = (math.ceil(side / tile) * tile for side, tile in zip((p.m, p.n), CPU_TILE, strict=True))
    numbers = (p.rows + 2) * (1 + p.columns) * m * n  # 2: targets and total, written and read
    height, width = CPU_BLOCK
    packed = tokens * (m * math.ceil(n / width) + n * math.ceil(m / height))
    products = 2 * m * n * tokens * w.flop
    return products + (numbers * CPU_TILE_NUMBER + packed * CPU_PACKED) / p.threads + CPU_KERNEL


def _in_gpu_kernel(w: Weights, p: Problem, size: int) -> float:
    """The tiles stay where they are formed."""
    elements = p.rows * p.m * p.n
    return sum(_formed(w, p, size)) + 2 * elements * (1 + p.columns) * CUDA_TILE_FLOP + w.call


def _tiled(w: Weights, p: Problem, size: int, wide: int, chunk: int) -> float:
    """The tiles go through memory."""
    elements = p.rows * p.m * p.n
    products, factors = _formed(w, p, size)
    height, width = tile_shape(p.rows, p.m, p.n, p.columns, p.dtype, chunk)
    tiles = math.ceil(p.m / height) * math.ceil(p.n / width)
    strips, strided = (1.0, 0) if tiles == 1 else (TILED_PRODUCT, size)
    conversions = 0 if size == wide else size + wide
    # Written, summed, and read once for all columns, whose products come on top.
    passes = elements * (2 * (size + strided) + wide + conversions) * w.byte
    dots = 2 * elements * (p.columns - 1) * w.flop
    calls = 11 + tiles * (4 + p.columns)
    return products * strips + factors + passes + dots + calls * w.call
