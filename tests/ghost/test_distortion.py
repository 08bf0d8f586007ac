"""Measures of distortion, held against their equations written out, and the dense reference against draws."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from ghost import GhostConfig, GradProjLoRAEngine
from ghost.distortion import (
    dense_error,
    measured_distortion,
    parameter_errors,
    rank_correlation,
)
from ghost.errors import BatchError
from ghost.gram import exact_gram
from ghost.layout import Layout
from tests.ghost.models import mlp, table, tiny_gpt2, tokens, with_ignored
from tests.ghost.reference import causal_loss, class_loss

SAMPLES = 9
LAYOUT = Layout.of(
    [("big.weight", (6, 5), (3, 2)), ("big.bias", (4, 1), (4, 1)), ("wide.weight", (2, 12), (2, 3))]
)
Gradients = dict[str, Tensor]


def gradients(samples: int = SAMPLES) -> Gradients:
    """Random gradients `[n, size]` of the layout's parameters, of unlike norms."""
    scales = torch.logspace(-1, 1, samples, dtype=torch.float64)[:, None]
    return {
        part.parameter: scales * (1 + torch.randn(samples, part.size_out * part.size_in, dtype=torch.float64))
        for part in LAYOUT.slices
    }


def gram_of(gradients: Gradients) -> Gradients:
    return {name: g @ g.T for name, g in gradients.items()}


def dense_rows(gradients: Gradients) -> Tensor:
    """Each parameter by a dense Gaussian matrix of its own, to as many numbers as the layout keeps."""
    columns = []
    for part in LAYOUT.slices:
        g, kept = gradients[part.parameter], part.stop - part.start
        whole = kept == g.shape[1]
        columns.append(g if whole else g @ torch.randn(g.shape[1], kept, dtype=g.dtype) / math.sqrt(kept))
    return torch.cat(columns, 1)


def ranks(values: list[float]) -> list[float]:
    """Mean ranks, by counting."""
    return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]


def correlation(a: list[float], b: list[float]) -> float:
    x, y = torch.tensor(a), torch.tensor(b)
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def test_every_measure_is_its_equation() -> None:
    g = gradients()
    rows = dense_rows(g)
    whole = torch.cat(list(g.values()), 1)
    found = measured_distortion(rows, LAYOUT, gram_of(g))
    pairs = list(combinations(range(SAMPLES), 2))

    def products(of: Tensor) -> dict[tuple[int, int], float]:
        return {(i, j): float(of[i] @ of[j]) for i in range(SAMPLES) for j in range(SAMPLES)}

    p, e = products(rows), products(whole)

    def cos(of: dict[tuple[int, int], float], i: int, j: int) -> float:
        return of[i, j] / math.sqrt(of[i, i] * of[j, j])

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    assert found.samples == SAMPLES
    error, norms = [(p[ij] - e[ij]) ** 2 for ij in pairs], [e[i, i] * e[j, j] for i, j in pairs]
    assert found.rms == pytest.approx(math.sqrt(mean(error) / mean(norms)), rel=1e-12)
    own = [(p[i, i] - e[i, i]) ** 2 for i in range(SAMPLES)]
    squares = [e[i, i] ** 2 for i in range(SAMPLES)]
    assert found.norm_rms == pytest.approx(math.sqrt(mean(own) / mean(squares)), rel=1e-12)
    cosines = [(cos(p, *ij) - cos(e, *ij)) ** 2 for ij in pairs]
    assert found.cosine_rms == pytest.approx(math.sqrt(mean(cosines)), rel=1e-12)
    for actual, of in (
        (found.spearman, lambda x, i, j: x[i, j]),
        (found.cosine_spearman, cos),
    ):
        lists = [[of(x, *ij) for ij in pairs] for x in (p, e)]
        assert actual == pytest.approx(correlation(*map(ranks, lists)), rel=1e-5)

    def nearest(of: dict[tuple[int, int], float], i: int, k: int) -> set[int]:
        others = [j for j in range(SAMPLES) if j != i]
        return set(sorted(others, key=lambda j: -cos(of, i, j))[:k])

    for k, actual in ((1, found.recall_at_1), (5, found.recall_at_5)):
        shares = [len(nearest(p, i, k) & nearest(e, i, k)) / k for i in range(SAMPLES)]
        assert actual == pytest.approx(mean(shares))


def test_rows_without_loss_of_information_have_no_error() -> None:
    layout = Layout.of([(part.parameter, *((part.size_out, part.size_in),) * 2) for part in LAYOUT.slices])
    g = gradients()
    found = measured_distortion(torch.cat(list(g.values()), 1), layout, gram_of(g))
    assert max(found.rms, found.norm_rms, found.cosine_rms) < 1e-12
    assert (found.spearman, found.cosine_spearman) == (pytest.approx(1), pytest.approx(1))
    assert (found.recall_at_1, found.recall_at_5) == (1, 1)
    assert dense_error(layout, gram_of(g)).rms == 0


def test_the_dense_reference_is_what_dense_projections_give() -> None:
    g = gradients()
    gram = gram_of(g)
    expected = dense_error(LAYOUT, gram)
    by_parameter = parameter_errors(dense_rows(g), LAYOUT, gram)
    draws = [dense_rows(g) for _ in range(4000)]
    measured = [measured_distortion(rows, LAYOUT, gram) for rows in draws]
    for field in ("rms", "norm_rms"):
        mean_square = sum(getattr(one, field) ** 2 for one in measured) / len(measured)
        assert math.sqrt(mean_square) == pytest.approx(getattr(expected, field), rel=0.04)
    for name in ("big.weight", "wide.weight"):
        squares = [parameter_errors(rows, LAYOUT, gram)[name].rms ** 2 for rows in draws[:1500]]
        rms = math.sqrt(sum(squares) / len(squares))
        assert rms == pytest.approx(by_parameter[name].dense_rms, rel=0.06)
    assert by_parameter["big.bias"].dense_rms == 0  # kept whole


def test_errors_by_parameter_account_for_the_whole() -> None:
    g = gradients()
    rows, gram = dense_rows(g), gram_of(g)
    found = parameter_errors(rows, LAYOUT, gram)
    assert list(found) == list(LAYOUT.parameters)
    assert sum(part.share for part in found.values()) == pytest.approx(1)
    assert found["big.bias"].rms < 1e-12
    for part in LAYOUT.slices:
        alone = Layout.of([(part.parameter, (part.size_out, part.size_in), (part.k_out, part.k_in))])
        rms = measured_distortion(rows[:, part.columns], alone, gram).rms
        assert found[part.parameter].rms == pytest.approx(rms, abs=1e-15)
        assert found[part.parameter].dense_rms == pytest.approx(dense_error(alone, gram).rms)


def test_a_parameter_without_gradients_has_no_error_of_its_own() -> None:
    g = gradients()
    g["big.weight"] = torch.zeros_like(g["big.weight"])
    found = parameter_errors(dense_rows(g), LAYOUT, gram_of(g))
    assert math.isnan(found["big.weight"].rms)
    assert found["big.weight"].share == 0
    assert math.isfinite(measured_distortion(dense_rows(g), LAYOUT, gram_of(g)).rms)


def test_products_that_are_zero_but_for_rounding_are_no_trouble() -> None:
    g = gradients()
    rows, gram = dense_rows(g), gram_of(g)
    gram["big.weight"] = 1e-17 * torch.randn(SAMPLES, SAMPLES, dtype=torch.float64)
    gram["big.weight"].fill_diagonal_(-1e-17)
    found = parameter_errors(rows, LAYOUT, gram)["big.weight"]
    assert math.isnan(found.rms)
    assert math.isnan(found.dense_rms)
    assert math.isfinite(dense_error(LAYOUT, gram).rms)


def test_samples_without_a_gradient_are_left_out() -> None:
    g = gradients()
    some = torch.tensor([0, 2, 3, 5, 6, 7, 8])
    for name in g:
        g[name][[1, 4]] = 0
    rows = dense_rows(g)
    found = measured_distortion(rows, LAYOUT, gram_of(g))
    few = {name: values[some] for name, values in g.items()}
    expected = measured_distortion(rows[some], LAYOUT, gram_of(few))
    assert found.samples == 7
    assert found.rms == pytest.approx(expected.rms)
    assert found.cosine_spearman == pytest.approx(expected.cosine_spearman)
    assert dense_error(LAYOUT, gram_of(g)).rms == pytest.approx(dense_error(LAYOUT, gram_of(few)).rms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_dtype_are_compared_in_float64(dtype: torch.dtype) -> None:
    g = gradients()
    rows = dense_rows(g).to(dtype)
    gram = gram_of(g)
    assert measured_distortion(rows, LAYOUT, gram) == measured_distortion(rows.double(), LAYOUT, gram)


def test_few_samples_have_fewer_measures() -> None:
    g = gradients(3)
    found = measured_distortion(dense_rows(g), LAYOUT, gram_of(g))
    assert found.recall_at_5 is None
    assert found.recall_at_1 is not None
    pair = gradients(2)
    found = measured_distortion(dense_rows(pair), LAYOUT, gram_of(pair))
    assert math.isfinite(found.rms)
    assert math.isnan(found.spearman)
    assert found.recall_at_1 is None
    one = gradients(1)
    for measure in (measured_distortion, parameter_errors):
        with pytest.raises(BatchError, match="1 of the samples have a gradient that is not zero"):
            measure(dense_rows(one), LAYOUT, gram_of(one))


def test_what_is_projected_to_nothing_is_near_to_nobody() -> None:
    g = gradients()
    rows = dense_rows(g)
    rows[0] = 0
    assert math.isfinite(measured_distortion(rows, LAYOUT, gram_of(g)).cosine_rms)


def test_ranks_share_ties() -> None:
    a, b = torch.tensor([3.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 5.0, 4.0, 4.0])
    expected = correlation(ranks(a.tolist()), ranks(b.tolist()))
    assert rank_correlation(a, b) == pytest.approx(expected)
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert math.isnan(rank_correlation(a, torch.ones(4)))


def test_what_does_not_fit_is_refused() -> None:
    g = gradients()
    rows, gram = dense_rows(g), gram_of(g)
    with pytest.raises(BatchError, match=r"rows of shape \(8, 16\) should be \[9, 16\]"):
        measured_distortion(rows[1:], LAYOUT, gram)
    with pytest.raises(BatchError, match=r"lack parameter 'big\.bias'"):
        measured_distortion(rows, LAYOUT, {name: gram[name] for name in ("big.weight", "wide.weight")})
    with pytest.raises(BatchError, match=r"should be \[n, n\] for one n"):
        dense_error(LAYOUT, gram | {"big.bias": torch.zeros(3, 3)})
    rows[2, 3] = math.inf
    with pytest.raises(BatchError, match="rows hold a number that is not finite"):
        parameter_errors(rows, LAYOUT, gram)
    with pytest.raises(BatchError, match="exact products hold a number that is not finite"):
        dense_error(LAYOUT, gram | {"big.bias": torch.full((SAMPLES, SAMPLES), math.nan)})


PROJECTED = {
    "tied": (lambda: tiny_gpt2(), lambda: tokens(5, 6), causal_loss, "causal_token_mean"),
    "mlp": (lambda: mlp(), lambda: table(5), class_loss, "sample_mean"),
}


@pytest.mark.parametrize("case", PROJECTED.values(), ids=PROJECTED)
def test_the_engines_rows_and_the_exact_products_are_of_the_same_gradients(case: Any) -> None:
    make, data, loss_fn, reduction = case
    model, batch = make(), data()
    X, Y = batch if isinstance(batch, tuple) else (batch, with_ignored(batch, [6, 3, 5, 2, 6]))
    whole = GhostConfig(engine="gradprojlora", loss_reduction=reduction, proj_rank_total=10**6)
    engine = GradProjLoRAEngine(model, whole)  # keeps every parameter as it is
    gram = exact_gram(model, whole, X, Y, loss_fn, parameters=engine.layout.parameters, block=2)
    engine.attach()
    rows = engine.project(X, Y, loss_fn)
    engine.detach()
    for name, part in parameter_errors(rows, engine.layout, gram).items():
        assert part.rms < 1e-10 or part.share < 1e-20, name  # a key's bias has no gradient but rounding
    found = measured_distortion(rows, engine.layout, gram)
    assert max(found.rms, found.norm_rms, found.cosine_rms) < 1e-10


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthonormal"])
def test_errors_of_the_engine_fall_with_the_rank(kind: str) -> None:
    model, (X, Y) = mlp(width=16, hidden=24), table(12, 16)
    errors = []
    for rank in (16, 144):
        squares = []
        for seed in range(12):
            config = GhostConfig(
                engine="gradprojlora", loss_reduction="sample_mean", proj_rank_total=rank, proj_kind=kind,
                proj_seed=seed,
            )  # fmt: skip
            engine = GradProjLoRAEngine(model, config)
            engine.attach()
            rows = engine.project(X, Y, class_loss)
            engine.detach()
            gram = exact_gram(model, config, X, Y, class_loss, parameters=engine.layout.parameters)
            squares.append(measured_distortion(rows, engine.layout, gram).rms ** 2)
        errors.append(math.sqrt(sum(squares) / len(squares)))
    assert errors[1] < 0.6 * errors[0]
