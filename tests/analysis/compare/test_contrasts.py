"""Intervals against scipy's own tests, and the choice of how groups are held against each other."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.compare.contrasts import Design, Estimate, design, difference


@pytest.mark.parametrize("number", [2, 3, 8])
def test_pairs_give_the_interval_of_the_paired_t_test(number: int) -> None:
    generator = np.random.default_rng(number)
    group = dict(enumerate(generator.normal(size=number)))
    against = dict(enumerate(generator.normal(size=number)))
    found = difference(group, against, range(number))
    test = stats.ttest_rel(list(group.values()), list(against.values()))
    expected = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(list(group.values())) - np.mean(list(against.values())))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


@pytest.mark.parametrize("numbers", [(2, 2), (3, 7)])
def test_two_samples_give_welchs_interval(numbers: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(numbers))
    group = dict(enumerate(generator.normal(size=numbers[0])))
    against = {100 + i: one for i, one in enumerate(3 * generator.normal(size=numbers[1]))}
    found = difference(group, against, ())
    test = stats.ttest_ind(list(group.values()), list(against.values()), equal_var=False)
    expected = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_pairs_of_known_numbers() -> None:
    found = difference({1: 3.0, 2: 5.0, 9: 70.0}, {1: 1.0, 2: 1.0, 8: 80.0}, (1, 2))
    half = (
        12.706204736432095 * 1.0
    )  # t of one degree of freedom; differences 2 and 4 have a standard error of 1
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half))


def test_less_than_two_numbers_have_no_interval() -> None:
    assert difference({1: 3.0}, {1: 1.0}, (1,)) == Estimate(2.0, None, None)
    assert difference({1: 3.0}, {2: 1.0, 3: 3.0}, ()) == Estimate(1.0, None, None)


def test_numbers_that_do_not_vary_have_an_interval_of_no_width() -> None:
    assert difference({1: 3.0, 2: 4.0}, {1: 1.0, 2: 2.0}, (1, 2)) == Estimate(2.0, 2.0, 2.0)
    assert difference({1: 3.0, 2: 3.0}, {3: 1.0, 4: 1.0}, ()) == Estimate(2.0, 2.0, 2.0)


def test_a_difference_of_logarithms_is_a_ratio() -> None:
    found = Estimate(math.log(0.5), math.log(0.25), None).exponential()
    assert (found.mean, found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.25), None)


@pytest.mark.parametrize(
    ("seeds", "against", "expected"),
    [
        ([0, 1, 2], [2, 1, 0], Design((0, 1, 2), "")),
        ([0, 0, 1, 1], [0, 1], Design((0, 1), "")),
        ([0, 1, 2], [1, 2, 3], Design((1, 2), "2 seeds are in one group only and left out")),
        ([0], [0], Design((0,), "one pair: no interval")),
        ([0], [0, 1], Design((0,), "1 seed is in one group only and left out; one pair: no interval")),
        ([0, 1], [1, 2], Design((), "seeds do not match: Welch's interval")),
        ([0, 1], [5], Design((), "seeds do not match, and a group has only one: no interval")),
    ],
)
def test_groups_are_paired_by_seed_where_seeds_match(
    seeds: list[int], against: list[int], expected: Design
) -> None:
    assert design(seeds, against) == expected
