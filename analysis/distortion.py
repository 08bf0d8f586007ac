"""The plot of a distortion report: what projections lose, against their rank."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter

from analysis.errors import AnalysisError
from analysis.figures import Drawing, domain_styles, new_figure, save, tidy

_GREY = "#666666"


def plot_distortion(report: Path, path: Path) -> Path:
    """Draw error and rank correlation against rank, a line for each kind of matrix, and return the path.

    Raises:
        AnalysisError: The report is missing, damaged or has no measurement.
    """
    return save(draw_distortion(read_report(report)), path)


def draw_distortion(found: Mapping[str, Any]) -> Drawing:
    """Error and rank correlation against rank, of a report's content."""
    kinds = _by_kind(found["measurements"])
    figure = new_figure(7.6, 3.4)
    errors, correlations = figure.subplots(1, 2)
    _draw_errors(errors, kinds)
    _draw_correlations(correlations, kinds)
    errors.legend(fontsize=8, frameon=False)
    notes = [
        f"{found['samples']} samples, {found['seeds']} seeds; error: root mean square over pairs, as a share "
        "of the gradients' norms; shaded: from seed to seed",
        "dense: what one Gaussian matrix for each parameter would be expected to give with as many numbers",
    ]
    return Drawing(figure, f"Projected against exact inner products of gradients: {found['model']}", notes)


def read_report(path: Path) -> dict[str, Any]:
    """The report's content.

    Raises:
        AnalysisError: It is missing, damaged or has no measurement.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnalysisError(f"{path} is no distortion report: {error}") from error
    if not isinstance(report, dict) or not report.get("measurements"):
        raise AnalysisError(f"{path} is no distortion report: it has no measurements.")
    return report


def _by_kind(measurements: list[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Measurements of each kind by rising rank."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for one in sorted(measurements, key=lambda one: one["rank"]):
        kinds.setdefault(one["kind"], []).append(one)
    return kinds


def _draw_errors(axes: Axes, kinds: Mapping[str, list[Mapping[str, Any]]]) -> None:
    _draw_lines(axes, kinds, lambda one: one["rms"])
    for kind, style in domain_styles(kinds).items():
        ranks = [one["rank"] for one in kinds[kind]]
        lowest = [min(one["rms_by_seed"]) for one in kinds[kind]]
        highest = [max(one["rms_by_seed"]) for one in kinds[kind]]
        axes.fill_between(ranks, lowest, highest, color=style.colour, alpha=0.15, linewidth=0)
    some = next(iter(kinds.values()))
    ranks = [one["rank"] for one in some]
    axes.plot(ranks, [one["dense_rms"] for one in some], color=_GREY, linestyle="--", label="dense")
    if all(one["dense_rms"] > 0 and min(one["rms_by_seed"]) > 0 for own in kinds.values() for one in own):
        axes.set_yscale("log")
    _finish(axes, ranks, "error of inner products")


def _draw_correlations(axes: Axes, kinds: Mapping[str, list[Mapping[str, Any]]]) -> None:
    # Null, where all pairs are alike, is drawn as a gap.
    _draw_lines(axes, kinds, lambda one: one["spearman"])
    _finish(axes, [one["rank"] for one in next(iter(kinds.values()))], "their Spearman correlation")


def _draw_lines(
    axes: Axes,
    kinds: Mapping[str, list[Mapping[str, Any]]],
    value: Callable[[Mapping[str, Any]], float | None],
) -> None:
    for kind, style in domain_styles(kinds).items():
        points = [(one["rank"], found) for one in kinds[kind] if (found := value(one)) is not None]
        ranks, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(
            ranks, values, color=style.colour, linestyle=style.line, marker="o", markersize=4, label=kind
        )


def _finish(axes: Axes, ranks: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rank: numbers kept of a parameter", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    tidy(axes)
    axes.tick_params(which="minor", labelsize=8)  # a logarithmic axis of less than a decade labels these
