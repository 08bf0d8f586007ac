"""Exact inner products of a step's samples with each other, from the factors that its taps have kept."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ghost.algebra import FUSED_TILE, accumulation_dtype, unnarrowed
from ghost.choice import Algebra, Plan
from ghost.errors import UnsupportedModelError
from ghost.gradients import OuterProducts, SampleGradients
from ghost.kept import Kept
from ghost.step import Unit


@dataclass(frozen=True)
class _Meeting:
    """A use of a parameter on its way to the other uses of it.

    Attributes:
        first: Number of its first sample among the step's.
        gradients: Of the parameter, or of a part of it.
    """

    first: int
    unit: Unit
    gradients: SampleGradients

    @property
    def rows(self) -> slice:
        """Its samples among the step's."""
        return slice(self.first, self.first + self.unit.rows)


@torch.no_grad()
def gram_of(kept: Kept, chunk: int) -> Tensor:
    """`⟨g_i, g_j⟩` of all samples of all micro-batches, `[B, B]`, over what is scored of the parameters.

    A shared parameter has the products of its whole gradient, with all cross terms of its uses.

    Args:
        chunk: Bytes that products of factors hold at once.

    Raises:
        UnsupportedModelError: A parameter is scored whole in one layer and in parts in another.
    """
    sizes, gram = kept.sizes(), torch.zeros(())
    samples = sum(sizes)
    for uses in _meetings(kept, sizes, Plan(chunk)):
        example = uses[0].gradients.example
        found = example.new_zeros(samples, samples, dtype=accumulation_dtype(example.dtype))
        with unnarrowed(example):
            if _meet_as_factors(uses, samples):
                _add_products(found, uses)
            else:
                _add_tiles(found, uses)
        gram = gram.to(found) + found
    return gram


def _meetings(kept: Kept, sizes: Sequence[int], plan: Plan) -> Iterator[list[_Meeting]]:
    """The uses of each scored parameter, or of each part of it, over all layers and micro-batches."""
    first = [0, *accumulate(sizes)]
    found: dict[int, dict[str, list[_Meeting]]] = defaultdict(lambda: defaultdict(list))
    for number, use in kept.uses():
        use.check()
        parts = found[id(use.parameter)]
        for part in use.parts:
            whole = use.gradients.under(plan)
            mine = whole if part is None else whole.take(part.axis, part.index)
            name = "" if part is None else f"{part.axis} {part.index}"
            parts[name].append(_Meeting(first[number], use.unit, mine))
        if "" in parts and len(parts) > 1:
            raise UnsupportedModelError(
                f"the Gram matrix has no sum over {use.layer.qualified(use.key)}, which layers share and of "
                "which one is scored whole and another by heads: select both alike."
            )
    for parts in found.values():
        yield from parts.values()


def _meet_as_factors(uses: Sequence[_Meeting], samples: int) -> bool:
    """Whether uses meet without any gradient being formed: they can, and it takes fewer multiplications."""
    if len({type(use.gradients) for use in uses}) > 1:
        return False
    factors = [use.gradients for use in uses if isinstance(use.gradients, OuterProducts)]
    if not factors:
        return True
    m, n = factors[0].matrix
    tokens = sum(found.left.shape[:2].numel() for found in factors)
    return tokens**2 * (m + n) < (tokens + samples**2) * m * n


def _add_products(gram: Tensor, uses: Sequence[_Meeting]) -> None:
    """Every use's samples against every use's: tokens of matrices, looked-up rows of tables, vectors."""
    for i, use in enumerate(uses):
        for other in uses[: i + 1]:
            columns = (1,) * other.gradients.rows
            dots = use.gradients.scores(other.gradients, columns, Algebra.TOKEN_TOKEN)  # [e, f]
            dots = other.unit.to_rows(use.unit.to_rows(dots).T).T.to(gram.dtype)  # [b, c]
            gram[use.rows, other.rows] += dots
            if other is not use:
                gram[other.rows, use.rows] += dots.T


def _add_tiles(gram: Tensor, uses: Sequence[_Meeting]) -> None:
    """The samples' whole gradients, some rows of the parameter at a time: of many tokens, and of uses that
    have no factors in common, such as a table's and a head's.
    """
    samples, (rows, width) = len(gram), uses[0].gradients.matrix
    step = max(1, FUSED_TILE // (samples * width))
    for lo in range(0, rows, step):
        part = slice(lo, min(lo + step, rows))
        tile = gram.new_zeros(samples, part.stop - lo, width)
        for use in uses:
            found = use.gradients.tile(part).to(gram.dtype)  # [e, r, n]
            place = torch.arange(len(found), device=gram.device) if use.unit.row is None else use.unit.row
            tile.index_add_(0, use.first + place, found)
        flat = tile.flatten(1)  # [B, r*n]
        gram += flat @ flat.T
