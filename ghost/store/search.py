"""Exact search: all rows stream past the queries in blocks, and the best of each block are merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ghost.errors import StoreError, shown
from ghost.layout import Layout
from ghost.patterns import LayerPattern, parse
from ghost.store.shards import Shards, Span

METRICS = ("cosine", "inner_product")
_ROW_BYTES = 1 << 27  # of a block's rows as float32
_SCORE_BYTES = 1 << 21  # of a block's scores, which are still in the cache when they are ranked
_DECODED_BYTES = 1 << 21  # of rows decoded at a time, so that they are still in the cache when they are used
_FEW = 4  # fewer than one row in so many is picked out before the product, not after it


@dataclass(frozen=True)
class Queries:
    """Queries brought into the form in which rows meet them.

    Attributes:
        directions: `[q, K]` float32; a row's inner product with one is its score up to `lengths` and the
            row's own length.
        lengths: `[q]` float64, what inner products are multiplied by in the end; ones for cosine.
        metric: `cosine` or `inner_product`.
        weights: `[S]` float64, the factor of each slice.
    """

    directions: Tensor
    lengths: Tensor
    metric: str
    weights: Tensor

    @classmethod
    def of(cls, queries: Tensor, metric: str, weights: Tensor, layout: Layout) -> "Queries":
        """From rows `[q, K]` as they are projected.

        Raises:
            StoreError: They have another width, are not finite, or have no direction where it is asked for.
        """
        if metric not in METRICS:
            raise StoreError(f"metric is {shown(metric)}: it should be one of {', '.join(METRICS)}.")
        fits = queries.ndim == 2 and len(queries) and queries.shape[1] == layout.width
        if not fits or not queries.is_floating_point():
            raise StoreError(
                f"queries are {queries.dtype} {tuple(queries.shape)}: they should be one or more "
                f"floating-point rows [q, {layout.width}], the store's width."
            )
        exact = queries.detach().cpu().double()
        if not exact.isfinite().all():
            raise StoreError(f"query {_first(~exact.isfinite().all(1))} is not finite.")
        columns = spread(weights, layout)  # [K]
        largest = exact.abs().amax(1)
        largest = torch.where(largest > 0, largest, 1)
        exact = exact / largest[:, None]  # so that no square overflows
        if metric == "inner_product":
            lengths = exact.norm(dim=1)
            divisors = torch.where(lengths > 0, lengths, 1)
            lengths = lengths * largest
        else:
            divisors = (exact.square() * columns).sum(1).sqrt()
            lengths = torch.ones(len(exact), dtype=torch.float64)
            if not divisors.all():
                raise StoreError(
                    f"query {_first(divisors == 0)} is zero in all columns that count, so it has no cosine: "
                    "leave it out, or search by inner_product."
                )
        return cls((exact * columns / divisors[:, None]).float(), lengths, metric, weights)


class Best:
    """The k best scores of each query so far, best first; of equal scores the earlier row comes first.

    Args:
        queries: How many queries.
        k: How many rows each may keep.
    """

    def __init__(self, queries: int, k: int) -> None:
        self._k = k
        self.scores = torch.full((queries, k), -torch.inf)
        self.numbers = torch.full((queries, k), -1)

    def offer(self, scores: Tensor, numbers: Tensor) -> None:
        """Rows behind all those offered before.

        Args:
            scores: `[q, n]`.
            numbers: `[n]` rising.
        """
        improved = (scores.amax(1) > self.scores[:, -1]).nonzero()[:, 0]
        if not len(improved):
            return
        if len(improved) < len(scores):
            scores = scores[improved]
        values, columns = top(scores, min(self._k, scores.shape[1]))
        values = torch.cat([self.scores[improved], values], 1)
        found = torch.cat([self.numbers[improved], numbers[columns]], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self._k]
        self.scores[improved] = values.gather(1, order)
        self.numbers[improved] = found.gather(1, order)


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row `[q, n]` and their columns, largest first, equal ones in order."""
    values, columns = scores.topk(k, dim=1, sorted=False)
    # topk takes any of the equal ones; where it had a choice, a full sort makes it.
    tied = ((scores >= values.amin(1, keepdim=True)).sum(1) > k).nonzero()[:, 0]
    if len(tied):
        columns[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(dim=1).values
    values = scores.gather(1, columns)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def exact_search(
    shards: Shards, queries: Queries, k: int, divisors: Tensor | None, allowed: Tensor | None,
    block_rows: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Numbers `[q, k]` of the best rows and their scores `[q, k]` float32.

    Args:
        k: At most as many as there are allowed rows.
        divisors: `[N]` float32, for cosine (see `row_divisors`).
        allowed: `[N]` bool, the rows to search; None for all.
        block_rows: Rows merged at a time; None for a choice by size.
    """
    count = len(queries.directions)
    if block_rows is None:
        block_rows = max(1, min(_SCORE_BYTES // (4 * count), _ROW_BYTES // (4 * shards.width)))
    best = Best(count, k)
    buffer = torch.empty(count, min(block_rows, len(shards)))
    for start in range(0, len(shards), block_rows):
        stop = min(start + block_rows, len(shards))
        numbers = torch.arange(start, stop)
        if allowed is not None:
            numbers = numbers[allowed[start:stop]]
            if not len(numbers):
                continue
        scores = buffer[:, : len(numbers)]
        filled = 0
        for span in shards.spans(start, stop):
            chosen = None if allowed is None else allowed[span.start : span.stop].nonzero()[:, 0]
            ending = filled + (len(span.values) if chosen is None else len(chosen))
            _products(queries.directions, span, chosen, scores[:, filled:ending])
            filled = ending
        if divisors is not None:
            scores /= divisors[start:stop] if allowed is None else divisors[numbers]
        best.offer(scores, numbers)
    return best.numbers, (best.scores.double() * queries.lengths[:, None]).float()


def _products(directions: Tensor, span: Span, chosen: Tensor | None, out: Tensor) -> None:
    """Write the inner products of the queries with a span's chosen rows (None: all) into `out [q, n]`."""
    values, scales = span.values, span.scales
    if chosen is None or len(chosen) == len(values):
        _multiply(directions, values, out)
    elif len(chosen) * _FEW < len(values):
        _multiply(directions, values[chosen], out)
    else:
        every = torch.empty(len(directions), len(values))
        _multiply(directions, values, every)
        out.copy_(every[:, chosen])
    if scales is not None:
        out *= scales if chosen is None else scales[chosen]


def _multiply(directions: Tensor, values: Tensor, out: Tensor) -> None:
    if values.dtype == torch.float32:
        torch.mm(directions, values.T, out=out)
        return
    step = max(1, _DECODED_BYTES // (4 * values.shape[1]))
    decoded = torch.empty(min(step, len(values)), values.shape[1])
    for start in range(0, len(values), step):
        part = values[start : start + step]
        rows = decoded[: len(part)].copy_(part)
        torch.mm(directions, rows.T, out=out[:, start : start + step])


def slice_weights(weights: Mapping[str, float] | None, layout: Layout) -> Tensor:
    """The factor `[S]` float64 of each slice: that of the last pattern matching its parameter or layer, or 1.

    Raises:
        StoreError: A pattern matches nothing, or a factor is negative or not finite.
    """
    factors = torch.ones(len(layout.slices), dtype=torch.float64)
    for name, factor in (weights or {}).items():
        pattern = parse(name)
        if not isinstance(pattern, LayerPattern):
            raise StoreError(f"weights names heads in {name!r}: columns belong to whole parameters.")
        matched = [
            i
            for i, parameter in enumerate(layout.parameters)
            if pattern.matches(parameter) or pattern.matches(parameter.rpartition(".")[0])
        ]
        if not matched:
            raise StoreError(
                f"weights: {name!r} matches none of the {len(layout.slices)} parameters, "
                f"{', '.join(layout.parameters[:3])} and so on."
            )
        if not isinstance(factor, Real) or not 0 <= factor < float("inf"):
            raise StoreError(f"weights: {name!r} has the factor {shown(factor)}: it should be 0 or positive.")
        factors[matched] = factor
    return factors


def spread(weights: Tensor, layout: Layout) -> Tensor:
    """The factor `[K]` of each column, from those of the slices `[S]`."""
    widths = torch.tensor([part.stop - part.start for part in layout.slices])
    return weights.repeat_interleave(widths)


def row_divisors(shards: Shards, weights: Tensor) -> Tensor:
    """`[N]` float32, what makes inner products cosines: the rows' lengths under the slices' factors `[S]`.

    That of a row of zeros is 1, so that its cosine is 0.
    """
    squares = [shards.norms(i).double().square() @ weights for i in range(len(shards.shards))]
    lengths = torch.cat(squares).sqrt().float() if squares else torch.empty(0)
    return torch.where(lengths > 0, lengths, 1)


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])
