import numpy as np
import pytest
from scipy.stats import rankdata

from analysis.ranks import rank_shares


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 1), (1, 40), (7, 9), (0, 3)])
@pytest.mark.parametrize("decimals", [0, 1, 9])  # many ties to none
def test_average_ranks_as_shares(rows: int, columns: int, decimals: int) -> None:
    values = np.random.default_rng(rows).normal(size=(rows, columns)).round(decimals)
    expected = (rankdata(values, axis=1) - 0.5) / columns
    np.testing.assert_allclose(rank_shares(values), expected, rtol=0, atol=1e-15)


def test_ties_are_equal_and_one_value_is_in_the_middle() -> None:
    assert rank_shares(np.array([[3.0, 1.0, 3.0, -0.0, 0.0]])).tolist() == [[0.8, 0.5, 0.8, 0.2, 0.2]]
    assert rank_shares(np.array([[7.0], [8.0]])).tolist() == [[0.5], [0.5]]
