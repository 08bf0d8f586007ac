"""Which algebra a matrix's inner products are taken by: picked in the backward, from the shapes there are.

Compiled models meet the choice as one operator, so that its outcome is no part of the graph: another length
of the texts is no reason to compile again.
"""

import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import accumulate, count, pairwise
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ghost import algebra
from ghost.costs import Problem, costs

log = logging.getLogger(__name__)


class Algebra(Enum):
    """How a matrix's per-sample inner products are computed; `AUTO` picks the cheapest for the shapes of the
    batch.
    """

    AUTO = "auto"
    TOKEN_TOKEN = "token_token"
    TARGET = "target"
    FUSED = "fused"


class Plan(NamedTuple):
    """What is settled before the shapes are known.

    Attributes:
        chunk: Bytes that an algebra holds at once.
        note: The `Choices` and the parameter of it to write the choice down for, as two numbers `[2]` int64
            on the CPU; None for nowhere. A compiled graph takes numbers in a tensor for what they are, and a
            name for a reason to compile the next block once more.
    """

    chunk: int = algebra.CHUNK
    note: Tensor | None = None


_numbers = count()
_books: "WeakValueDictionary[int, Choices]" = WeakValueDictionary()
"""By number."""


class Choices:
    """The algebras of the latest backward, by the parameters' qualified names.

    Args:
        chunk_mb: MiB that an algebra holds at once.
    """

    def __init__(self, chunk_mb: int = algebra.CHUNK_MB) -> None:
        self._chunk, self._number = chunk_mb << 20, next(_numbers)
        self._names: list[str] = []
        self._found: dict[str, Algebra] = {}
        _books[self._number] = self

    @property
    def found(self) -> Mapping[str, Algebra]:
        """The algebra of each matrix that has been scored."""
        return self._found

    def plan(self, name: str) -> Plan:
        """The plan of the parameter `name`."""
        self._names.append(name)
        return Plan(self._chunk, torch.tensor([self._number, len(self._names) - 1]))

    def __str__(self) -> str:
        """In one line, such as `fused: 48 matrices; token_token: 2 (score.weight, …)`."""
        groups: dict[str, list[str]] = {}
        for name, choice in self._found.items():
            groups.setdefault(choice.value, []).append(name)
        largest = max(groups, key=lambda kind: len(groups[kind]), default="")
        return "; ".join(
            f"{kind}: {len(names)} {'matrices' if len(names) > 1 else 'matrix'}"
            + ("" if kind == largest and len(groups) > 1 and len(names) > 3 else f" ({_few(names)})")
            for kind, names in sorted(groups.items(), key=lambda item: -len(item[1]))
        )

    def name(self, number: int) -> str:
        """The parameter that was planned as number `number`."""
        return self._names[number]

    def write(self, name: str, choice: Algebra, problem: Problem | None = None) -> None:
        """Note a choice, for the problem where there was one, and say so where it has changed."""
        before = self._found.get(name)
        if before is not choice:
            self._found[name] = choice
            if before is not None:
                log.debug(
                    "algebra of %s: %s instead of %s, for %s", name, choice.value, before.value, problem
                )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def choose(problem: Problem, how: str, chunk: int, note: Tensor | None) -> Algebra:
    """`how` where the problem has it, else the cheapest for it; written down as `note` says."""
    found = costs(problem, chunk)
    choice = Algebra(how if how in found else min(found, key=found.__getitem__))
    write(note, choice, problem)
    return choice


def write(note: Tensor | None, choice: Algebra, problem: Problem | None = None) -> None:
    """Write an algebra down as a plan's note says."""
    if note is None:
        return
    number, place = note.tolist()
    book = _books.get(number)
    if book is not None:
        book.write(book.name(place), choice, problem)


def _problem(left: Tensor, right: Tensor, val_tokens: int, columns: int, wants_sum: bool) -> Problem:
    (b, tokens, m), n = left.shape, right.shape[2]
    kind = left.device.type
    threads = torch.get_num_threads() if kind == "cpu" else 1
    return Problem(b, tokens, m, n, val_tokens, columns, left.dtype, kind, threads, wants_sum)


def sum_and_scores(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int], how: str, plan: Plan
) -> tuple[Tensor, Tensor]:
    """The summed gradient `[m, n]`, and every sample's inner products with the columns of validation samples,
    `[b, C]`.

    Args:
        left, right: `[b, T, m]`, `[b, T, n]`.
        val_left, val_right: `[v, S, m]`, `[v, S, n]`.
        sizes: Validation samples of each column; they add up to v.
        how: An `Algebra`'s value.
    """
    run = _sum_and_scores_op if torch.compiler.is_compiling() else _sum_and_scores
    return run(left, right, val_left, val_right, sizes, how, plan.chunk, plan.note)


def sum_and_dots(left: Tensor, right: Tensor, targets: Tensor, how: str, plan: Plan) -> tuple[Tensor, Tensor]:
    """The summed gradient `[m, n]`, and every sample's inner products with `targets [C, m, n]`, `[b, C]`."""
    run = _sum_and_dots_op if torch.compiler.is_compiling() else _sum_and_dots
    return run(left, right, targets, how, plan.chunk, plan.note)


def scores(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int], how: str, plan: Plan
) -> Tensor:
    """`sum_and_scores` without the sum."""
    run = _scores_op if torch.compiler.is_compiling() else _scores
    return run(left, right, val_left, val_right, sizes, how, plan.chunk, plan.note)


def dot(left: Tensor, right: Tensor, target: Tensor, plan: Plan) -> Tensor:
    """Every sample's inner product with `target [m, n]`, `[b]`."""
    run = _dot_op if torch.compiler.is_compiling() else _dot
    return run(left, right, target, plan.chunk, plan.note)


def _sum_and_scores(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int], how: str, chunk: int,
    note: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = _problem(left, right, val_left.shape[0] * val_left.shape[1], len(sizes), wants_sum=True)
    choice = choose(problem, how, chunk, note)
    sides = left, right, val_left, val_right
    if choice is Algebra.FUSED:
        total, dots = algebra.fused_sum_and_scores(*sides, sizes, chunk)
        return total, dots
    return algebra.summed(left, right), _scores_by(choice, *sides, sizes, chunk)


def _scores(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int], how: str, chunk: int,
    note: Tensor | None,
) -> Tensor:  # fmt: skip
    problem = _problem(left, right, val_left.shape[0] * val_left.shape[1], len(sizes), wants_sum=False)
    choice = choose(problem, how, chunk, note)
    return _scores_by(choice, left, right, val_left, val_right, sizes, chunk)


def _scores_by(
    choice: Algebra, left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int],
    chunk: int,
) -> Tensor:  # fmt: skip
    if choice is Algebra.TOKEN_TOKEN:
        return algebra.token_token(left, right, val_left, val_right, sizes, chunk)
    columns = [slice(lo, hi) for lo, hi in pairwise([0, *accumulate(sizes)])]
    found = [
        algebra.target_dots(left, right, algebra.summed(val_left[part], val_right[part]), chunk)
        for part in columns
    ]
    return torch.stack(found, dim=1)


def _sum_and_dots(
    left: Tensor, right: Tensor, targets: Tensor, how: str, chunk: int, note: Tensor | None
) -> tuple[Tensor, Tensor]:
    choice = choose(_problem(left, right, 0, len(targets), wants_sum=True), how, chunk, note)
    if choice is Algebra.FUSED:
        total, dots = algebra.fused_sum_and_dots(left, right, targets, chunk)
        return total, dots
    found = [algebra.target_dots(left, right, target, chunk) for target in targets]
    return algebra.summed(left, right), torch.stack(found, dim=1)


def _dot(left: Tensor, right: Tensor, target: Tensor, chunk: int, note: Tensor | None) -> Tensor:
    write(note, Algebra.TARGET)
    return algebra.target_dots(left, right, target, chunk)


def _dots_like(left: Tensor, columns: int) -> Tensor:
    return left.new_empty(left.shape[0], columns, dtype=algebra.accumulation_dtype(left.dtype))


def _total_like(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[2], right.shape[2])


_ANY_LAYOUT = torch.Tag.flexible_layout
"""Factors are read as they lie: the compiler need not copy them into the strides that tracing saw."""

_sum_and_scores_op = torch.library.custom_op(
    "ghost::sum_and_scores", _sum_and_scores, mutates_args=(), tags=_ANY_LAYOUT
)
_scores_op = torch.library.custom_op("ghost::scores", _scores, mutates_args=(), tags=_ANY_LAYOUT)
_sum_and_dots_op = torch.library.custom_op(
    "ghost::sum_and_dots", _sum_and_dots, mutates_args=(), tags=_ANY_LAYOUT
)
_dot_op = torch.library.custom_op("ghost::dot", _dot, mutates_args=(), tags=_ANY_LAYOUT)


@_sum_and_scores_op.register_fake
def _(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int], how: str, chunk: int,
    note: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _total_like(left, right), _dots_like(left, len(sizes))


@_scores_op.register_fake
def _(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, sizes: list[int], how: str, chunk: int,
    note: Tensor | None,
) -> Tensor:  # fmt: skip
    return _dots_like(left, len(sizes))


@_sum_and_dots_op.register_fake
def _(
    left: Tensor, right: Tensor, targets: Tensor, how: str, chunk: int, note: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _total_like(left, right), _dots_like(left, targets.shape[0])


@_dot_op.register_fake
def _(left: Tensor, right: Tensor, target: Tensor, chunk: int, note: Tensor | None) -> Tensor:
    return _dots_like(left, 1).flatten()
