"""Inner products of per-sample gradients with a validation gradient weighted by Adam's slopes.

The weights of a parameter depend on its gradient's sum over the samples and on the sum of its squares. So a
parameter is taken in tiles of its first axis: a tile's per-sample gradients are formed once, as the sum needs
them anyway, and while they are in the cache their sum, their norm over the samples, the weights and the inner
products are taken. A matrix of float32 on a CPU is the kernel's (docs/kernel.md), which does the same block
by block.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost import algebra, choice, kernels
from ghost.algebra import FUSED_TILE, accumulation_dtype
from ghost.choice import Algebra
from ghost.gradients import Materialised, OuterProducts, RowGathers, SampleGradients, widest
from ghost.step import Unit
from ghost.weigher import Weigher

BLOCK = 1 << 16
"""Elements for each thread of a CPU that are taken through the arithmetic of the weights at once."""


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

    @property
    def is_table(self) -> bool:
        """Whether it has a gradient in the rows alone that were looked up."""
        return isinstance(self.gradients, RowGathers)

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
    dense, tables = _sides(pieces)
    if _has_kernel(pieces, dense, targets, weigher):
        return _sum_and_dots_in_kernel(pieces, dense[0], tables, targets, weigher)
    dots = [like.new_zeros(b, len(targets), dtype=accumulation_dtype(like.dtype)) for _ in pieces]
    total = _total_like(pieces, targets)
    for rows, tiles, weighted in _weighted_blocks(pieces, dense, tables, targets, total, weigher, chunk):
        columns = weighted.flatten(1)
        for at, tile in zip(dense, tiles, strict=True):
            _add_dots(dots[at], tile.flatten(1), columns)
        for at, table in tables.items():
            table.add_dots(dots[at], rows, weighted)
    return total, dots


def _has_kernel(pieces: Sequence[Piece], dense: Sequence[int], targets: Tensor, weigher: Weigher) -> bool:
    """Whether the CPU's kernel takes the uses of a parameter: of one as a matrix, and of one as a table."""
    one, like = pieces[dense[0]], pieces[dense[0]].gradients.example
    known = isinstance(one.gradients, OuterProducts) and one.row is None
    if not known or len(dense) > 1 or len(pieces) > 2:
        return False
    state = [part for part in weigher.state if part is not None]
    read = [targets, *state, *(piece.gradients.example for piece in pieces)]
    # A rehearsed step's tensors have no memory.
    plain = all(type(t) is Tensor and t.device.type == "cpu" and t.dtype is torch.float32 for t in read)
    written = weigher.squares is None or weigher.squares.is_contiguous()
    return plain and written and kernels.serves(like.device.type, like.dtype, len(targets))


def _sum_and_dots_in_kernel(
    pieces: Sequence[Piece], dense: int, tables: Mapping[int, "Lookups"], targets: Tensor, weigher: Weigher
) -> tuple[Tensor, list[Tensor]]:
    """`sum_and_dots` of what `_has_kernel`."""
    one = pieces[dense]
    assert isinstance(one.gradients, OuterProducts)
    lookups = [table.by_sample(one.rows) for table in tables.values()]
    total, dots, looked_up = kernels.cpu.adam_sum_and_dots(
        one.gradients.left, one.gradients.right, targets, weigher.numbers.tolist(), weigher.state,
        lookups[0] if lookups else None,
    )  # fmt: skip
    return total, [dots if at == dense else looked_up for at in range(len(pieces))]


def sum_and_weights(
    pieces: Sequence[Piece], targets: Tensor, weigher: Weigher, chunk: int
) -> tuple[Tensor, Tensor]:
    """The parameter's gradient `[m, n]`, and the weighted targets `[C, m, n]`; see `sum_and_dots`."""
    total = _total_like(pieces, targets)
    found = torch.empty_like(targets, dtype=accumulation_dtype(total.dtype))
    for rows, _, weighted in _weighted_blocks(pieces, *_sides(pieces), targets, total, weigher, chunk):
        found[:, rows] = weighted
    return total, found


def _total_like(pieces: Sequence[Piece], targets: Tensor) -> Tensor:
    """Space for the parameter's gradient `[m, n]`: as wide as the widest use's, of which it is a part."""
    gradients = [piece.gradients for piece in pieces]
    return gradients[0].example.new_empty(targets.shape[1:], dtype=widest(gradients))


def _sides(pieces: Sequence[Piece]) -> tuple[list[int], dict[int, "Lookups"]]:
    """Which pieces are formed as dense tiles, and the others, tables of whose rows a few are looked up.

    At least one is dense, for the others to be added to.
    """
    tables = {at: Lookups.of(piece) for at, piece in enumerate(pieces) if piece.is_table}
    if len(tables) == len(pieces):
        del tables[0]
    return [at for at in range(len(pieces)) if at not in tables], tables


def _weighted_blocks(
    pieces: Sequence[Piece], dense: Sequence[int], tables: Mapping[int, "Lookups"], targets: Tensor,
    total: Tensor, weigher: Weigher, chunk: int,
) -> Iterator[tuple[slice, list[Tensor], Tensor]]:  # fmt: skip
    """Blocks of the parameter's rows, with each dense piece's per-sample gradients there `[b, r, n]` and the
    weighted targets `[C, r, n]`; the gradient there goes to `total`.
    """
    dtype = widest([piece.gradients for piece in pieces])
    for rows, tiles in _tiles([pieces[at] for at in dense], targets, weigher, chunk):
        whole = functools.reduce(torch.add, tiles).to(dtype)
        kept = [table.add_to(whole, rows) for table in tables.values()]
        weighted = weigher.weighted(rows, whole, targets, total)
        for table, values in zip(reversed(list(tables.values())), reversed(kept), strict=True):
            table.restore(whole, rows, values)
        yield rows, tiles, weighted


def _tiles(
    pieces: Sequence[Piece], targets: Tensor, weigher: Weigher, chunk: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks of the parameter's rows, with each piece's per-sample gradients there, `[b, r, n]`.

    Where the arithmetic goes operation by operation, blocks stay in the cache on their way through memory.
    """
    _, m, n = targets.shape
    size = pieces[0].gradients.example.element_size()
    most = min(FUSED_TILE, chunk // (len(pieces) * size))
    step = max(1, min(m, most // (max(1, pieces[0].rows) * n)))
    small = pieces[0].gradients.example.device.type == "cpu" and not weigher.compiles
    block = max(1, BLOCK * torch.get_num_threads() // n) if small else step
    for lo in range(0, m, step):
        part = slice(lo, min(lo + step, m))
        shape = pieces[0].rows, part.stop - lo, n
        first = pieces[0].tile(part, algebra.scratch(pieces[0].gradients.example, shape))
        tiles = [first, *(piece.tile(part) for piece in pieces[1:])]
        for at in range(0, shape[1], block):
            parts = [tile[:, at : at + block] for tile in tiles]
            yield slice(lo + at, lo + at + parts[0].shape[1]), parts


class Lookups:
    """What the samples of a batch add to the rows of a table that they look up, in the order of the rows.

    Args:
        row: The table's row `[e]` of each lookup, ascending.
        sample: Its sample, `[e]`.
        values: What it adds, `[e, n]`.
    """

    def __init__(self, row: Tensor, sample: Tensor, values: Tensor) -> None:
        self._row, self._sample, self._values = row, sample, values
        self._rows = row.cpu()  # where a block begins is asked for each block

    @classmethod
    def of(cls, piece: Piece) -> "Lookups":
        """Those of one use of a table."""
        assert isinstance(piece.gradients, RowGathers)
        ids, grad = piece.gradients.ids, piece.gradients.grad  # [e', T], [e', T, n]
        row, order = ids.flatten().sort(stable=True)
        entry = order // max(1, ids.shape[1])
        sample = entry if piece.row is None else piece.row[entry]
        return cls(row, sample, grad.flatten(0, 1)[order])

    def by_sample(self, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """The row and the sample of each `[k]`, ascending, none twice; and what the sample adds to the row,
        `[k, n]`.
        """
        keys, at = (self._row * samples + self._sample).unique(return_inverse=True)
        values = self._values.new_zeros(len(keys), self._values.shape[1]).index_add_(0, at, self._values)
        return keys // samples, keys % samples, values

    def _block(self, rows: slice) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The places in a block's tile `[b, r, n]` (sample, row) and the values of the lookups there."""
        ends = torch.tensor([rows.start, rows.stop], dtype=self._rows.dtype)
        lo, hi = torch.searchsorted(self._rows, ends).tolist()
        return (self._sample[lo:hi], self._row[lo:hi] - rows.start), self._values[lo:hi]

    def add_to(self, tile: Tensor, rows: slice) -> Tensor:
        """Add to a block's tile, and return what stood there."""
        places, values = self._block(rows)
        kept = tile[places]
        tile.index_put_(places, values.to(tile.dtype), accumulate=True)
        return kept

    def restore(self, tile: Tensor, rows: slice, kept: Tensor) -> None:
        """Put back what stood in a block's tile before `add_to`."""
        tile.index_put_(self._block(rows)[0], kept)

    def add_dots(self, dots: Tensor, rows: slice, weighted: Tensor) -> None:
        """Add the samples' inner products with a block's weighted targets `[C, r, n]` to `dots [b, C]`."""
        (sample, row), values = self._block(rows)
        found = (weighted[:, row] * values.to(weighted.dtype)).sum(2)  # [C, e]
        dots.index_add_(0, sample, found.T)


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
    chunk: int, note: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sum_and_dots` of a parameter's only use, opaque to the compiler.

    Args:
        kind, first, second: The per-sample gradients, as `parts_of` gives them.
        row, rows: As in `Piece`.
        targets: `[C, m, n]`.
        numbers, m, v, p, before, squares: As in `Weigher`.
        chunk, note: As in `ghost.choice.Plan`.
    """
    if kind == "outer":
        choice.write(note, Algebra.FUSED)
    weigher = Weigher(numbers, m, v, p, before, squares)
    piece = Piece(_rebuilt(kind, first, second, targets.shape[1]), row, rows)
    if kind == "gathered":
        return table_sum_and_dots(piece, targets, weigher, chunk)
    total, (dots,) = sum_and_dots([piece], targets, weigher, chunk)
    return total, dots


@adam_sum_and_dots.register_fake
def _(
    kind: str, first: Tensor, second: Tensor, row: Tensor | None, rows: int, targets: Tensor,
    numbers: Tensor, m: Tensor, v: Tensor, p: Tensor, before: Tensor | None, squares: Tensor | None,
    chunk: int, note: Tensor | None,
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
