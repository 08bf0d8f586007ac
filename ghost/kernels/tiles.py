"""How a weight gradient is cut into programs, and how many columns of its left factor are done at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

CHUNK_BYTES = 256 << 20
"""The most that a launch holds beside its arguments: copies with aligned rows, and validation gradients."""

FLOPS_PER_BYTE = 200
"""Products that a large GPU of today takes in the time in which its memory moves a byte."""

REDUCTION_FLOPS = 3_000_000_000
"""Products in the time that starting the two kernels takes which add up splits (5 µs of an H100)."""

MOST_SPLITS = 16


@dataclass(frozen=True)
class Cut:
    """Tiles, and the number of parts into which the tokens are cut."""

    tiles: "Tiles"
    splits: int


@dataclass(frozen=True)
class Tiles:
    """The tile of one program, `[m, n]` by steps of `t` tokens, its warps, and the steps loaded ahead."""

    m: int
    n: int
    t: int
    warps: int
    stages: int

    def count(self, m: int, n: int) -> int:
        """Tiles of a matrix `[m, n]`."""
        return -(-m // self.m) * -(-n // self.n)

    def splits(self, samples: int, tokens: int, m: int, n: int, processors: int) -> int:
        """Into how many parts the tokens are best cut, each with programs of its own: a matrix of few tiles
        would leave processors idle, and every part has a total `[m, n]` that is written and added up.
        """
        steps = samples * -(-tokens // self.t)
        slots = processors * max(1, 8 // self.warps)  # programs that run at one time
        tiles, flops = self.count(m, n), 2 * self.m * self.n * self.t

        def cost(splits: int) -> int:
            waves = -(-tiles * splits // slots)
            products = waves * slots * -(-steps // splits) * flops
            totals = REDUCTION_FLOPS + splits * m * n * 8 * FLOPS_PER_BYTE
            return products + (totals if splits > 1 else 0)

        return min(range(1, max(1, min(MOST_SPLITS, steps)) + 1), key=cost)


SHORT = (
    Tiles(128, 128, 64, 8, 3),
    Tiles(128, 128, 64, 8, 4),
    Tiles(128, 64, 64, 4, 4),
    Tiles(64, 128, 64, 4, 4),
    Tiles(64, 64, 64, 4, 4),
)
"""For factors of two bytes. A tile's sum and one sample's part of it are 128 registers a thread in all but
the last, and no larger tile would fit.
"""

LONG = (Tiles(128, 128, 32, 8, 3), Tiles(128, 64, 32, 8, 3), Tiles(64, 64, 32, 4, 3))
"""For factors of four bytes."""


def candidates(itemsize: int) -> tuple[Tiles, ...]:
    """Tiles worth trying for factors of that many bytes an element; the first is good on large GPUs."""
    return SHORT if itemsize == 2 else LONG


def chunks(rows: int, row_bytes: int, most: int = CHUNK_BYTES) -> Iterator[slice]:
    """`rows` in slices that hold `most` and `CHUNK_BYTES` at most, if 128 rows do; each begins on a multiple
    of 128.
    """
    step = max(1, min(most, CHUNK_BYTES) // max(1, row_bytes) // 128) * 128
    for low in range(0, rows, step):
        yield slice(low, min(low + step, rows))
