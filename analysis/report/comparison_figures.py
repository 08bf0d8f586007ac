"""The figures of several runs: how far they agree, what varies between them, and what they lead to."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from analysis.figures import (
    HARMS,
    HELPS,
    Drawing,
    domain_styles,
    new_figure,
    plain,
    shortened,
    thinned,
    tidy,
)
from analysis.plots import VAL_LOSS
from analysis.runs import Run

_ANNOTATED = 14  # runs; of more, the numbers in the cells would not be readable
_POINTS = 1500  # samples; more are counted in cells
_TOLD_APART = 8  # runs with a line style of their own
_GREY = "#666666"
_DIVERGING = LinearSegmentedColormap.from_list("signs", [HARMS, "#FFFFFF", HELPS])


def correlation_map(names: Sequence[str], matrix: NDArray[np.float64]) -> Drawing:
    """Rank correlations of the runs `[R, R]`; the runs by their numbers."""
    size = 1.5 + min(0.45 * len(names), 4.2)
    figure = new_figure(size + 0.9, size)
    axes = figure.subplots()
    image = axes.pcolormesh(matrix, cmap=_DIVERGING, norm=Normalize(-1, 1), edgecolors="white", linewidth=1)
    places, numbers = np.arange(len(names)) + 0.5, range(1, len(names) + 1)
    axes.set_xticks(places, [str(number) for number in numbers])
    axes.set_yticks(places, [str(number) for number in numbers])
    axes.set_ylim(len(names), 0)
    axes.set_aspect("equal")
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("run", fontsize=9)
    axes.set_ylabel("run", fontsize=9)
    if len(names) <= _ANNOTATED:
        for (row, column), value in np.ndenumerate(matrix):
            text = "–" if np.isnan(value) else f"{value:.2f}".replace("-", "−")
            colour = "white" if abs(value) > 0.75 else "black"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=colour)
    bar = _colour_bar(figure, image, axes)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    notes = [
        "Spearman's correlation of the values that two runs give the samples both scored: 1 is the same order"
    ]
    return Drawing(figure, "Agreement of the runs' orders", notes)


def rank_scatter(a: tuple[str, NDArray[np.float64]], b: tuple[str, NDArray[np.float64]]) -> Drawing:
    """The ranks of the same samples `[n]` in two runs, each named."""
    figure = new_figure(4.6, 4.2)
    axes = figure.subplots()
    x, y = (_rank_shares(values) for _, values in (a, b))
    if x.size <= _POINTS:
        axes.scatter(x, y, s=9, color=HELPS, alpha=0.55, linewidths=0)
    else:
        counts, edges, _ = np.histogram2d(x, y, bins=40, range=[[0, 1], [0, 1]])
        shown = np.ma.masked_equal(counts.T, 0)
        image = axes.pcolormesh(edges, edges, shown, cmap="Blues", norm=Normalize(0, counts.max()))
        _colour_bar(figure, image, axes).set_label("samples", fontsize=8)
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_aspect("equal")
    tidy(axes)
    axes.set_xlabel(f"rank in run {plain(shortened(a[0], 40))}", fontsize=9)
    axes.set_ylabel(f"rank in run {plain(shortened(b[0], 40))}", fontsize=9)
    note = f"{x.size} samples that both runs scored; 0 is the lowest value of a run, 1 its highest"
    return Drawing(figure, "Ranks in two runs", [note])


def sign_stability(stability: NDArray[np.float64], positive: NDArray[np.float64]) -> Drawing:
    """How many samples have the same sign in what share of their runs; both `[n]`."""
    figure = new_figure(6.4, 2.6)
    axes = figure.subplots()
    width = 0.05
    places = np.linspace(0.5, 1, 11)
    edges = np.append(places - width / 2, 1 + width / 2)
    edges[0] = 0  # values of zero have neither sign, which makes less than a half
    helping = positive >= 0.5
    counts = [np.histogram(stability[own], edges)[0] for own in (helping, ~helping)]
    axes.bar(places, counts[0], 0.8 * width, color=HELPS, label="mostly positive")
    axes.bar(places, counts[1], 0.8 * width, bottom=counts[0], color=HARMS, label="mostly not positive")
    tidy(axes)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(0.46, 1.04)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("share of runs that agree on a sample's sign", fontsize=9)
    axes.set_ylabel("samples", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return Drawing(figure, "Stability of signs", ["samples that at least two runs scored"])


def sample_spread(rows: Sequence[Mapping[str, Any]], width: int = 44) -> Drawing:
    """Mean values as points with bars from the least to the largest run's; rows of the aggregate's values."""
    styles = domain_styles(row["domain"] for row in rows)
    figure = new_figure(7.2, 0.9 + 0.22 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        style = styles[row["domain"]]
        axes.plot(
            [row["low"], row["high"]],
            [place, place],
            color=style.colour,
            linewidth=1.6,
            solid_capstyle="butt",
        )
        axes.plot(row["value"], place, style.marker, color=style.colour, markersize=4.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [plain(shortened(row["sample_id"], width)) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.ticklabel_format(axis="x", scilimits=(-2, 3))
    axes.set_xlabel("value: fall in validation loss (nats)", fontsize=9)
    handles = [
        axes.plot([], [], style.marker, color=style.colour, markersize=4.5, label=plain(name))[0]
        for name, style in styles.items()
    ]
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Drawing(
        figure, "Highest and lowest mean values", ["points: mean over runs; lines: least to largest run"]
    )


def domain_spread(domains: Sequence[str], means: Mapping[str, NDArray[np.float64]]) -> Drawing:
    """Each run's mean value of a domain as a point, and the mean over runs as a line across."""
    styles = domain_styles(domains)
    figure = new_figure(6.4, 1.0 + 0.34 * len(domains))
    axes = figure.subplots()
    for place, name in enumerate(domains):
        found = means[name]
        axes.plot(found, np.full(found.size, place), "o", color=styles[name].colour, alpha=0.55, markersize=5)
        axes.plot([found.mean()] * 2, [place - 0.3, place + 0.3], color=styles[name].colour, linewidth=2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(domains)), [plain(shortened(name, 32)) for name in domains])
    axes.set_ylim(len(domains) - 0.5, -0.5)
    tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.ticklabel_format(axis="x", scilimits=(-2, 3))
    axes.set_xlabel("mean value of a domain's samples (nats)", fontsize=9)
    return Drawing(figure, "Domains over runs", ["a point for each run; lines: mean over runs"])


def domain_trajectories(table: pa.Table, domains: Sequence[str]) -> Drawing:
    """Cumulative mean value of each domain, the mean over runs with a band from the lowest run to the "
    "highest."""
    styles = domain_styles(domains)
    figure = new_figure(6.8, 4.0)
    axes = figure.subplots()
    rows = {name: table[name].to_numpy() for name in ("step", "mean")}
    run, domain = (table[name].to_numpy().astype(str) for name in ("run", "domain"))
    for name in domains:
        own = domain == name
        steps, lines = _by_run(rows["step"][own], rows["mean"][own], run[own])
        mean, low, high = lines.mean(axis=0), lines.min(axis=0), lines.max(axis=0)
        shown = thinned(mean, len(domains))
        colour = styles[name].colour
        axes.fill_between(steps[shown], low[shown], high[shown], color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            steps[shown],
            mean[shown],
            color=colour,
            linestyle=styles[name].line,
            linewidth=1.6,
            label=plain(name),
        )
    axes.axhline(0, color="black", linewidth=0.8)
    tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("cumulative mean value (nats)", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Drawing(
        figure,
        "Value by domain over training",
        ["mean over runs; shaded: from the lowest run to the highest"],
    )


def all_losses(runs: Mapping[str, Run]) -> Drawing:
    """Validation loss of every run; of many, all alike."""
    figure = new_figure(6.8, 3.6)
    axes = figure.subplots()
    many = len(runs) > _TOLD_APART
    styles = domain_styles(runs)
    for name, run in runs.items():
        series = run.series(VAL_LOSS)
        steps, loss = np.array(list(series)), np.array(list(series.values()))
        shown = thinned(loss, len(runs))
        if many:
            axes.plot(steps[shown], loss[shown], color=HELPS, alpha=0.4, linewidth=1)
        else:
            style = styles[name]
            axes.plot(
                steps[shown], loss[shown], color=style.colour, linestyle=style.line, linewidth=1.4,
                label=plain(shortened(name, 28)),
            )  # fmt: skip
    tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("validation loss (nats)", fontsize=9)
    if not many:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Drawing(figure, "Validation loss", [f"{len(runs)} runs"])


def contrasts(found: Sequence[Mapping[str, Any]], took: str) -> Drawing:
    """Ratios with their intervals, on a logarithmic axis, of what the target loss took, such as steps."""
    figure = new_figure(6.8, 1.1 + 0.36 * len(found))
    axes = figure.subplots()
    for place, one in enumerate(found):
        colour = HELPS if one["ratio"] < 1 else HARMS
        if one["low"] is not None and one["high"] is not None:
            axes.plot([one["low"], one["high"]], [place, place], color=colour, linewidth=1.8)
        axes.plot(one["ratio"], place, "o", color=colour, markersize=5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    labels = [
        plain(f"{shortened(str(one['group']), 24)} / {shortened(str(one['against']), 24)}") for one in found
    ]
    axes.set_yticks(range(len(found)), labels)
    axes.set_ylim(len(found) - 0.5, -0.5)
    tidy(axes)
    axes.grid(visible=False, axis="y")
    _plain_ratios(axes)
    axes.set_xlabel(f"ratio of {took} to the target loss", fontsize=9)
    title = f"{took.capitalize()} to the target loss, against each other"
    return Drawing(figure, title, [f"left of 1: fewer {took}; lines: intervals"])


def _colour_bar(figure: Figure, image: QuadMesh, axes: Axes) -> Colorbar:
    """What the colours mean, drawn in lines as the rest is: a picture in an SVG blurs in print."""
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    for mesh in bar.ax.findobj(QuadMesh):
        mesh.set(rasterized=False, edgecolor="face")
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return bar


def _rank_shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each value's rank from 0, the lowest, to 1, the highest."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable") / max(values.size - 1, 1)


def _plain_ratios(axes: Axes) -> None:
    """Ratios as one says them, a few of them: `0.5`, `0.8`, `1`."""
    low, high = axes.get_xlim()
    wanted = [r for r in (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10) if low <= r <= high]
    axes.set_xticks(wanted or [1.0])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _by_run(
    steps: NDArray[np.int64], means: NDArray[np.float64], runs: NDArray[np.str_]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All runs' steps `[S]`, and a line for each run over them `[R, S]`: what is cumulative stays until the
    run's next step, and begins at zero.
    """
    every = np.unique(steps)
    lines = []
    for name in np.unique(runs):
        own = runs == name
        order = np.argsort(steps[own], kind="stable")
        place = np.searchsorted(steps[own][order], every, side="right")
        lines.append(np.append(0.0, means[own][order])[place])
    return every, np.stack(lines)
