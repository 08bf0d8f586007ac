"""An experiment's figures: its methods side by side at each place, and courses, both with intervals."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.compare.contrasts import interval_of_mean
from analysis.fidelity.presentations import STEP, Course
from analysis.fidelity.summary import SEED, Measurement, Row
from analysis.figures import domain_styles, new_figure, plain, tidy
from ghost.atomic import written_beside

_WIDTH, _HEIGHT = 7.6, 3.2  # inches a panel


def draw(rows: Sequence[Row], measures: Sequence[str]) -> Figure:
    """A panel for each measure: places from left to right, methods as colours; of a single place the methods
    from left to right.
    """
    figure = new_figure(_WIDTH, _HEIGHT * len(measures))
    panels = figure.subplots(len(measures), 1, squeeze=False)[:, 0]
    for axes, measure in zip(panels, measures, strict=True):
        shown = [row for row in rows if measure in row.estimates]
        places = list(dict.fromkeys(place_name(row) for row in shown))
        if len(places) > 1:
            _by_place(axes, shown, measure, places)
        else:
            _by_method(axes, shown, measure)
        axes.set_ylabel(plain(measure.replace("_", " ")), fontsize=9)
        tidy(axes)
    return figure


def draw_course(measurements: Sequence[Measurement], course: Course) -> Figure:
    """What happens on the way, a line for each place and a panel for each thing that it is drawn over.

    A line is the mean over seeds, and a band its 95 % interval, at the steps that all seeds of a place have;
    what it is drawn over is the mean there too.
    """
    places: dict[str, list[Mapping[str, Mapping[int, float]]]] = defaultdict(list)
    for one in measurements:
        places[place_name(one)].append(one.course)
    styles = domain_styles(places)
    figure = new_figure(_WIDTH, _HEIGHT * len(course.over))
    panels = figure.subplots(len(course.over), 1, squeeze=False)[:, 0]
    for axes, over in zip(panels, course.over, strict=True):
        for place, courses in places.items():
            _line(axes, courses, over, course.shown, styles[place].colour, plain(place))
        axes.set_xlabel(plain(over.replace("_", " ")), fontsize=9)
        axes.set_ylabel(plain(course.shown.replace("_", " ")), fontsize=9)
        tidy(axes)
    panels[0].legend(fontsize=7, frameon=False, ncols=3)
    return figure


def _line(
    axes: Axes, courses: Sequence[Mapping[str, Mapping[int, float]]], over: str, shown: str, colour: str,
    label: str,
) -> None:  # fmt: skip
    steps = sorted(set.intersection(*(set(one[shown]) for one in courses)))
    across = [
        step if over == STEP else sum(one[over][step] for one in courses) / len(courses) for step in steps
    ]
    found = [interval_of_mean([one[shown][step] for one in courses]) for step in steps]
    axes.plot(across, [one.mean for one in found], color=colour, linewidth=1.2, label=label)
    bounds = [
        (one.mean, one.mean) if one.low is None or one.high is None else (one.low, one.high) for one in found
    ]
    axes.fill_between(
        across,
        [low for low, _ in bounds],
        [high for _, high in bounds],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )


def place_name(at: Row | Measurement) -> str:
    """Its coordinates but for the seed in one word: `adamw 0.005`."""
    return " ".join(text for name, text in at.coordinates.items() if name != SEED)


def _by_place(axes: Axes, rows: Sequence[Row], measure: str, places: Sequence[str]) -> None:
    methods = list(dict.fromkeys(row.method for row in rows))
    styles = domain_styles(methods)
    for i, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        shift = 0.7 * ((i + 0.5) / len(methods) - 0.5)  # side by side about the place's middle
        at = [places.index(place_name(row)) + shift for row in own]
        style = styles[method]
        _points(axes, at, own, measure, style.colour, style.marker, plain(method.replace("_", " ")))
    axes.set_xticks(range(len(places)), [plain(place) for place in places])
    axes.legend(fontsize=7, frameon=False, ncols=3)


def _by_method(axes: Axes, rows: Sequence[Row], measure: str) -> None:
    _points(axes, list(range(len(rows))), rows, measure, "#0072B2", "o", None)
    axes.set_xticks(range(len(rows)), [plain(row.method.replace("_", "\n")) for row in rows])


def _points(
    axes: Axes, at: Sequence[float], rows: Sequence[Row], measure: str, colour: str, marker: str,
    label: str | None,
) -> None:  # fmt: skip
    found = [row.estimates[measure] for row in rows]
    halves = [0.0 if one.high is None else one.high - one.mean for one in found]
    axes.errorbar(
        at, [one.mean for one in found], halves, fmt=marker, color=colour, markersize=4, elinewidth=1,
        capsize=2, label=label,
    )  # fmt: skip


def save_svg(figure: Figure, path: Path) -> Path:
    """Write the figure as SVG, the same bytes each time, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}), written_beside(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
    return path
