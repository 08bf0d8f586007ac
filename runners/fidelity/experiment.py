"""What an experiment is: points, and how one of them is measured.

A metric is named `measure/method`, such as `spearman/first_order` or `auroc/knn_shapley`, or by its measure
alone where no method is in question (`spread`): pages have a column for each measure and a row for each
method.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Coordinate = str | int | float


@dataclass(frozen=True)
class Point(Mapping[str, Coordinate]):
    """What one measurement differs in from the others: a frozen mapping, `seed` among its names.

    Experiments whose points differ in nothing but `seed` are repetitions, over which means and intervals are.
    """

    coordinates: tuple[tuple[str, Coordinate], ...]

    @classmethod
    def at(cls, *, seed: int, **coordinates: Coordinate) -> "Point":
        """The point of these coordinates, the seed last."""
        return cls((*coordinates.items(), ("seed", seed)))

    @property
    def seed(self) -> int:
        """The repetition, from which all random numbers of the point are drawn."""
        return int(self["seed"])

    @property
    def name(self) -> str:
        """Words as they are and numbers behind their names: `adamw-lr0.001-seed3`."""
        return "-".join(
            value if isinstance(value, str) else f"{key}{value}" for key, value in self.coordinates
        )

    def __getitem__(self, name: str) -> Coordinate:
        return dict(self.coordinates)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.coordinates))

    def __len__(self) -> int:
        return len(self.coordinates)


@dataclass(frozen=True)
class Measured:
    """What a point gave.

    Attributes:
        metrics: Finite numbers by name, `measure/method`.
        tables: Columns of one length by name, by name of the table: kept as `<table>.parquet` and uploaded.
            No texts and no tokens.
        facts: What it was measured on, such as `data.fingerprint`: kept beside the numbers, and tags of the
            point's MLflow run.
        course: Numbers of the way there, by step and name, the same names at each step: metrics `course/NAME`
            of the point's MLflow run, with their steps.
    """

    metrics: Mapping[str, float]
    tables: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    course: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


class Experiment(Protocol):
    """Made of its settings and a device (`registry.Kind.make`), which raises `ConfigError` for settings that
    cannot work and loads nothing: the command makes one to ask for the points, and one for each point.
    """

    def points(self) -> list[Point]:
        """All points, in the order in which they are measured; each name occurs once."""
        ...

    def measure(self, point: Point, folder: Path) -> Measured:
        """Measure one point: the same numbers whenever, and in whatever process.

        Args:
            point: One of `points()`.
            folder: A directory of the point's own, for files on the way; they stay on disk and are uploaded
                with the run.

        Raises:
            ConfigError, DataError, GhostError: The settings do not fit the data.
        """
        ...
