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

import torch
from torch import Tensor

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


def cheapest(rows: int, tokens: int, val_tokens: int, m: int, n: int, device: str = "cpu") -> str:
    """The name of the cheapest algebra for `[rows, tokens]` training tokens against `val_tokens` validation
    tokens.

    `val_tokens = 0` means that the target is a matrix already, which rules out `token_token`.
    """
    val_matrix = 2 * val_tokens * m * n
    costs = {"target": val_matrix + 2 * rows * tokens * m * n}
    if device == "cpu":  # elsewhere the tiles are as many small launches, and their traffic is what costs
        costs["fused"] = val_matrix + ELEMENT_COST * rows * m * n
    if val_tokens:
        costs["token_token"] = rows * tokens * val_tokens * (2 * (m + n) + PAIR_COST)
    return min(costs, key=costs.__getitem__)


def token_token(left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor) -> Tensor:
    """Inner products of all per-sample matrix gradients of two batches, `[b, v]`, from their factors.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
        val_left, val_right: `[v, S, m]`, `[v, S, n]`.
    """
    b, tokens, _ = left.shape
    v, val_tokens, _ = val_left.shape
    dtype = accumulation_dtype(left.dtype)
    val_l, val_r = val_left.flatten(0, 1).T, val_right.flatten(0, 1).T  # [m, v*S], [n, v*S]
    chunk = max(1, TOKEN_TOKEN_CHUNK // max(1, tokens * v * val_tokens))
    parts = []
    for lo in range(0, b, chunk):
        pairs = (left[lo : lo + chunk] @ val_l).to(dtype) * (right[lo : lo + chunk] @ val_r)  # [c, T, v*S]
        parts.append(pairs.sum(1).unflatten(1, (v, val_tokens)).sum(2))  # [c, v]
    return torch.cat(parts)


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
    return max(1, min(m, FUSED_TILE // (b * n)))


def _accumulate_tile(left: Tensor, right: Tensor, target: Tensor, total: Tensor, dots: Tensor) -> None:
    """Per-sample gradients of a tile of rows; their sum goes to `total`, their inner products with `target`
    are added to `dots`.

    Args:
        left, right: `[b, T, r]`, `[b, T, n]`.
        target, total: `[r, n]`.
        dots: `[b]`.
    """
    shape = (left.shape[0], left.shape[2], right.shape[2])
    per_sample = _scratch.like(left, math.prod(shape)).view(shape)  # [b, r, n]
    torch.bmm(left.transpose(1, 2), right, out=per_sample)
    torch.sum(per_sample, 0, out=total)
    dots.addmv_(per_sample.flatten(1).to(dots.dtype), target.flatten().to(dots.dtype))


@torch.library.custom_op("ghost::fused_sum_and_dot", mutates_args=())
def fused_sum_and_dot(left: Tensor, right: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The summed gradient `[m, n]` and every sample's inner product with `target [m, n]`, `[b]`, in one pass
    over tiles.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
    """
    b, _, m = left.shape
    n = right.shape[2]
    total = left.new_empty(m, n)
    dots = left.new_zeros(b, dtype=accumulation_dtype(left.dtype))
    step = _tile_rows(b, m, n)
    for lo in range(0, m, step):
        tile = slice(lo, lo + step)
        _accumulate_tile(left[:, :, tile], right, target[tile], total[tile], dots)
    return total, dots


@fused_sum_and_dot.register_fake
def _(left: Tensor, right: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    total = left.new_empty(left.shape[2], right.shape[2])
    return total, left.new_empty(left.shape[0], dtype=accumulation_dtype(left.dtype))


@torch.library.custom_op("ghost::fused_sum_and_score", mutates_args=())
def fused_sum_and_score(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor
) -> tuple[Tensor, Tensor]:
    """`fused_sum_and_dot` with the validation gradient formed tile by tile as well, so that it is never whole
    in memory.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
        val_left, val_right: `[v, S, m]`, `[v, S, n]`.
    """
    b, _, m = left.shape
    n = right.shape[2]
    total = left.new_empty(m, n)
    dots = left.new_zeros(b, dtype=accumulation_dtype(left.dtype))
    val_l, val_r = val_left.flatten(0, 1), val_right.flatten(0, 1)  # [v*S, m], [v*S, n]
    step = _tile_rows(b, m, n)
    for lo in range(0, m, step):
        tile = slice(lo, lo + step)
        _accumulate_tile(left[:, :, tile], right, val_l[:, tile].T @ val_r, total[tile], dots)
    return total, dots


@fused_sum_and_score.register_fake
def _(left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor) -> tuple[Tensor, Tensor]:
    total = left.new_empty(left.shape[2], right.shape[2])
    return total, left.new_empty(left.shape[0], dtype=accumulation_dtype(left.dtype))
