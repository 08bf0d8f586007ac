"""Ranks as shares, ties averaged."""

import numpy as np
from numpy.typing import NDArray


def rank_shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rank of each value within its row, as the share `(rank - 1/2) / n`: near 0 the lowest, near 1 the
    highest, 1/2 in a row of one; ties share the mean of their ranks.

    Args:
        values: `[m, n]`, finite.

    Returns:
        `[m, n]` float64.
    """
    m, n = values.shape
    order = np.argsort(values, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    new = np.ones((m, n), dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=new[:, 1:])
    shares = np.empty((m, n))
    place = np.broadcast_to(np.arange(n), (m, n))
    if new.all():
        np.put_along_axis(shares, order, (place + 0.5) / n, axis=1)
        return shares
    first = place[new]  # where each group of ties begins in its row
    size = np.diff(np.append(np.flatnonzero(new), m * n))
    np.put_along_axis(shares, order, np.repeat((first + size / 2) / n, size).reshape(m, n), axis=1)
    return shares
