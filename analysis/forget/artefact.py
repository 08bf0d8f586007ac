"""What names samples on disk, and how it is rid of some of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Set
from pathlib import Path

from analysis.errors import AnalysisError
from ghost.atomic import written_beside


class Artefact(ABC):
    """A file or a folder that names samples by their ids. Every method raises `AnalysisError`, or a store's
    `StoreError`, for what is damaged or refused by the system.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def names(self) -> set[str]:
        """The ids in it."""

    @abstractmethod
    def forget(self, ids: Set[str]) -> None:
        """Remove what is of these samples; of the others nothing changes. A call that was killed can be
        repeated, and one for ids that are not in it changes nothing.
        """

    def left(self, ids: Set[str]) -> Iterator[str]:
        """What is still there of these samples, a clause each."""
        for name in sorted(self.names() & ids):
            yield f"names {name!r}"


class NamingFile(Artefact):
    """One file that is rewritten whole."""

    def forget(self, ids: Set[str]) -> None:
        if self.names() & ids:
            self._rewrite(ids)
        clear_partials(self.path)

    @abstractmethod
    def _rewrite(self, ids: Set[str]) -> None:
        """Replace the file, atomically."""


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file anew beside its place and put it there.

    Raises:
        AnalysisError: The system refuses.
    """
    try:
        with written_beside(path) as partial:
            write(partial)
    except OSError as error:
        raise AnalysisError(
            f"{path} cannot be written ({error.strerror or error}) and still names deleted samples: make "
            "room, or make it writable, and type the same command again."
        ) from error


def clear_partials(path: Path) -> None:
    """Remove what killed writers of the file have left beside it."""
    for pattern in (f".{path.name}.partial", f".{path.name}.*.partial"):
        for partial in path.parent.glob(pattern):
            partial.unlink(missing_ok=True)
