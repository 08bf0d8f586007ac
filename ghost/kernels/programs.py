"""The Triton programs: a weight gradient and all per-sample inner products in one pass, and aligned copies.

A program of `sum_and_dots` holds one tile of the weight gradient. It walks over the tokens of its samples as
any matrix product does, but stops at every sample's end: what it has summed since the last stop is that
sample's gradient, which it multiplies with the same tile of each target, adds to the tile's total, and
forgets. So a per-sample gradient is in registers for as long as it is complete, and nowhere else. Sums are
taken in float32, and every inner product is stored by the one program that has it, so that their order, and
with it every bit, is the same each time.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(8)
"""Rows of tiles that are walked together, so that programs running at one time share their operands."""


@triton.jit
def _target_tile(
    targets: tl.tensor, column: tl.constexpr, stride_column: tl.tensor, stride_row: tl.tensor,
    rows: tl.tensor, cols: tl.tensor, inside: tl.tensor,
) -> tl.tensor:  # fmt: skip
    matrix = targets + tl.cast(stride_column, tl.int64) * column
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    return tl.load(matrix + offsets, mask=inside, other=0.0).to(tl.float32)  # [M, N]


@triton.jit(do_not_specialize=["samples", "tokens", "m"])
def sum_and_dots(
    left: tl.tensor,  # [b, T, m], readable up to left_width
    right: tl.tensor,  # [b, T, n], readable up to right_width
    targets: tl.tensor,  # [C, m, n]
    totals: tl.tensor,  # [splits, m, n]
    partials: tl.tensor,  # [b, C, splits * tiles] float32
    samples: tl.tensor,
    tokens: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    left_width: tl.tensor,
    right_width: tl.tensor,
    left_sample: tl.tensor,
    left_token: tl.tensor,
    right_sample: tl.tensor,
    right_token: tl.tensor,
    target_column: tl.tensor,
    target_row: tl.tensor,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Program (tile, split): the tile's sum over its split of all steps of `BLOCK_T` tokens."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    group_rows = min(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    rows = (group * GROUP + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    cols = within // group_rows * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    inside = (rows < m)[:, None] & (cols < n)[None, :]  # [M, N]
    times = tl.arange(0, BLOCK_T)  # [BLOCK_T]
    left_tile = times[:, None] * left_token + rows[None, :]
    right_tile = times[:, None] * right_token + cols[None, :]
    left_columns, right_columns = (rows < left_width)[None, :], (cols < right_width)[None, :]

    steps = tl.cdiv(tokens, BLOCK_T)  # of one sample
    share = tl.cdiv(samples * steps, tl.num_programs(1))
    first = split * share
    last = min(first + share, samples * steps)
    program = split * tl.num_programs(0) + tile
    programs = tl.num_programs(0) * tl.num_programs(1)

    if COLUMNS == 1:  # kept in registers: read again at each sample's end, it would stall the products
        kept = _target_tile(targets, 0, target_column, target_row, rows, cols, inside)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        sample, block = step // steps, step % steps
        token = (block * BLOCK_T).to(tl.int64)  # whole tensors may hold more than 2**31 numbers
        present = (times < tokens - block * BLOCK_T)[:, None]
        left_at = left + sample.to(tl.int64) * left_sample + token * left_token
        right_at = right + sample.to(tl.int64) * right_sample + token * right_token
        a = tl.load(left_at + left_tile, mask=present & left_columns, other=0.0)  # [BLOCK_T, M]
        b = tl.load(right_at + right_tile, mask=present & right_columns, other=0.0)  # [BLOCK_T, N]
        gradient = tl.dot(tl.trans(a), b, gradient)
        if (block == steps - 1) | (step == last - 1):
            for column in tl.static_range(COLUMNS):
                if COLUMNS == 1:
                    products = gradient * kept
                else:
                    target = _target_tile(targets, column, target_column, target_row, rows, cols, inside)
                    products = gradient * target
                dot = tl.sum(tl.where(inside, products, 0.0))  # whatever lies behind the last column
                tl.store(partials + (sample.to(tl.int64) * COLUMNS + column) * programs + program, dot)
            total += gradient
            gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    at = (split.to(tl.int64) * m + rows.to(tl.int64))[:, None] * n + cols[None, :]
    tl.store(totals + at, total.to(totals.dtype.element_ty), mask=inside)


@triton.jit
def padded_copy(
    source: tl.tensor,  # [b, T, width], any strides
    copy: tl.tensor,  # [b, T, copy_width], contiguous
    tokens: tl.tensor,
    width: tl.tensor,
    copy_width: tl.tensor,
    source_sample: tl.tensor,
    source_token: tl.tensor,
    source_column: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Program (block, sample): a block of a sample's matrix, with zeros from `width` to `copy_width`."""
    block, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(copy_width, BLOCK_W)
    times = (block // across * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    columns = (block % across * BLOCK_W + tl.arange(0, BLOCK_W)).to(tl.int64)[None, :]
    at = sample * source_sample + times * source_token + columns * source_column
    values = tl.load(source + at, mask=(times < tokens) & (columns < width), other=0.0)
    to = (sample * tokens + times) * copy_width + columns
    tl.store(copy + to, values, mask=(times < tokens) & (columns < copy_width))
