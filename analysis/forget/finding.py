"""Everything below given paths that names samples."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from analysis.errors import AnalysisError
from analysis.forget.artefact import Artefact
from analysis.forget.folder import FILES, Folder, naming_file
from analysis.forget.stores import Store, is_store
from analysis.report.page import is_page


def find_artefacts(paths: Iterable[Path]) -> list[Artefact]:
    """The artefacts at and below the paths, each once.

    Raises:
        AnalysisError: A path is not there, or a file of a kind that names no samples.
    """
    found: dict[Path, Artefact] = {}
    for path in paths:
        for artefact in _at(path.absolute()):
            found.setdefault(artefact.path.resolve(), artefact)
    return list(found.values())


def find_pages(paths: Iterable[Path]) -> list[Path]:
    """The reports that `analysis.report` wrote at and below the paths, each once; no other HTML files."""
    below = (page for path in paths for page in path.absolute().rglob("*.html"))
    own = {page.resolve() for page in below if page.is_file() and not page.is_symlink()}
    return sorted(page for page in own if is_page(page))


def _at(path: Path) -> Iterator[Artefact]:
    if path.is_dir():
        yield from _below(path)
        return
    if not path.is_file():
        raise AnalysisError(f"{path} is not there: give run directories, stores, folders of those, or lists.")
    file = naming_file(path)
    if file is None:
        raise AnalysisError(f"{path} is no list of samples: those end in {', '.join(FILES)}.")
    yield file


def _below(folder: Path) -> Iterator[Artefact]:
    if is_store(folder):
        yield Store(folder)
        return
    if any(folder.glob("*.safetensors")):  # saved weights: a line of their vocabulary may look like an id
        return
    own = Folder(folder)
    if own.files:
        yield own
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and child.name not in own.inner:
            yield from _below(child)
