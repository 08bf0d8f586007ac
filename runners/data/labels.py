"""Labels as they stand in a column, as classes numbered from 0."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runners.errors import DataError


def classes_of(values: Sequence[Any], source: str, field: str) -> tuple[NDArray[np.int64], list[str]]:
    """The class of each value, `[n]` int64, and the classes' names: the values in sorted order.

    Raises DataError for a value that is missing or neither text nor a whole number, for text and numbers
    mixed, or for a single class.
    """
    for row, value in enumerate(values):
        if not isinstance(value, str | int):
            said = "no value" if value is None else f"the {type(value).__name__} {value}"
            raise DataError(
                f"{source} has {said} in row {row} of {field!r} (data.label_field); labels are text or whole "
                "numbers."
            )
    if len({isinstance(value, str) for value in values}) > 1:
        raise DataError(
            f"{source} mixes text and numbers in {field!r} (data.label_field); make it one of them."
        )
    names = sorted(set(values))
    if len(names) < 2:
        raise DataError(
            f"{source} has {len(names)} different labels in {field!r} (data.label_field); training needs two "
            "or more."
        )
    numbers = {name: i for i, name in enumerate(names)}
    return np.array([numbers[value] for value in values], dtype=np.int64), [str(name) for name in names]
