"""How far inner products of projected gradients are from those of the gradients.

With `g_i` a sample's gradient, `e_ij = ⟨g_i, g_j⟩`, and `p_ij` the inner product of its projection with j's:
every measure here compares the matrix `p` with the matrix `e`, which `ghost.gram.exact_gram` gives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost.errors import BatchError
from ghost.layout import Layout, Slice


@dataclass(frozen=True)
class Distortion:
    """Errors of projected inner products, over the samples whose gradient is not zero.

    Pairs are those with `i < j`; `cos` is the inner product over both norms, the projections' own for `p`.

    Attributes:
        samples: n, how many there are.
        rms: `sqrt(mean_{i<j} (p_ij − e_ij)² / mean_{i<j} ‖g_i‖²‖g_j‖²)`, errors against the norms.
        norm_rms: `sqrt(mean_i (p_ii − e_ii)² / mean_i ‖g_i‖⁴)`, the same of squared norms.
        cosine_rms: `sqrt(mean_{i<j} (cos p_ij − cos e_ij)²)`.
        spearman: Rank correlation of `p_ij` with `e_ij` over the pairs; NaN where all are equal,
            or there is one.
        cosine_spearman: Rank correlation of the cosines.
        recall_at_1, recall_at_5: Share of a sample's 1 or 5 nearest others by exact cosine that are among
            the 1 or 5 nearest by projected cosine, averaged over samples; None with too few others to choose
            from.
    """

    samples: int
    rms: float
    norm_rms: float
    cosine_rms: float
    spearman: float
    cosine_spearman: float
    recall_at_1: float | None
    recall_at_5: float | None


@dataclass(frozen=True)
class ExpectedError:
    """What random projections are expected to give for `rms` and `norm_rms` of `Distortion`: the roots of the
    expected mean squares.
    """

    rms: float
    norm_rms: float


@dataclass(frozen=True)
class ParameterError:
    """One parameter's part.

    Attributes:
        rms: Its projections' error, as `Distortion.rms` against its own gradients' norms; NaN where these
            are zero.
        dense_rms: The error expected of a dense Gaussian projection to as many numbers.
        share: Its part of `Σ_i ‖g_i‖²`.
    """

    rms: float
    dense_rms: float
    share: float


def measured_distortion(rows: Tensor, layout: Layout, gram: Mapping[str, Tensor]) -> Distortion:
    """Errors of the projected rows of samples whose exact inner products are known.

    Args:
        rows: Projected gradients `[n, K]`, any dtype and device.
        layout: What their columns are.
        gram: `⟨g_i, g_j⟩` `[n, n]` of each of the layout's parameters.

    Raises:
        BatchError: Shapes do not fit, a number is not finite, or fewer than two samples have a gradient.
    """
    _check(rows, layout, gram)
    return _distortion(_products(rows), _total(layout, gram))


def parameter_errors(rows: Tensor, layout: Layout, gram: Mapping[str, Tensor]) -> dict[str, ParameterError]:
    """The same parameter by parameter; arguments and errors as for `measured_distortion`."""
    _check(rows, layout, gram)
    norms = float(_total(layout, gram).trace())
    found = {}
    for part in layout.slices:
        exact = gram[part.parameter].double()
        variance = _dense_variance(part, exact)
        found[part.parameter] = ParameterError(
            _relative_rms((_products(rows[:, part.columns]) - exact).square(), exact),
            _relative_rms(variance, exact),
            float(exact.trace()) / norms,
        )
    return found


def dense_error(layout: Layout, gram: Mapping[str, Tensor]) -> ExpectedError:
    """The error expected of dense Gaussian projections, one for each parameter, to as many numbers as the
    layout keeps of it.

    For `P` `[k, m]` with independent entries of variance `1/k`, `⟨Px, Py⟩` has the variance
    `(‖x‖²‖y‖² + ⟨x, y⟩²) / k`; over parameters variances add up. A parameter that is kept whole has none.

    Args:
        layout, gram: As for `measured_distortion`.

    Raises:
        BatchError: As `measured_distortion`.
    """
    _check_gram(layout, gram)
    exact = _total(layout, gram)
    variance = torch.stack([_dense_variance(part, gram[part.parameter].double()) for part in layout.slices])
    total = variance.sum(0)
    return ExpectedError(_relative_rms(total, exact), _relative_norm_rms(total, exact))


def _dense_variance(part: Slice, exact: Tensor) -> Tensor:
    """Variance `[n, n]` of a dense projection's inner products."""
    kept = part.stop - part.start
    if kept == part.size_out * part.size_in:
        return torch.zeros_like(exact)
    norms = _squared_norms(exact)
    return (torch.outer(norms, norms) + exact.square()) / kept


def _distortion(projected: Tensor, exact: Tensor) -> Distortion:
    there = exact.diagonal() > 0
    exact, projected = exact[there][:, there], projected[there][:, there]
    n = len(exact)
    pairs = _pairs(n)
    cosine, found = _cosines(exact), _cosines(projected)
    squared = (projected - exact).square()
    return Distortion(
        samples=n,
        rms=_relative_rms(squared, exact),
        norm_rms=_relative_norm_rms(squared, exact),
        cosine_rms=float((found - cosine)[pairs].square().mean().sqrt()),
        spearman=rank_correlation(projected[pairs], exact[pairs]),
        cosine_spearman=rank_correlation(found[pairs], cosine[pairs]),
        recall_at_1=_recall(found, cosine, 1),
        recall_at_5=_recall(found, cosine, 5),
    )


def _relative_rms(squared: Tensor, exact: Tensor) -> float:
    """Root of the mean of squared errors `[n, n]` over pairs, against the mean of `‖g_i‖²‖g_j‖²`."""
    pairs = _pairs(len(exact))
    norms = _squared_norms(exact)
    mean = torch.outer(norms, norms)[pairs].mean()
    return math.sqrt(squared[pairs].mean() / mean) if mean > 0 else math.nan


def _relative_norm_rms(squared: Tensor, exact: Tensor) -> float:
    """The same over single samples."""
    return math.sqrt(squared.diagonal().mean() / exact.diagonal().square().mean())


def _squared_norms(exact: Tensor) -> Tensor:
    """`‖g_i‖²` `[n]`. What is zero but for rounding may have a product with itself below zero, since the two
    factors come from different rows of a pass.
    """
    return exact.diagonal().clamp_min(0.0)


def _cosines(products: Tensor) -> Tensor:
    """Cosines `[n, n]`; 0 with what is projected to nothing."""
    norms = products.diagonal().clamp_min(torch.finfo(products.dtype).tiny).sqrt()
    return products / torch.outer(norms, norms)


def _pairs(n: int) -> tuple[Tensor, Tensor]:
    """Both indices of all pairs with `i < j`."""
    first, second = torch.triu_indices(n, n, offset=1)
    return first, second


def _recall(found: Tensor, exact: Tensor, k: int) -> float | None:
    """Share of the k nearest others that are found."""
    if len(exact) - 1 <= k:
        return None
    nearest, close = (_others(cosines).topk(k, dim=1).indices for cosines in (exact, found))  # [n, k]
    return float((nearest[:, :, None] == close[:, None, :]).any(2).double().mean())


def _others(cosines: Tensor) -> Tensor:
    """Cosines with nobody near to itself."""
    return cosines.clone().fill_diagonal_(-math.inf)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two vectors `[m]`, ties sharing their mean rank; NaN where all of one are
    equal.
    """
    if len(a) < 2:
        return math.nan
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks `[m]` float64 from 1 on."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


def _products(rows: Tensor) -> Tensor:
    """Inner products `[n, n]` of rows, in float64 on the CPU."""
    wide = rows.detach().double().cpu()
    return wide @ wide.T


def _total(layout: Layout, gram: Mapping[str, Tensor]) -> Tensor:
    """The whole gradients' inner products."""
    return torch.stack([gram[name].double() for name in layout.parameters]).sum(0)


def _check(rows: Tensor, layout: Layout, gram: Mapping[str, Tensor]) -> None:
    samples = _check_gram(layout, gram)
    if tuple(rows.shape) != (samples, layout.width):
        raise BatchError(
            f"rows of shape {tuple(rows.shape)} should be [{samples}, {layout.width}]: one for each "
            "sample of the exact products, with a column for each number that the layout keeps."
        )
    if not rows.isfinite().all():
        raise BatchError("the projected rows hold a number that is not finite: project in a wider dtype.")


def _check_gram(layout: Layout, gram: Mapping[str, Tensor]) -> int:
    """The number of samples."""
    if missing := [name for name in layout.parameters if name not in gram]:
        raise BatchError(
            f"the exact products lack parameter {missing[0]!r}, which is projected: take exact_gram of the "
            "layout's parameters."
        )
    sizes = {tuple(gram[name].shape) for name in layout.parameters}
    if len(sizes) != 1 or len(shape := sizes.pop()) != 2 or shape[0] != shape[1]:
        raise BatchError("the exact products should be [n, n] for one n and every parameter of the layout.")
    if not all(gram[name].isfinite().all() for name in layout.parameters):
        raise BatchError("the exact products hold a number that is not finite: take them in a wider dtype.")
    if (there := int((_total(layout, gram).diagonal() > 0).sum())) < 2:
        raise BatchError(f"{there} of the samples have a gradient that is not zero: a pair takes two.")
    return shape[0]
