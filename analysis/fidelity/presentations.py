"""What is particular to an experiment on the page: the measures that are drawn, and what was published."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from analysis.fidelity.differences import METHOD
from analysis.fidelity.summary import Row


@dataclass(frozen=True)
class Published:
    """A published figure, and the cells that it stands beside.

    Attributes:
        figure: In words.
        measure, methods: Whose it is.
        coordinates: Where it was measured; others do not matter.
    """

    figure: str
    measure: str
    methods: tuple[str, ...]
    coordinates: Mapping[str, str] = field(default_factory=dict)

    def is_of(self, row: Row, measure: str) -> bool:
        """Whether it stands beside this cell."""
        same_place = all(row.coordinates.get(name) == text for name, text in self.coordinates.items())
        return same_place and measure == self.measure and row.method in self.methods


STEP = "step"
"""The step itself, of a course."""


@dataclass(frozen=True)
class Course:
    """A figure of what happens on the way.

    Attributes:
        shown: What is drawn, by its name in the points' courses.
        over: What it is drawn over, a panel each: names in the courses too, or `STEP`.
    """

    shown: str
    over: tuple[str, ...]


@dataclass(frozen=True)
class Presentation:
    """How an experiment is shown.

    Attributes:
        drawn: Measures of its figure; empty: no figure.
        reference: What the row that others are held against has in the place of their own: a `method`, or a
            coordinate; None: no differences.
        compared: Measures of these differences; empty: those of the figure.
        published: Figures beside the measured ones.
        course: Its figure of what happens on the way; None: no such figure.
    """

    drawn: tuple[str, ...]
    reference: Mapping[str, str] | None = None
    compared: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()
    course: Course | None = None


_VALUES = ("first_order", "second_order")
_FIRST_ORDER = {METHOD: "first_order"}
_DROPPING = (
    Published("0.16", "negative_share", ("first_order",)),
    Published("0.25", "iterations_saved", ("first_order",)),
)

PRESENTATIONS: dict[str, Presentation] = {
    "one_step": Presentation(
        drawn=("spearman",),
        reference=_FIRST_ORDER,
        published=(
            Published("3e-4", "rmse", _VALUES, {"lr": "0.0003"}),
            Published("0.99", "spearman", _VALUES, {"lr": "0.0006"}),
            Published("0.79", "spearman", _VALUES, {"lr": "0.005"}),
        ),
    ),
    "mislabel": Presentation(
        drawn=("auroc",),
        reference=_FIRST_ORDER,
        published=(
            Published("0.678", "auroc", ("first_order",)),
            Published("0.680", "auroc", ("second_order",)),
            Published("0.76", "auroc", ("knn_shapley",)),
        ),
    ),
    "text": Presentation(drawn=("bad_in_lowest",), reference=_FIRST_ORDER, published=_DROPPING),
    "dropping": Presentation(drawn=("iterations_saved",), reference=_FIRST_ORDER, published=_DROPPING),
    "domains": Presentation(drawn=("own_highest", "own_highest_last"), reference=_FIRST_ORDER),
    "lds": Presentation(drawn=("lds", "lds_of_mean"), reference=_FIRST_ORDER),
    "selection": Presentation(
        drawn=(),
        reference={"policy": "uniform"},
        compared=("test_loss", "loss_at_budget"),
        course=Course("test_loss", (STEP, "rows", "seconds")),
    ),
}
