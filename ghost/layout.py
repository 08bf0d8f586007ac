"""What the columns of a projected gradient are: one slice a parameter."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """The columns that hold one parameter's projected gradient `[k_out, k_in]`, row after row.

    A parameter that is a matrix between `size_in` inputs and `size_out` outputs is projected on both sides, a
    vector on its only one: its `size_in` and `k_in` are 1.

    Attributes:
        parameter: Its qualified name.
        start, stop: First column, and the one behind the last.
        size_out, size_in: Sizes before the projection.
        k_out, k_in: Sizes after it; a side that keeps its size is not projected.
    """

    parameter: str
    start: int
    stop: int
    size_out: int
    size_in: int
    k_out: int
    k_in: int

    @property
    def columns(self) -> slice:
        """The slice of a row."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Layout:
    """All slices of a row, one behind the other.

    Attributes:
        slices: In the order of the model's parameters.
    """

    slices: tuple[Slice, ...]

    @classmethod
    def of(cls, sizes: Iterable[tuple[str, tuple[int, int], tuple[int, int]]]) -> "Layout":
        """The layout of parameters given as name, `(size_out, size_in)` and `(k_out, k_in)`."""
        slices: list[Slice] = []
        start = 0
        for parameter, size, k in sizes:
            slices.append(Slice(parameter, start, start + k[0] * k[1], *size, *k))
            start = slices[-1].stop
        return cls(tuple(slices))

    @property
    def width(self) -> int:
        """K, the number of columns."""
        return self.slices[-1].stop if self.slices else 0

    @property
    def parameters(self) -> Sequence[str]:
        """The parameters' qualified names, slice by slice."""
        return [part.parameter for part in self.slices]
