"""The three algebras for inner products of per-sample matrix gradients.

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
(docs/log.md). What each holds at once, beyond its results and one validation gradient, is bounded by `chunk`
bytes. Which one is the cheapest is `ghost.costs`' to say and `ghost.choice`'s to act upon.
"""

import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ghost import kernels

CHUNK_MB = 64
"""MiB that an algebra holds at once unless told otherwise."""

CHUNK = CHUNK_MB << 20

FUSED_TILE = 1 << 24
"""Elements of all samples' tiles together (64 MiB in float32). What would stay in a cache that other programs
use as well costs the products more than it saves (docs/log.md).
"""

SAMPLE_TILE = 1 << 20
"""Elements of one sample's tile: enough for products at full speed, and no more."""

TILE_SIDE = 768
"""A tile's longer side, where its area allows for 256 of the other."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Inner products are summed in float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def unnarrowed(like: Tensor) -> torch.autocast:
    """Context without autocast, which would round inner products of float32 to its dtype: where a backward or
    a step ends inside of an autocast block, and in a compiled backward, traced as its forward was.
    """
    return torch.autocast(like.device.type, enabled=False)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """`Σ a_i ∘ b_i` for each row i of two equal shapes `[b, …]`: `[b]`, accumulated in float32 at least."""
    dtype = accumulation_dtype(a.dtype)
    return (a.to(dtype) * b.to(dtype)).flatten(1).sum(1)


def summed(left: Tensor, right: Tensor) -> Tensor:
    """`Σ_i g_i`, `[m, n]`."""
    return left.flatten(0, 1).T @ right.flatten(0, 1)


def token_token(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: Sequence[int], chunk: int = CHUNK
) -> Tensor:
    """Inner products of all per-sample matrix gradients with the columns of validation samples, `[b, C]`,
    from their factors.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
        val_left, val_right: `[v, S, m]`, `[v, S, n]`.
        sizes: Validation samples of each column; they add up to v.
        chunk: Bytes to hold at once, of pairs of tokens.
    """
    b, tokens, _ = left.shape
    v, val_tokens, _ = val_left.shape
    dtype = accumulation_dtype(left.dtype)
    pairs_held = max(1, chunk // (3 * dtype.itemsize))  # two products, and what they are summed to
    if b * tokens * v * val_tokens <= pairs_held:
        return segment_sums(_pair_dots(left, right, val_left, val_right), sizes)
    dots = left.new_zeros(b, v, dtype=dtype)
    # A chunk is [rows, step, cols * S], cut where it must be: training rows first, validation rows, tokens.
    step = max(1, min(tokens, pairs_held // max(1, val_tokens)))
    cols = max(1, min(v, pairs_held // max(1, step * val_tokens)))
    rows = max(1, pairs_held // max(1, step * val_tokens * cols))
    for first in range(0, v, cols):
        col = slice(first, first + cols)
        for lo in range(0, b, rows):
            for t in range(0, tokens, step):
                part = slice(lo, lo + rows), slice(t, t + step)
                found = _pair_dots(left[part], right[part], val_left[col], val_right[col])
                dots[lo : lo + rows, col] += found
    return segment_sums(dots, sizes)


def _pair_dots(left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor) -> Tensor:
    """`token_token` of all pairs at once, `[b, v]`."""
    lefts = left @ val_left.flatten(0, 1).T  # [b, T, v*S]
    pairs = lefts.to(accumulation_dtype(left.dtype)).mul_(right @ val_right.flatten(0, 1).T)
    return pairs.view(*left.shape[:2], *val_left.shape[:2]).sum((1, 3))


def segment_sums(dots: Tensor, sizes: Sequence[int]) -> Tensor:
    """`[b, v]` added up within consecutive columns of the given sizes, `[b, C]`."""
    if len(sizes) == 1:
        return dots.sum(1, keepdim=True)
    return torch.stack([part.sum(1) for part in dots.split(list(sizes), dim=1)], dim=1)


def target_dots(left: Tensor, right: Tensor, target: Tensor, chunk: int = CHUNK) -> Tensor:
    """Inner products of all per-sample matrix gradients with one given matrix, `[b]`.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
        target: `[m, n]`.
        chunk: Bytes to hold at once, of `left` times the target.
    """
    b, tokens, m = left.shape
    if m < right.shape[2]:  # contract over the longer side, so that what is held is the shorter one
        left, right, target = right, left, target.T
    dtype = accumulation_dtype(left.dtype)
    target = target.to(left.dtype)
    held = target.shape[1] * dtype.itemsize * (1 if left.dtype == dtype else 3)  # a token
    step = max(1, chunk // held)
    found = [
        (lefts @ target).to(dtype).mul_(rights.to(dtype)).sum(1)
        for lefts, rights in zip(left.flatten(0, 1).split(step), right.flatten(0, 1).split(step), strict=True)
    ]
    return (torch.cat(found) if len(found) > 1 else found[0]).view(b, tokens).sum(1)


class _Scratch(threading.local):
    """A buffer that fused tiles use again and again: fresh memory for each would cost more page faults than
    arithmetic.
    """

    buffer: Tensor | None = None

    def like(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Uninitialised space of the tensor's dtype and device."""
        numel = math.prod(shape)
        if tensor.device.type != "cpu":  # other devices' allocators keep memory themselves, stream by stream
            return tensor.new_empty(shape)
        kept = self.buffer
        # A step that is rehearsed on tensors without memory must not leave one of them to a real step.
        fits = kept is not None and type(kept) is type(tensor) and kept.dtype == tensor.dtype
        if kept is None or not fits or kept.numel() < numel:
            kept = self.buffer = tensor.new_empty(numel)
        return kept[:numel].view(*shape)


_scratch = _Scratch()


def release_scratch() -> None:
    """Give the space of tiles back; the next tile takes its own."""
    _scratch.buffer = None


def scratch(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Space for one tile at a time, of the tensor's dtype and device: the next call's is the same."""
    return _scratch.like(like, shape)


def tile_shape(b: int, m: int, n: int, columns: int, dtype: torch.dtype, chunk: int) -> tuple[int, int]:
    """Rows and columns of the tiles that `[m, n]` gradients of `b` samples are cut into.

    Nearly square, since a product of a narrow strip reads its other factor as often as there are strips; and
    of one size, since a small rest costs as many calls as a whole tile.
    """
    wide = accumulation_dtype(dtype).itemsize
    # A tile of each sample and of each column's validation gradient, with its copy in a wider dtype.
    element = (b + 2 * columns) * (dtype.itemsize + (wide if wide > dtype.itemsize else 0))
    area = max(1, min(SAMPLE_TILE, FUSED_TILE // max(1, b), chunk // element))
    if m * n <= area:
        return m, n
    width = min(n, max(math.isqrt(area), min(TILE_SIDE, area // 256)))
    height = min(m, area // width)
    width = min(n, area // height)
    return math.ceil(m / math.ceil(m / height)), math.ceil(n / math.ceil(n / width))


def _tiles(m: int, n: int, shape: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    height, width = shape
    for top in range(0, m, height):
        for side in range(0, n, width):
            yield slice(top, top + height), slice(side, side + width)


def _accumulate_tile(left: Tensor, right: Tensor, targets: Tensor, total: Tensor, dots: Tensor) -> None:
    """Per-sample gradients of a tile; their sum goes to `total`, their inner products with `targets` are
    added to `dots`.

    Args:
        left, right: `[b, T, r]`, `[b, T, c]`.
        targets: `[C, r, c]`.
        total: `[r, c]`.
        dots: `[b, C]`.
    """
    shape = (left.shape[0], left.shape[2], right.shape[2])
    per_sample = _scratch.like(left, shape)  # [b, r, c]
    torch.bmm(left.transpose(1, 2), right, out=per_sample)
    torch.sum(per_sample, 0, out=total)
    flat, columns = per_sample.flatten(1).to(dots.dtype), targets.flatten(1).to(dots.dtype)
    if len(columns) == 1:  # a matrix–vector product is read at memory speed, a product with [r*c, 1] is not
        dots[:, 0].addmv_(flat, columns[0])
    else:
        dots.addmm_(flat, columns.T)


def _outputs(left: Tensor, right: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Space for the summed gradient `[m, n]`, and zeros for the inner products `[b, C]`."""
    total = left.new_empty(left.shape[2], right.shape[2])
    return total, left.new_zeros(left.shape[0], columns, dtype=accumulation_dtype(left.dtype))


def tiled_sum_and_dots(
    left: Tensor, right: Tensor, targets: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The summed gradient `[m, n]` and every sample's inner products with `targets [C, m, n]`, `[b, C]`, in
    one pass over tiles.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
        chunk: Bytes to hold at once, of tiles.
    """
    (b, _, m), n = left.shape, right.shape[2]
    total, dots = _outputs(left, right, len(targets))
    for rows, cols in _tiles(m, n, tile_shape(b, m, n, len(targets), left.dtype, chunk)):
        part = left[:, :, rows], right[:, :, cols], targets[:, rows, cols]
        _accumulate_tile(*part, total[rows, cols], dots)
    return total, dots


def tiled_sum_and_scores(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: Sequence[int], chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`tiled_sum_and_dots` with the validation gradients of the columns formed tile by tile as well, so that
    they are never whole in memory.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
        val_left, val_right: `[v, S, m]`, `[v, S, n]`.
        sizes: Validation samples of each column; they add up to v.
        chunk: Bytes to hold at once, of tiles.
    """
    (b, _, m), n = left.shape, right.shape[2]
    total, dots = _outputs(left, right, len(sizes))
    parts = [
        (val_l.flatten(0, 1).T, val_r.flatten(0, 1))  # [m, s*S], [s*S, n]
        for val_l, val_r in zip(val_left.split(list(sizes)), val_right.split(list(sizes)), strict=True)
    ]
    for rows, cols in _tiles(m, n, tile_shape(b, m, n, len(sizes), left.dtype, chunk)):
        found = [val_l[rows] @ val_r[:, cols] for val_l, val_r in parts]
        targets = torch.stack(found) if len(found) > 1 else found[0][None]  # [C, r, c]
        _accumulate_tile(left[:, :, rows], right[:, :, cols], targets, total[rows, cols], dots)
    return total, dots


@torch.library.custom_op("ghost::fused_sum_and_dots", mutates_args=(), tags=torch.Tag.flexible_layout)
def fused_sum_and_dots(
    left: Tensor, right: Tensor, targets: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`tiled_sum_and_dots` as an operator, for devices that have a kernel of their own for it."""
    if kernels.serves(left.device.type, left.dtype, len(targets)):
        return kernels.sum_and_dots(left, right, targets, chunk)
    return tiled_sum_and_dots(left, right, targets, chunk)


@fused_sum_and_dots.register_fake
def _(left: Tensor, right: Tensor, targets: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    return _outputs(left, right, targets.shape[0])


@torch.library.custom_op("ghost::fused_sum_and_scores", mutates_args=(), tags=torch.Tag.flexible_layout)
def fused_sum_and_scores(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int], chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`tiled_sum_and_scores` as an operator, for devices that have a kernel of their own for it."""
    if kernels.serves(left.device.type, left.dtype, len(sizes)):
        return kernels.sum_and_scores(left, right, val_left, val_right, sizes, chunk)
    return tiled_sum_and_scores(left, right, val_left, val_right, sizes, chunk)


@fused_sum_and_scores.register_fake
def _(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int], chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    return _outputs(left, right, len(sizes))
