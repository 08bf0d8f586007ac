"""Numbers as the page shows them."""

import math

import pytest

from analysis.report.numbers import Scale, correlation, count, loss, percent, signed, size


@pytest.mark.parametrize(
    ("values", "unit", "texts"),
    [
        ([0.0071849, -0.000487], "10⁻³ nats", ["+7.185", "−0.487"]),
        ([7.1849e-4, 4.87e-5], "10⁻⁶ nats", ["+718.5", "+48.7"]),
        ([12.5, -3.25], "nats", ["+12.50", "−3.25"]),
        ([1234567.0, 1.5e6], "10⁶ nats", ["+1.235", "+1.500"]),
        ([54321.0, 1000.0], "nats", ["+54,321", "+1,000"]),
        ([1.0, 1e-7], "nats", ["+1.00 × 10⁰", "+1.00 × 10⁻⁷"]),
        ([0.0, 0.0], "nats", ["+0", "+0"]),
        ([None, math.nan, math.inf, -math.inf, 1.0], "nats", ["–", "–", "+∞", "−∞", "+1.000"]),
    ],
)
def test_a_column_has_one_power_of_ten_where_that_shows_all(
    values: list[float | None], unit: str, texts: list[str]
) -> None:
    scale = Scale.of(values)
    assert scale.unit("nats") == unit
    assert [scale.text(value) for value in values] == texts


def test_numbers_alone() -> None:
    assert signed(0.19512) == "+0.1951"
    assert signed(-4.8712) == "−4.871"
    assert signed(1.5e-7) == "+1.500 × 10⁻⁷"
    assert signed(0.0) == "+0"
    assert signed(None) == signed(math.nan) == "–"
    assert loss(math.nan) == "–"
    assert loss(2.0) == "2.0000"
    assert percent(0.12345) == "12.3 %"
    assert percent(-0.5, 0) == "−50 %"
    assert percent(None) == "–"
    assert count(1234567).split() == ["1", "234", "567"]
    assert correlation(-0.125) == "−0.12"
    assert size(999) == "999 B"
    assert size(1_250_000) == "1.2 MB"
