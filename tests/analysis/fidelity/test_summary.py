"""Means over seeds, their intervals, and how they are written."""

import pytest

from analysis.compare.contrasts import Estimate
from analysis.fidelity.summary import Measurement, alike, console_tables, estimate_text, measures, summarise


def at(optimizer: str, lr: str, seed: int, **metrics: float) -> Measurement:
    named = {name.replace("__", "/"): number for name, number in metrics.items()}
    return Measurement({"optimizer": optimizer, "lr": lr, "seed": str(seed)}, named)


def test_a_row_is_a_method_at_a_place_and_its_mean_is_over_seeds() -> None:
    points = [
        at("sgd", "0.005", seed, spearman__first=number, spread=1.0) for seed, number in enumerate((0.7, 0.9))
    ]
    (first, place) = summarise(points)
    assert (first.coordinates, first.method, first.seeds) == ({"optimizer": "sgd", "lr": "0.005"}, "first", 2)
    estimate = first.estimates["spearman"]
    # Student's 97.5 % point of one degree of freedom is 12.706; the mean's error is 0.1.
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.8, -0.4706, 2.0706), abs=1e-4)
    assert (place.method, place.estimates["spread"].mean) == ("", 1.0)


def test_rows_keep_the_numbers_of_each_seed() -> None:
    (row,) = summarise([at("sgd", "1", 3, rmse__a=0.5), at("sgd", "1", 1, rmse__a=0.25)])
    assert row.numbers == {"rmse": {3: 0.5, 1: 0.25}}


def test_rows_are_parted_by_their_measures() -> None:
    rows = summarise([at("sgd", "1", 0, rmse__a=1.0, x__b=1.0, rmse__c=1.0), at("adamw", "1", 0, x__a=1.0)])
    parts = [[(row.coordinates["optimizer"], row.method) for row in part] for part in alike(rows)]
    assert parts == [[("adamw", "a"), ("sgd", "b")], [("sgd", "a"), ("sgd", "c")]]
    assert len(console_tables("lds", rows)) == 2


def test_places_are_in_the_order_of_their_numbers() -> None:
    rates = ["3.0", "0.0006", "5e-05", "0.005"]
    rows = summarise(
        [at("sgd", rate, 0, rmse__a=1.0) for rate in rates] + [at("adamw", "0.01", 0, rmse__a=1.0)]
    )
    assert [row.coordinates["lr"] for row in rows] == ["0.01", "5e-05", "0.0006", "0.005", "3.0"]


def test_methods_and_measures_keep_their_order() -> None:
    rows = summarise([at("sgd", "1", 0, spearman__b=1.0, rmse__b=2.0, spearman__a=1.0, mc_error=3.0)])
    assert [row.method for row in rows] == ["b", "a", ""]
    assert measures(rows) == ["spearman", "rmse", "mc_error"]


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.98765, 0.98, 0.9953), "0.988 ± 0.008"),
        (Estimate(-12.3456, -13.0, -11.6912), "-12.346 ± 0.654"),
        (Estimate(3.1234e-4, 3.1e-4, 3.1468e-4), "3.12e-04 ± 2.3e-06"),
        (Estimate(1.0, 1.0, 1.0), "1 ± 0"),
        (Estimate(0.5, None, None), "0.5"),
    ],
)
def test_digits_are_as_many_as_the_interval_asks_for(estimate: Estimate, text: str) -> None:
    assert estimate_text(estimate) == text
