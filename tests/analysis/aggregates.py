"""The folder of an aggregate, as the command writes it."""

from collections.abc import Sequence
from pathlib import Path

from analysis.aggregate.tables import write_aggregate
from tests.analysis.synthetic import tables_of


def build_aggregate(folder: Path, runs: Sequence[Path]) -> Path:
    """Write the folder of these runs, whose names are their directories'."""
    write_aggregate({name: [table] for name, table in tables_of(*runs).items()}, folder)
    return folder
