"""The three algebras for inner products of per-sample matrix gradients, and the rule that picks one.

A sample's gradient of a matrix is `g_i = Σ_t left_itᵀ right_it`, `[m, n]`. Its inner product with the
validation gradient
`G = Σ_s left_sᵀ right_s` can be taken

* `token_token`: `Σ_ts (left_t·left_s)(right_t·right_s)`, never forming a matrix. Cheap for few tokens;
* `target`: `Σ_t (left_t G)·right_t`, one more matrix product. Cheap where the training gradient is not wanted
  or T is small;
* `fused`: form `g_i` tile by tile as a part of the sum over i that training needs anyway, and take its inner
  product with the same tile of G while both are in the cache. No extra matrix product; a few reads of `b·m·n`
  numbers instead.

The first two are Wang et al., *Data Shapley in One Training Run* (ICLR 2025), section 4.2; the third is ours
(docs/log.md).
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ghost import kernels

FUSED_TILE = 1 << 22
"""Elements of the per-sample tiles held at once (16 MiB in float32): large enough for full-speed products,
small enough for a cache.
"""

TOKEN_TOKEN_CHUNK = 1 << 24
"""Elements of a token × token product held at once."""

ELEMENT_COST = 85
"""What one element of a fused per-sample tile costs, in FLOPs of a matrix product (measured, docs/log.md)."""

PAIR_COST = 40
"""What one token pair costs beyond its two inner products: multiply, sum, and the traffic of two
intermediates.
"""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Inner products are summed in float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """`Σ a_i ∘ b_i` for each row i of two equal shapes `[b, …]`: `[b]`, accumulated in float32 at least."""
    dtype = accumulation_dtype(a.dtype)
    return (a.to(dtype) * b.to(dtype)).flatten(1).sum(1)


def costs(
    rows: int, tokens: int, val_tokens: int, m: int, n: int, columns: int = 1, device: str = "cpu"
) -> dict[str, int]:
    """FLOPs of each algebra, beyond the summed gradient, for `[rows, tokens]` training tokens against
    `val_tokens` validation tokens in `columns` columns.

    `val_tokens = 0` means that the targets are matrices already, which rules out `token_token`.
    """
    val_matrix = 2 * val_tokens * m * n
    found = {"target": val_matrix + 2 * columns * rows * tokens * m * n}
    # Off the CPU the tiles of one column are as many small launches, and their traffic is what costs; with
    # several columns the saved products outweigh that.
    if device == "cpu" or columns > 1:
        found["fused"] = val_matrix + (ELEMENT_COST + 2 * (columns - 1)) * rows * m * n
    if val_tokens:
        found["token_token"] = rows * tokens * val_tokens * (2 * (m + n) + PAIR_COST)
    return found


def token_token(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Inner products of all per-sample matrix gradients with the columns of validation samples, `[b, C]`,
    from their factors.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
        val_left, val_right: `[v, S, m]`, `[v, S, n]`.
        sizes: Validation samples of each column; they add up to v.
    """
    b, tokens, _ = left.shape
    v, val_tokens, _ = val_left.shape
    dtype = accumulation_dtype(left.dtype)
    dots = left.new_zeros(b, v, dtype=dtype)
    # A chunk is [rows, step, cols * S], cut where it must be: training rows first, validation rows, tokens.
    step = max(1, min(tokens, TOKEN_TOKEN_CHUNK // max(1, val_tokens)))
    cols = max(1, min(v, TOKEN_TOKEN_CHUNK // max(1, step * val_tokens)))
    rows = max(1, TOKEN_TOKEN_CHUNK // max(1, step * val_tokens * cols))
    for first in range(0, v, cols):
        col = slice(first, first + cols)
        val_l, val_r = (
            val_left[col].flatten(0, 1).T,
            val_right[col].flatten(0, 1).T,
        )  # [m, cols*S], [n, cols*S]
        for lo in range(0, b, rows):
            for t in range(0, tokens, step):
                part = slice(lo, lo + rows), slice(t, t + step)
                pairs = (left[part] @ val_l).to(dtype) * (right[part] @ val_r)
                dots[lo : lo + rows, col] += pairs.sum(1).unflatten(1, (-1, val_tokens)).sum(2)
    return segment_sums(dots, sizes)


def segment_sums(dots: Tensor, sizes: Sequence[int]) -> Tensor:
    """`[b, v]` added up within consecutive columns of the given sizes, `[b, C]`."""
    return torch.stack([part.sum(1) for part in dots.split(list(sizes), dim=1)], dim=1)


class _Scratch(threading.local):
    """A buffer that fused tiles use again and again: fresh memory for each would cost more page faults than
    arithmetic.
    """

    buffer: Tensor | None = None

    def like(self, tensor: Tensor, numel: int) -> Tensor:
        """`numel` uninitialised elements of the tensor's dtype and device."""
        if tensor.device.type != "cpu":  # other devices' allocators keep memory themselves, stream by stream
            return tensor.new_empty(numel)
        kept = self.buffer
        if kept is None or kept.numel() < numel or kept.dtype != tensor.dtype:
            kept = self.buffer = tensor.new_empty(numel)
        return kept[:numel]


_scratch = _Scratch()


def _tile_rows(b: int, m: int, n: int) -> int:
    return max(1, min(m, FUSED_TILE // (max(1, b) * n)))


def _accumulate_tile(left: Tensor, right: Tensor, targets: Tensor, total: Tensor, dots: Tensor) -> None:
    """Per-sample gradients of a tile of rows; their sum goes to `total`, their inner products with `targets`
    are added to `dots`.

    Args:
        left, right: `[b, T, r]`, `[b, T, n]`.
        targets: `[C, r, n]`.
        total: `[r, n]`.
        dots: `[b, C]`.
    """
    shape = (left.shape[0], left.shape[2], right.shape[2])
    per_sample = _scratch.like(left, math.prod(shape)).view(shape)  # [b, r, n]
    torch.bmm(left.transpose(1, 2), right, out=per_sample)
    torch.sum(per_sample, 0, out=total)
    flat, columns = per_sample.flatten(1).to(dots.dtype), targets.flatten(1).to(dots.dtype)
    if len(columns) == 1:  # a matrix–vector product is read at memory speed, a product with [r*n, 1] is not
        dots[:, 0].addmv_(flat, columns[0])
    else:
        dots.addmm_(flat, columns.T)


def _outputs(left: Tensor, right: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Space for the summed gradient `[m, n]`, and zeros for the inner products `[b, C]`."""
    total = left.new_empty(left.shape[2], right.shape[2])
    return total, left.new_zeros(left.shape[0], columns, dtype=accumulation_dtype(left.dtype))


@torch.library.custom_op("ghost::fused_sum_and_dots", mutates_args=(), tags=torch.Tag.flexible_layout)
def fused_sum_and_dots(left: Tensor, right: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed gradient `[m, n]` and every sample's inner products with `targets [C, m, n]`, `[b, C]`, in
    one pass over tiles.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
    """
    if kernels.serves(left.device.type, left.dtype, len(targets)):
        return kernels.sum_and_dots(left, right, targets)
    b, _, m = left.shape
    total, dots = _outputs(left, right, len(targets))
    step = _tile_rows(b, m, right.shape[2])
    for lo in range(0, m, step):
        tile = slice(lo, lo + step)
        _accumulate_tile(left[:, :, tile], right, targets[:, tile], total[tile], dots)
    return total, dots


@fused_sum_and_dots.register_fake
def _(left: Tensor, right: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _outputs(left, right, targets.shape[0])


@torch.library.custom_op("ghost::fused_sum_and_scores", mutates_args=(), tags=torch.Tag.flexible_layout)
def fused_sum_and_scores(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """`fused_sum_and_dots` with the validation gradients of the columns formed tile by tile as well, so that
    they are never whole in memory.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
        val_left, val_right: `[v, S, m]`, `[v, S, n]`.
        sizes: Validation samples of each column; they add up to v.
    """
    if kernels.serves(left.device.type, left.dtype, len(sizes)):
        return kernels.sum_and_scores(left, right, val_left, val_right, sizes)
    b, _, m = left.shape
    n = right.shape[2]
    total, dots = _outputs(left, right, len(sizes))
    parts = [
        (val_l.flatten(0, 1), val_r.flatten(0, 1))  # [s*S, m], [s*S, n]
        for val_l, val_r in zip(val_left.split(sizes), val_right.split(sizes), strict=True)
    ]
    step = _tile_rows(b + len(sizes) - 1, m, n)
    for lo in range(0, m, step):
        tile = slice(lo, lo + step)
        found = [val_l[:, tile].T @ val_r for val_l, val_r in parts]
        targets = torch.stack(found) if len(found) > 1 else found[0][None]  # [C, r, n]
        _accumulate_tile(left[:, :, tile], right, targets, total[tile], dots)
    return total, dots


@fused_sum_and_scores.register_fake
def _(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    return _outputs(left, right, len(sizes))
