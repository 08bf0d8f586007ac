"""Inner products of per-sample gradients with a validation gradient weighted by Adam's slopes.

The weights of a parameter depend on its gradient's sum over the samples and on the sum of its squares. So a
parameter is taken in tiles of its first axis: a tile's per-sample gradients are formed once, as the sum needs
them anyway, and while they are in the cache their sum, their norm over the samples, the weights and the inner
products are taken.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost import algebra
from ghost.algebra import FUSED_TILE, accumulation_dtype
from ghost.gradients import Materialised, OuterProducts, RowGathers, SampleGradients
from ghost.preconditioner import AdamStep, slope
from ghost.step import Unit

NUMBERS = 7
"""Of a step: those of `AdamStep`, and `Weigher.reach`."""

BLOCK = 1 << 16
"""Elements for each thread of a CPU that are taken through the arithmetic of the weights at once."""


@dataclass(frozen=True)
class Weigher:
    """The slopes of one parameter in one micro-batch.

    A step of k micro-batches has its whole gradient only at its end. What the micro-batches so far have given
    is taken for the whole, scaled up.

    Attributes:
        step: The coming step.
        m, v, p: Moments and parameter, `[m, n]`.
        before: The gradient of the step's earlier micro-batches, `[m, n]`; None where there is one.
        squares: The sum of the squares of their samples' gradients, `[m, n]`; this one's are added to it.
        reach: How many times as many samples the step has as the micro-batches so far.
    """

    step: AdamStep
    m: Tensor
    v: Tensor
    p: Tensor
    before: Tensor | None = None
    squares: Tensor | None = None
    reach: float = 1.0

    def __call__(self, rows: slice, grad: Tensor, squares: Tensor) -> Tensor:
        """The weights of a tile of rows `[r, n]`, from the sums over the batch's samples."""
        dtype = accumulation_dtype(grad.dtype)
        grad, squares = grad.to(dtype), squares.to(dtype)
        if self.before is not None and self.squares is not None:
            squares = self.squares[rows].add_(squares) * self.reach
            grad = (grad + self.before[rows]) * self.reach
        m, v, p = (tensor[rows].to(dtype) for tensor in (self.m, self.v, self.p))
        return slope(self.step, grad, squares, m, v, p)

    def at(self, rows: Tensor) -> "Weigher":
        """The slopes of some rows of the parameter; `squares` is a copy."""
        parts = [self.m, self.v, self.p, self.before, self.squares]
        m, v, p, before, squares = (None if part is None else part[rows] for part in parts)
        assert m is not None
        assert v is not None
        assert p is not None
        return Weigher(self.step, m, v, p, before, squares, self.reach)


@dataclass(frozen=True)
class Piece:
    """One use of a parameter by the samples of a batch.

    Attributes:
        gradients: The entries' gradients.
        row: The sample `[entries]` of each entry; None where entry i is sample i's.
        rows: b, the number of samples.
    """

    gradients: SampleGradients
    row: Tensor | None
    rows: int

    @classmethod
    def of(cls, gradients: SampleGradients, unit: Unit) -> "Piece":
        """The training samples' gradients in a unit."""
        return cls(gradients, unit.row, unit.rows)

    def tile(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """The samples' gradients at some rows of the parameter, `[b, r, n]`; `out` is space for them."""
        if self.row is None:
            return self.gradients.tile(rows, out)
        found = self.gradients.tile(rows)
        return found.new_zeros(self.rows, *found.shape[1:]).index_add_(0, self.row, found)


def sum_and_dots(
    pieces: Sequence[Piece], targets: Tensor, weigher: Weigher, chunk: int
) -> tuple[Tensor, list[Tensor]]:
    """The parameter's gradient `[m, n]`, and for each piece its samples' inner products `[b, C]` with the
    weighted targets.

    Args:
        pieces: All uses of the parameter by the samples of one batch.
        targets: `[C, m, n]`.
        weigher: The weights.
        chunk: Bytes to hold at once, of tiles.
    """
    b, like = pieces[0].rows, pieces[0].gradients.example
    total = like.new_empty(targets.shape[1:])
    dots = [like.new_zeros(b, len(targets), dtype=accumulation_dtype(like.dtype)) for _ in pieces]
    for rows, tiles in _tiles(pieces, targets, chunk):
        weights = _weights(rows, tiles, total, weigher)
        weighted = (weights * targets[:, rows]).flatten(1)  # [C, r*n]
        for dot, tile in zip(dots, tiles, strict=True):
            _add_dots(dot, tile.flatten(1), weighted)
    return total, dots


def sum_and_weights(
    pieces: Sequence[Piece], targets: Tensor, weigher: Weigher, chunk: int
) -> tuple[Tensor, Tensor]:
    """The parameter's gradient `[m, n]`, and the weighted targets `[C, m, n]`; see `sum_and_dots`."""
    like = pieces[0].gradients.example
    total = like.new_empty(targets.shape[1:])
    weighted = torch.empty_like(targets, dtype=accumulation_dtype(like.dtype))
    for rows, tiles in _tiles(pieces, targets, chunk):
        torch.mul(_weights(rows, tiles, total, weigher), targets[:, rows], out=weighted[:, rows])
    return total, weighted


def _tiles(pieces: Sequence[Piece], targets: Tensor, chunk: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks of the parameter's rows, with each piece's per-sample gradients there, `[b, r, n]`.

    Matrix products want large tiles; what is done element by element wants blocks that stay in the cache.
    """
    _, m, n = targets.shape
    size = pieces[0].gradients.example.element_size()
    most = min(FUSED_TILE, chunk // (len(pieces) * size))
    step = max(1, min(m, most // (max(1, pieces[0].rows) * n)))
    on_cpu = pieces[0].gradients.example.device.type == "cpu"
    block = max(1, BLOCK * torch.get_num_threads() // n) if on_cpu else step
    for lo in range(0, m, step):
        part = slice(lo, min(lo + step, m))
        shape = pieces[0].rows, part.stop - lo, n
        first = pieces[0].tile(part, algebra.scratch(pieces[0].gradients.example, shape))
        tiles = [first, *(piece.tile(part) for piece in pieces[1:])]
        for at in range(0, shape[1], block):
            parts = [tile[:, at : at + block] for tile in tiles]
            yield slice(lo + at, lo + at + parts[0].shape[1]), parts


def _weights(rows: slice, tiles: Sequence[Tensor], total: Tensor, weigher: Weigher) -> Tensor:
    """The weights of a block of rows `[r, n]`; the gradient there goes to `total`."""
    whole = functools.reduce(torch.add, tiles)
    torch.sum(whole, 0, out=total[rows])
    return weigher(rows, total[rows], _squares(whole))


def _squares(samples: Tensor) -> Tensor:
    """The sum of the samples' squares, `[b, r, n]` to `[r, n]`, in float32 at least."""
    dtype = accumulation_dtype(samples.dtype)
    if samples.device.type != "cpu":
        return samples.to(dtype).square().sum(0)
    squares = torch.zeros(samples.shape[1:], dtype=dtype)
    for sample in samples:  # a norm over the first axis would read against the grain
        squares.addcmul_(sample.to(dtype), sample.to(dtype))
    return squares


def _add_dots(dots: Tensor, samples: Tensor, columns: Tensor) -> None:
    """Add the inner products of `samples [b, k]` with `columns [C, k]` to `dots [b, C]`."""
    samples, columns = samples.to(dots.dtype), columns.to(dots.dtype)
    if len(columns) == 1:  # a matrix–vector product is read at memory speed, a product with [k, 1] is not
        dots[:, 0].addmv_(samples, columns[0])
    else:
        dots.addmm_(samples, columns.T)


def table_sum_and_dots(piece: Piece, targets: Tensor, weigher: Weigher, chunk: int) -> tuple[Tensor, Tensor]:
    """`sum_and_dots` of a table's only use: rows that no sample looked up take no part."""
    assert isinstance(piece.gradients, RowGathers)
    looked_up, gradients = piece.gradients.looked_up()
    part = weigher.at(looked_up)
    found, (dots,) = sum_and_dots(
        [Piece(gradients, piece.row, piece.rows)], targets[:, looked_up], part, chunk
    )
    if weigher.squares is not None and part.squares is not None:
        weigher.squares[looked_up] = part.squares
    total = found.new_zeros(targets.shape[1:]).index_copy_(0, looked_up, found)
    return total, dots


def _rebuilt(kind: str, first: Tensor, second: Tensor, num_rows: int) -> SampleGradients:
    if kind == "outer":
        return OuterProducts(first, second)
    return RowGathers(first, second, num_rows) if kind == "gathered" else Materialised(first)


@torch.library.custom_op("ghost::adam_sum_and_dots", mutates_args=("squares",))
def adam_sum_and_dots(
    kind: str, first: Tensor, second: Tensor, row: Tensor | None, rows: int, targets: Tensor,
    numbers: Tensor, m: Tensor, v: Tensor, p: Tensor, before: Tensor | None, squares: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sum_and_dots` of a parameter's only use, opaque to the compiler.

    Args:
        kind, first, second: The per-sample gradients, as `parts_of` gives them.
        row, rows: As in `Piece`.
        targets: `[C, m, n]`.
        numbers: `[7]` float64 on the CPU, the numbers of `AdamStep` and `Weigher.reach`.
        m, v, p, before, squares: As in `Weigher`, `[m, n]`.
        chunk: Bytes to hold at once, of tiles.
    """
    *step, reach = numbers.tolist()
    weigher = Weigher(AdamStep(*step), m, v, p, before, squares, reach)
    piece = Piece(_rebuilt(kind, first, second, targets.shape[1]), row, rows)
    if kind == "gathered":
        return table_sum_and_dots(piece, targets, weigher, chunk)
    total, (dots,) = sum_and_dots([piece], targets, weigher, chunk)
    return total, dots


@adam_sum_and_dots.register_fake
def _(
    kind: str, first: Tensor, second: Tensor, row: Tensor | None, rows: int, targets: Tensor,
    numbers: Tensor, m: Tensor, v: Tensor, p: Tensor, before: Tensor | None, squares: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    like = second if kind == "gathered" else first
    total = like.new_empty(targets.shape[1:])
    return total, like.new_empty(rows, targets.shape[0], dtype=accumulation_dtype(like.dtype))


def parts_of(gradients: SampleGradients) -> tuple[str, Tensor, Tensor]:
    """What `adam_sum_and_dots` knows per-sample gradients by."""
    if isinstance(gradients, OuterProducts):
        return "outer", gradients.left, gradients.right
    if isinstance(gradients, RowGathers):
        return "gathered", gradients.ids, gradients.grad
    assert isinstance(gradients, Materialised)
    return "values", gradients.values, gradients.values
