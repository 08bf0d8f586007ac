"""Rows against a reference row: which meet, over which seeds, and what their interval is."""

import pytest

from analysis.compare.contrasts import Estimate
from analysis.fidelity.differences import differences, leaves_zero_out
from analysis.fidelity.summary import Measurement, summarise


def at(place: str, seed: int, metrics: dict[str, float]) -> Measurement:
    return Measurement({"policy": place, "seed": str(seed)}, metrics)


def test_methods_meet_the_reference_of_their_own_place() -> None:
    rows = summarise(
        [
            at(place, seed, {"lds/first_order": level + seed, "lds/b": level * 3 + seed, "spread": 1.0})
            for place, level in (("x", 1.0), ("y", 2.0))
            for seed in range(3)
        ]
    )
    found = differences(rows, {"method": "first_order"}, ["lds", "none"])
    assert [(row.coordinates["policy"], row.method, row.seeds) for row in found] == [
        ("x", "b", 3),
        ("y", "b", 3),
    ]
    assert [row.estimates["lds"] for row in found] == [Estimate(2.0, 2.0, 2.0), Estimate(4.0, 4.0, 4.0)]


def test_places_meet_the_reference_by_the_seeds_that_both_have() -> None:
    losses = {"uniform": {0: 3.0, 1: 4.0, 2: 9.0}, "top_k": {1: 3.0, 0: 2.5, 4: 0.0}, "all": {5: 1.0}}
    points = [at(name, seed, {"loss": loss}) for name, own in losses.items() for seed, loss in own.items()]
    (row,) = differences(summarise(points), {"policy": "uniform"}, ["loss"])
    assert (row.coordinates["policy"], row.seeds) == ("top_k", 2)
    estimate = row.estimates["loss"]
    # Differences -0.5 and -1; Student's 97.5 % point of one degree of freedom is 12.706.
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((-0.75, -3.9265, 2.4265), abs=1e-4)


def test_one_pair_has_no_interval_and_an_absent_reference_no_rows() -> None:
    rows = summarise([at("uniform", 0, {"loss": 3.0}), at("top_k", 0, {"loss": 2.0})])
    (row,) = differences(rows, {"policy": "uniform"}, ["loss"])
    assert row.estimates["loss"] == Estimate(-1.0, None, None)
    assert differences(rows, {"policy": "greedy"}, ["loss"]) == []


@pytest.mark.parametrize(
    ("estimate", "out"),
    [
        (Estimate(1.0, 0.5, 1.5), True),
        (Estimate(-1.0, -1.5, -0.5), True),
        (Estimate(0.2, -0.1, 0.5), False),
        (Estimate(0.0, 0.0, 0.0), False),
        (Estimate(1.0, None, None), False),
    ],
)
def test_an_interval_on_one_side_leaves_zero_out(estimate: Estimate, out: bool) -> None:
    assert leaves_zero_out(estimate) is out
