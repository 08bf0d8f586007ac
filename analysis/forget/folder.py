"""A run's directory, or a folder of an aggregate: tables of samples, and what was drawn from them."""

import logging
from collections.abc import Iterator, Set
from pathlib import Path

from analysis.distortion import plot_distortion
from analysis.errors import AnalysisError
from analysis.forget.artefact import Artefact, NamingFile
from analysis.forget.lists import CsvTable, JsonFile, JsonLines, TextList
from analysis.forget.scores import FOLDER, forget_scores, unnamed_rows
from analysis.forget.stores import SAMPLES
from analysis.forget.tables import ColumnTable, ParquetTable
from analysis.plots import plot_run

log = logging.getLogger(__name__)

PLOTS, DISTORTION = "plots", "distortion.json"

FILES: dict[str, type[NamingFile]] = {
    ".parquet": ParquetTable,
    ".csv": CsvTable,
    ".txt": TextList,
    ".json": JsonFile,
    ".jsonl": JsonLines,
}


def naming_file(path: Path) -> NamingFile | None:
    """The file as what names samples; None for a kind that does not."""
    if path.name == "values_by_column.parquet":
        return ColumnTable(path)
    kind = FILES.get(path.suffix)
    return None if kind is None else kind(path)


class Folder(Artefact):
    """The files right in a directory; with `samples.parquet` its score shards and figures too."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        found = (
            naming_file(file) for file in sorted(path.iterdir()) if file.is_file() and file.name[0] != "."
        )
        self.files = [file for file in found if file is not None]

    @property
    def inner(self) -> set[str]:
        """Names of the folders below it that it takes care of."""
        return {FOLDER, PLOTS} if self._is_run() else set()

    def names(self) -> set[str]:
        return set[str]().union(*(file.names() for file in self.files))

    def forget(self, ids: Set[str]) -> None:
        named = bool(self.names() & ids)
        if named:
            self._remove_figures()
        if self._is_run():
            forget_scores(self.path, ids)
        last = self.path / SAMPLES
        for file in self.files:
            if file.path != last:
                file.forget(ids)
        if named:
            self._draw()
        # What says whose the numbers are goes last: until then the same command finds all of the rest.
        for file in self.files:
            if file.path == last:
                file.forget(ids)

    def left(self, ids: Set[str]) -> Iterator[str]:
        for file in self.files:
            for what in file.left(ids):
                yield f"{what} in {file.path.name}"
        if self._is_run():
            yield from unnamed_rows(self.path)

    def _is_run(self) -> bool:
        return (self.path / SAMPLES).is_file()

    def _remove_figures(self) -> None:
        """They show ids in ways that cannot be searched for."""
        for figure in sorted((self.path / PLOTS).glob("*")):
            figure.unlink()

    def _draw(self) -> None:
        if (self.path / DISTORTION).is_file():
            plot_distortion(self.path / DISTORTION, self.path / PLOTS / "distortion.png")
        if self._is_run():
            try:
                plot_run(self.path)
            except AnalysisError as error:
                log.error("The figures are deleted and could not be drawn again: %s", error)
