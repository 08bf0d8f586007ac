"""The four figures of a run: how values are spread, whose they are, when they arise, and the losses."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from analysis.domains import domain_trajectories
from analysis.errors import AnalysisError
from analysis.figures import (
    HARMS,
    HELPS,
    Drawing,
    domain_styles,
    new_figure,
    plain,
    save,
    shortened,
    thinned,
    tidy,
)
from analysis.runs import Run, load_run, score_note

log = logging.getLogger(__name__)

TRAIN_LOSS, VAL_LOSS, TEST_LOSS = "train/loss", "val/loss", "test/loss"

_VALUE = "value: fall in validation loss (nats)"
_SHOWN_DOMAINS = 8
_SHOWN_SAMPLES = 10  # at either end
_TOLD_APART = 14  # domains with a line of their own; of more, the others are grey
_ID_WIDTH, _LEGEND_WIDTH = 48, 28  # characters
_GREY = "#999999"
_BINS = 48
_HEAVY_TAIL = 30.0  # largest value over the median one, from which a linear axis shows one bar and a void
_FEW_POINTS = 30  # steps; up to here each gets a marker
_SMOOTHED_FROM = 60  # steps


def plot_run(run_dir: Path) -> list[Path]:
    """Draw what a run's files allow into its `plots/` and return the paths; what is left out is logged.

    Raises:
        AnalysisError: the directory holds no run, or one of its files is damaged.
    """
    run = load_run(run_dir)
    plots = run.directory / "plots"
    drawn = []
    if (run.directory / "values.parquet").is_file() and _finite_values(run)[0].size:
        drawn.append(save(value_histogram(run), plots / "value_histogram.png"))
        drawn.append(save(top_bottom(run), plots / "top_bottom.png"))
        drawn.append(save(domain_value(run), plots / "domain_value.png"))
    else:
        log.info("%s has no values: at most its losses are drawn", run.directory)
    if (run.directory / "metrics.jsonl").is_file() and (run.series(TRAIN_LOSS) or run.series(VAL_LOSS)):
        drawn.append(save(losses(run), plots / "loss.png"))
    else:
        log.info("%s logged neither %s nor %s: loss.png is not drawn", run.directory, TRAIN_LOSS, VAL_LOSS)
    return drawn


def value_histogram(run: Run) -> Drawing:
    """One histogram for each domain over a common axis, coloured by sign; symmetric-log for heavy tails."""
    values, domains = _finite_values(run)
    panels = _panels(domains)
    figure = new_figure(6.4, 1.4 + 0.85 * len(panels))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    threshold = _linear_threshold(values)
    if threshold is not None:
        grid[0].set_xscale("symlog", linthresh=threshold)
    edges = _edges(values, grid[0])
    for axes, (label, members) in zip(grid, panels.items(), strict=True):
        _draw_histogram(axes, values[np.isin(domains, members)], edges, label)
    if threshold is None:
        grid[-1].ticklabel_format(axis="x", scilimits=(-2, 3))
    else:
        _mark_decades(grid[-1], threshold, float(np.abs(values).max()))
    grid[-1].set_xlabel(_VALUE, fontsize=9)
    figure.supylabel("samples", fontsize=9)
    scale = [] if threshold is None else [f"axis linear within ±{threshold:.0e}, logarithmic beyond"]
    return Drawing(figure, "Values of the training samples", [score_note(run.config), *scale])


def top_bottom(run: Run) -> Drawing:
    """The samples of highest and of lowest value as bars, named by id and coloured by domain."""
    values, domains, ids = *_finite_values(run), _finite_ids(run)
    order = np.argsort(-values, kind="stable")
    if order.size > 2 * _SHOWN_SAMPLES:
        order = np.concatenate([order[:_SHOWN_SAMPLES], order[-_SHOWN_SAMPLES:]])
    styles = domain_styles(domains.tolist())
    figure = new_figure(7.2, 1.6 + 0.22 * order.size)
    axes = figure.subplots()
    rows = np.arange(order.size)
    for row, value, domain in zip(rows, values[order], domains[order], strict=True):
        style = styles[domain]
        axes.barh(row, value, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0)
    axes.set_yticks(rows, [plain(shortened(name, _ID_WIDTH)) for name in ids[order]])
    axes.set_ylim(order.size - 0.4, -0.6)  # the highest value on top
    tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.ticklabel_format(axis="x", scilimits=(-2, 3))
    axes.axvline(0, color="black", linewidth=0.8)
    if values.size > order.size:
        axes.axhline(_SHOWN_SAMPLES - 0.5, color="#666666", linewidth=0.8, linestyle=":")
    axes.set_xlabel(_VALUE, fontsize=9)
    patches = [
        Patch(facecolor=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0, label=plain(domain))
        for domain, style in styles.items()
        if domain in domains[order]
    ]
    _legend_beside(axes, patches)
    shown = f"{order.size} of {values.size} samples, highest value first"
    return Drawing(figure, "Highest and lowest values", [shown, score_note(run.config)])


def domain_value(run: Run) -> Drawing:
    """Each domain's mean value as it builds up over the steps."""
    trajectories = domain_trajectories(run)
    steps, names, means = trajectories.steps, trajectories.domains, trajectories.means
    if not steps.size:
        raise AnalysisError(f"{run.directory}/scores has no finite score: there is nothing to draw.")
    styles = domain_styles(names)
    figure = new_figure(6.8, 4.0)
    axes = figure.subplots()
    marker = "o" if steps.size <= _FEW_POINTS else None
    largest = np.argsort(-np.abs(means[-1]), kind="stable")
    named = []
    for column in sorted(largest[:_TOLD_APART], key=lambda column: -means[-1, column]):
        style, shown = styles[names[column]], thinned(means[:, column], len(names))
        named += axes.plot(
            steps[shown], means[shown, column], color=style.colour, linestyle=style.line, linewidth=1.6,
            marker=marker, markersize=3, label=plain(shortened(names[column], _LEGEND_WIDTH)),
        )  # fmt: skip
    for rank, column in enumerate(largest[_TOLD_APART:]):
        shown = thinned(means[:, column], len(names))
        (line,) = axes.plot(steps[shown], means[shown, column], color=_GREY, linewidth=0.5, zorder=1)
        if rank == 0:
            line.set_label(f"{len(names) - _TOLD_APART} other domains")
            named.append(line)
    axes.axhline(0, color="black", linewidth=0.8)
    tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("cumulative mean value (nats)", fontsize=9)
    _legend_beside(axes, named)
    reading = "mean over a domain's scored samples of the fall in validation loss credited up to a step"
    return Drawing(figure, "Value by domain over training", [reading, score_note(run.config)])


def losses(run: Run) -> Drawing:
    """Training and validation loss over the steps; of a long run the training loss with a running mean."""
    train, val = run.series(TRAIN_LOSS), run.series(VAL_LOSS)
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    steps, loss = np.array(list(train)), np.array(list(train.values()))
    few = "o" if steps.size <= _FEW_POINTS else None
    if steps.size >= _SMOOTHED_FROM:
        window = steps.size // 20
        shown = thinned(loss)
        axes.plot(steps[shown], loss[shown], color=HELPS, alpha=0.3, linewidth=0.8)
        smooth, ends = np.convolve(loss, np.full(window, 1 / window), mode="valid"), steps[window - 1 :]
        shown = thinned(smooth)
        axes.plot(ends[shown], smooth[shown], color=HELPS, label=f"train, mean of {window} steps")
    elif steps.size:
        axes.plot(steps, loss, color=HELPS, linewidth=1.4, marker=few, markersize=3, label="train")
    for held_out, label, line, look in (
        (val, "validation", "--", "s"), (run.series(TEST_LOSS), "test", ":", "^")
    ):  # fmt: skip
        if held_out:
            steps, loss = np.array(list(held_out)), np.array(list(held_out.values()))
            shown, few = thinned(loss), look if steps.size <= _FEW_POINTS else None
            axes.plot(
                steps[shown], loss[shown],
                color=HARMS, linewidth=1.4, linestyle=line, marker=few, markersize=4, label=label,
            )  # fmt: skip
    tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("loss (nats)", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    title = "Training, validation and test loss" if run.series(TEST_LOSS) else "Training and validation loss"
    return Drawing(figure, title, [])


def _finite_values(run: Run) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Values `[n]` and domains `[n]`, without samples whose value is not finite."""
    table = run.values.filter(pc.is_finite(run.values["value"]))
    return table["value"].to_numpy(), table["domain"].to_numpy().astype(str)


def _finite_ids(run: Run) -> NDArray[np.str_]:
    """Sample ids `[n]`, in step with `_finite_values`."""
    table = run.values.filter(pc.is_finite(run.values["value"]))
    return table["sample_id"].to_numpy().astype(str)


def _panels(domains: NDArray[np.str_]) -> dict[str, list[str]]:
    """The domains behind each panel's label: the largest ones alone, the rest together."""
    names, counts = np.unique(domains, return_counts=True)
    if names.size <= _SHOWN_DOMAINS:
        return {name: [name] for name in names.tolist()}
    order = np.argsort(-counts, kind="stable")
    alone, rest = names[order[: _SHOWN_DOMAINS - 1]], names[order[_SHOWN_DOMAINS - 1 :]]
    panels = {name: [name] for name in sorted(alone.tolist())}
    return panels | {f"{rest.size} other domains": rest.tolist()}


def _draw_histogram(axes: Axes, values: NDArray[np.float64], edges: NDArray[np.float64], label: str) -> None:
    counts, _ = np.histogram(values, edges)
    colours = [HARMS if right <= 0 else HELPS for right in edges[1:]]
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours)
    axes.axvline(0, color="black", linewidth=0.8)
    tidy(axes)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    negative = 100 * float((values < 0).mean())
    numbers = f"{values.size} samples, {negative:.0f} % negative, mean {values.mean():+.2e}"
    text = f"{shortened(label, _LEGEND_WIDTH)}: {numbers}"
    axes.set_title(plain(text), fontsize=8, loc="left", pad=3)


def _legend_beside(axes: Axes, handles: Sequence[Artist]) -> None:
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _linear_threshold(values: NDArray[np.float64]) -> float | None:
    """Where a symmetric-log axis should turn linear; None where a linear axis shows the values well."""
    sizes = np.abs(values[values != 0])
    if sizes.size == 0 or sizes.max() < _HEAVY_TAIL * np.median(sizes):
        return None
    # A power of ten, so that the ticks beyond it are decades.
    return float(10.0 ** np.floor(np.log10(np.median(sizes))))


def _edges(values: NDArray[np.float64], axes: Axes) -> NDArray[np.float64]:
    """Bin edges that look equally wide on the axis; zero is one, so that no bar mixes signs."""
    to_axis = axes.xaxis.get_transform()
    low, high = to_axis.transform(np.array([min(values.min(), 0.0), max(values.max(), 0.0)]))
    width = (high - low) / _BINS or 1.0  # all values zero: two bars around zero
    # One more bin on the right, since a value on an edge counts to the bin that begins there.
    positions = np.arange(np.floor(low / width), np.floor(high / width) + 2)
    return to_axis.inverted().transform(positions * width)


def _mark_decades(axes: Axes, threshold: float, largest: float) -> None:
    """At most three powers of ten on each side of zero: the default ticks run into each other there."""
    first, last = round(np.log10(threshold)), int(np.ceil(np.log10(largest)))
    exponents = range(first, last + 1)[:: max(1, -(-(last - first + 1) // 3))]
    ticks = [-(10.0**e) for e in reversed(exponents)] + [0.0] + [10.0**e for e in exponents]
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value else "0"))
