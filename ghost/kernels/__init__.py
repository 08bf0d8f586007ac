"""Programs for a GPU and a CPU, where `ghost.algebra` asks for a fused sum; see docs/kernel.md.

The GPU's are Triton's, which comes with PyTorch's CUDA builds; the CPU's is C, which gcc compiles when it is
first asked for. This module imports without either.
"""

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ghost.kernels import cpu
from ghost.kernels.tiles import CHUNK_BYTES

log = logging.getLogger(__name__)

MOST_COLUMNS = 8
"""Every column's target is read again for every sample; from some number on it is cheaper to write a tile's
per-sample gradients down and multiply them with all targets at once, as the PyTorch path does.
"""


@cache
def installed() -> bool:
    """Whether Triton is; a line in the log where it is not."""
    if find_spec("triton") is None:
        log.warning(
            "Triton is not installed, so scores on the GPU take PyTorch's own products: pip install triton."
        )
        return False
    return True


def serves(device: str, dtype: torch.dtype, columns: int) -> bool:
    """Whether the programs here take such factors.

    On a CPU these are float32. On a GPU float32 is theirs where PyTorch may multiply it as TF32; without
    that, cuBLAS is faster.

    Args:
        device: Its type.
        columns: Of targets.
    """
    if columns > MOST_COLUMNS:
        return False
    if device == "cpu":
        return dtype is torch.float32 and cpu.library() is not None
    if device != "cuda":
        return False
    short = dtype in (torch.bfloat16, torch.float16)
    tf32 = dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return (short or tf32) and installed()


def sum_and_dots(
    left: Tensor, right: Tensor, targets: Tensor, chunk: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """`ghost.algebra.fused_sum_and_dots` for what this module `serves`."""
    if left.device.type == "cpu":
        return cpu.sum_and_dots(left, right, targets)
    from ghost.kernels import fused

    return fused.sum_and_dots(left, right, targets, chunk=chunk)


def sum_and_scores(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: Sequence[int],
    chunk: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ghost.algebra.fused_sum_and_scores` for what this module `serves`."""
    if left.device.type == "cpu":
        return cpu.sum_and_scores(left, right, val_left, val_right, sizes)
    from ghost.kernels import fused

    return fused.sum_and_scores(left, right, val_left, val_right, sizes, chunk=chunk)
