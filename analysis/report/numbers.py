"""Numbers as a page shows them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MINUS = "−"
_NONE = "–"
THIN_SPACE = "\N{NARROW NO-BREAK SPACE}"
_DIGITS = 4  # of the largest number of a column
_LEAST_DIGITS = 2  # of the smallest, else each number gets a power of ten of its own


@dataclass(frozen=True)
class Scale:
    """How the numbers of a column are written, so that their decimal points stand under each other.

    Attributes:
        exponent: The power of ten that stands in the column's heading; None where each number has its own.
        places: Digits behind the point.
    """

    exponent: int | None
    places: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Scale":
        """The scale that suits the finite ones of these numbers; their exponent is a multiple of three."""
        sizes = [abs(v) for v in values if v is not None and math.isfinite(v) and v != 0]
        if not sizes:
            return cls(0, 0)
        largest, smallest = (math.floor(math.log10(size)) for size in (max(sizes), min(sizes)))
        exponent = 3 * (largest // 3)
        # Numbers from a thousandth to below a million are read best without one.
        exponent = 0 if exponent in (0, 3) else exponent
        places = max(0, _DIGITS - 1 - (largest - exponent))
        if smallest - exponent + places + 1 < _LEAST_DIGITS:
            return cls(None, _DIGITS - 2)
        return cls(exponent, places)

    def unit(self, unit: str = "") -> str:
        """What stands in the heading after the name: `10⁻⁶ nats`."""
        power = "" if not self.exponent else f"10{str(self.exponent).translate(_SUPERSCRIPTS)}"
        return " ".join(filter(None, (power, unit)))

    def text(self, value: float | None) -> str:
        """The number, with its sign."""
        if value is None or math.isnan(value):
            return _NONE
        if math.isinf(value):
            return f"{_MINUS if value < 0 else '+'}∞"
        if self.exponent is None:
            return _power(f"{value:+.{self.places}e}")
        return f"{value / 10**self.exponent:+,.{self.places}f}".replace("-", _MINUS)


def signed(value: float | None) -> str:
    """A number on its own, in four digits and with its sign."""
    if value is not None and math.isfinite(value) and 0 < abs(value) < 1e-4:
        return _power(f"{value:+.{_DIGITS - 1}e}")
    return Scale(0, _places(value)).text(value)


def loss(value: float | None) -> str:
    """A loss in nats, to four places."""
    return _NONE if value is None or not math.isfinite(value) else f"{value:.4f}".replace("-", _MINUS)


def percent(share: float | None, places: int = 1) -> str:
    """A share of one as a percentage."""
    if share is None or not math.isfinite(share):
        return _NONE
    return f"{100 * share:.{places}f} %".replace("-", _MINUS)


def count(number: float | None) -> str:
    """A whole number with thousands set apart by thin spaces."""
    if number is None or not math.isfinite(number):
        return _NONE
    return f"{number:,.0f}".replace(",", THIN_SPACE)


def correlation(value: float | None) -> str:
    """A correlation to two places."""
    return _NONE if value is None or not math.isfinite(value) else f"{value:+.2f}".replace("-", _MINUS)


def size(number: float) -> str:
    """Bytes in decimal units."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def _places(value: float | None) -> int:
    """Digits behind the point that make four in all."""
    if not value or not math.isfinite(value):
        return 0
    return max(0, _DIGITS - 1 - math.floor(math.log10(abs(value))))


def _power(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    power = str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"{mantissa.replace('-', _MINUS)} × 10{power}"
