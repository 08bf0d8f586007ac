"""Measured distortion as a table, a JSON file and metrics."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from ghost.distortion import Distortion, ExpectedError, ParameterError
from ghost.layout import Layout, Slice

MEDIANS = ("spearman", "cosine_spearman", "recall_at_1", "recall_at_5")
HEADINGS = (
    *("rank", "numbers", "error", "dense", "ratio", "cosine error"),
    *("ρ dots", "ρ cosines", "top 1", "top 5"),
)


@dataclass(frozen=True)
class Draw:
    """What one seed's matrices gave.

    Attributes:
        dense: What dense Gaussian matrices of the same size would be expected to give.
        parameters: The same by parameter name.
    """

    layout: Layout
    whole: Distortion
    dense: ExpectedError
    parameters: dict[str, ParameterError]


@dataclass(frozen=True)
class Measurement:
    """One rank with one kind of matrices, over seeds."""

    rank: int
    kind: str
    draws: Sequence[Draw]

    @property
    def layout(self) -> Layout:
        """Columns of a row; no seed changes them."""
        return self.draws[0].layout

    @property
    def rms(self) -> float:
        """Error of inner products, pooled over seeds: what a dense projection's expected error compares
        with.
        """
        return _pooled([draw.whole.rms for draw in self.draws])

    @property
    def dense_rms(self) -> float:
        """The dense projection's."""
        return self.draws[0].dense.rms

    @property
    def ratio(self) -> float | None:
        """Error of the Kronecker projections over the dense ones'; None where everything is kept."""
        return self.rms / self.dense_rms if self.dense_rms else None

    @property
    def cosine_rms(self) -> float:
        """Error of cosines, pooled over seeds."""
        return _pooled([draw.whole.cosine_rms for draw in self.draws])

    def median(self, measure: str) -> float | None:
        """The median over seeds of a measure of `Distortion` that some seeds may not have."""
        values = [getattr(draw.whole, measure) for draw in self.draws]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        return median(finite) if finite else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: errors pooled over seeds, correlations and recalls as medians."""
        whole = [draw.whole for draw in self.draws]
        return {
            "kind": self.kind,
            "rank": self.rank,
            "columns": self.layout.width,
            "rms": self.rms,
            "rms_by_seed": [draw.rms for draw in whole],
            "dense_rms": self.dense_rms,
            "ratio": self.ratio,
            "norm_rms": _pooled([draw.norm_rms for draw in whole]),
            "dense_norm_rms": self.draws[0].dense.norm_rms,
            "cosine_rms": self.cosine_rms,
            **{measure: self.median(measure) for measure in MEDIANS},
            "parameters": {part.parameter: self._parameter(part) for part in self.layout.slices},
        }

    def _parameter(self, part: Slice) -> dict[str, Any]:
        found = [draw.parameters[part.parameter] for draw in self.draws]
        rms = _pooled([one.rms for one in found])
        return {
            "size": [part.size_out, part.size_in],
            "kept": [part.k_out, part.k_in],
            "rms": None if math.isnan(rms) else rms,
            "dense_rms": None if math.isnan(found[0].dense_rms) else found[0].dense_rms,
            "share": found[0].share,
        }


def write_report(found: Sequence[Measurement], sample_ids: Sequence[str], model: str, path: Path) -> None:
    """Write every number as JSON; no number is NaN."""
    report = {
        "model": model,
        "sample_ids": list(sample_ids),
        "samples": samples(found),
        "seeds": len(found[0].draws),
        "measurements": [one.to_dict() for one in found],
    }
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def metrics(found: Sequence[Measurement]) -> dict[int, dict[str, float]]:
    """Metrics by step, where the step is the rank."""
    by_rank: dict[int, dict[str, float]] = {}
    for one in found:
        values = {"rms": one.rms, "dense_rms": one.dense_rms, "ratio": one.ratio}
        values["cosine_rms"] = one.cosine_rms
        values |= {measure: one.median(measure) for measure in MEDIANS}
        by_rank.setdefault(one.rank, {}).update(
            {f"{one.kind}/{name}": value for name, value in values.items() if value is not None}
        )
    return by_rank


def table(found: Sequence[Measurement]) -> Table:
    """One row for each rank and kind."""
    title = f"Projected against exact inner products, {samples(found)} samples, {len(found[0].draws)} seeds"
    shown = Table(title=title, title_justify="left")
    shown.add_column("kind", no_wrap=True)
    for heading in HEADINGS:
        shown.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        shown.add_row(
            Text(one.kind), str(one.rank), f"{one.layout.width:,}", f"{one.rms:.4f}", f"{one.dense_rms:.4f}",
            _shown(one.ratio), f"{one.cosine_rms:.4f}", *(_shown(one.median(name)) for name in MEDIANS),
        )  # fmt: skip
    return shown


def samples(found: Sequence[Measurement]) -> int:
    """How many samples were compared: those whose gradient is not zero."""
    return found[0].draws[0].whole.samples


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _pooled(errors: Sequence[float]) -> float:
    """The root mean square."""
    return math.sqrt(math.fsum(error**2 for error in errors) / len(errors))
