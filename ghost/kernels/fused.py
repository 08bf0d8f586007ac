"""Launches of the Triton programs: `ghost.algebra`'s fused sums on a GPU.

Factors go in as they are where every row of theirs begins on a multiple of 16 numbers, which is what loads of
16 bytes take. The gradient of a language model's logits may be the exception (50,257 columns): its columns
are copied to padded rows a chunk at a time, and the chunk's rows of the weight gradient are finished before
the next.
"""

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from ghost.kernels import programs
from ghost.kernels.tiles import CHUNK_BYTES, Cut, candidates, chunks
from ghost.kernels.tuning import choose

ROW = 16
"""Triton knows of strides that they are multiples of 16, or nothing."""


def sum_and_dots(
    left: Tensor, right: Tensor, targets: Tensor, cut: Cut | None = None, chunk: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """The summed gradient `[m, n]` in the factors' dtype, and every sample's inner products with the targets,
    `[b, C]` float32.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`; bfloat16, float16, or float32, which is multiplied as TF32.
        targets: `[C, m, n]`, any floating dtype.
        cut: How the work is cut; None for the fastest, timed once for each shape.
        chunk: Bytes to hold at once beside the arguments and results; more than `CHUNK_BYTES` are not taken.
    """
    total, dots = _outputs(left, right, len(targets))
    with torch.cuda.device_of(left):
        right = aligned(right)
        for rows in chunks(left.shape[2], copied_bytes(left), chunk):
            dots += _launch(aligned(left[:, :, rows]), right, targets[:, rows], total[rows], cut)
    return total, dots


def sum_and_scores(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: Sequence[int],
    cut: Cut | None = None, chunk: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sum_and_dots` with the targets summed from validation samples, in float32.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
        val_left, val_right: `[v, S, m]`, `[v, S, n]`.
        sizes: Validation samples of each column; they add up to v.
        cut, chunk: As for `sum_and_dots`.
    """
    total, dots = _outputs(left, right, len(sizes))
    n = right.shape[2]
    row_bytes = copied_bytes(left) + copied_bytes(val_left) + 4 * len(sizes) * n
    with torch.cuda.device_of(left):
        right, val_right = aligned(right), aligned(val_right)
        for rows in chunks(left.shape[2], row_bytes, chunk):
            targets = total.new_empty(len(sizes), rows.stop - rows.start, n, dtype=torch.float32)
            nothing = targets[:0]
            val_columns = aligned(val_left[:, :, rows]).split(sizes), val_right.split(sizes)
            for target, val_l, val_r in zip(targets, *val_columns, strict=True):
                _launch(val_l, val_r, nothing, target, cut)
            dots += _launch(aligned(left[:, :, rows]), right, targets, total[rows], cut)
    return total, dots


def _outputs(left: Tensor, right: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    total = left.new_empty(left.shape[2], right.shape[2])
    return total, left.new_zeros(left.shape[0], columns, dtype=torch.float32)


def padded(width: int) -> int:
    """The next multiple of `ROW`."""
    return triton.cdiv(width, ROW) * ROW


def is_aligned(factor: Tensor) -> bool:
    """Whether rows of `[b, T, width]` can be loaded 16 bytes at a time, as far as Triton can know, up to the
    padded width: what lies there is not used, but must be memory of the tensor's own.
    """
    (b, tokens, width), (*strides, last) = factor.shape, factor.stride()
    if last != 1 or any(stride % ROW for stride in strides) or factor.data_ptr() % 16:
        return False
    end = factor.storage_offset() + (b - 1) * strides[0] + (tokens - 1) * strides[1] + padded(width)
    return end * factor.element_size() <= factor.untyped_storage().nbytes()


def copied_bytes(factor: Tensor) -> int:
    """Bytes that `aligned` takes for a column of it."""
    return 0 if is_aligned(factor) else factor.shape[0] * factor.shape[1] * factor.element_size()


def aligned(factor: Tensor) -> Tensor:
    """The factor `[b, T, width]` itself, or a copy of it with rows of padded width."""
    b, tokens, width = factor.shape
    if factor.numel() == 0 or is_aligned(factor):
        return factor
    copy = factor.new_empty(b, tokens, padded(width))
    block_t, block_w = 8, 1024
    grid = triton.cdiv(tokens, block_t) * triton.cdiv(padded(width), block_w), b
    programs.padded_copy[grid](
        factor, copy, tokens, width, padded(width), *factor.stride(),
        BLOCK_T=block_t, BLOCK_W=block_w, num_warps=8,
    )  # fmt: skip
    return copy[:, :, :width]


def _launch(left: Tensor, right: Tensor, targets: Tensor, total: Tensor, cut: Cut | None) -> Tensor:
    """Fills `total`, and returns the inner products.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`, both `aligned`.
        targets: `[C, m, n]`; without any only the sum is taken.
        total: `[m, n]`, contiguous.

    Returns:
        `[b, C]` float32.
    """
    (b, tokens, _), (m, n), columns = left.shape, total.shape, len(targets)
    if left.numel() == 0 or right.numel() == 0:
        total.zero_()
        return left.new_zeros(b, columns, dtype=torch.float32)
    if targets.stride(2) != 1:
        targets = targets.contiguous()

    def run(cut: Cut) -> Tensor:
        tiles, splits = cut.tiles, cut.splits
        count = tiles.count(m, n)
        totals = total if splits == 1 else total.new_empty(splits, m, n, dtype=torch.float32)
        partials = total.new_zeros(b, columns, splits * count, dtype=torch.float32)
        programs.sum_and_dots[count, splits](
            left, right, targets, totals, partials, b, tokens, m, n, padded(m), padded(n),
            *left.stride()[:2], *right.stride()[:2], *targets.stride()[:2],
            COLUMNS=columns, BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_T=tiles.t,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if splits > 1:
            total.copy_(totals.sum(0))
        return partials.sum(2)

    return run(cut or _fastest(left, right, targets, total, run))


def _fastest(
    left: Tensor, right: Tensor, targets: Tensor, total: Tensor, run: Callable[[Cut], object]
) -> Cut:
    """The fastest cut for such a matrix and numbers of samples and tokens within a factor of two."""
    (b, tokens, _), (m, n), device = left.shape, total.shape, left.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count

    tried = candidates(left.element_size())
    # The same splits for all, so that the weight gradient is added up in one order, whichever is the fastest.
    splits = tried[0].splits(b, tokens, m, n, processors)
    key = (
        device, left.dtype, targets.dtype, total.dtype, len(targets), m, n,
        b.bit_length(), tokens.bit_length(),
    )  # fmt: skip
    return Cut(choose(key, tried, lambda tiles: run(Cut(tiles, splits))), splits)
