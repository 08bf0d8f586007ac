"""What is said where a run ends early: one sentence about a disk that takes no more, and how to go on."""

import errno
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from conf.errors import UserError
from runners.resume.files import folders
from runners.summary import replay_command

log = logging.getLogger(__name__)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = _FULL | {errno.EROFS}


class DiskError(UserError):
    """The system does not take what a run has to write."""


@contextmanager
def disk_errors_named(out: Path) -> Iterator[None]:
    """Raises `DiskError`, one sentence, in place of an `OSError` about what cannot be written to the run
    directory.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in _REFUSED:
            raise
        what = error.filename or f"a file of {out}"
        cure = "make room there" if error.errno in _FULL else "make it writable"
        raise DiskError(
            f"{what} cannot be written ({os.strerror(error.errno)}): {cure}; what was written before is whole"
        ) from error


@contextmanager
def way_on_said(out: Path, command: Sequence[str] = ("python",)) -> Iterator[None]:
    """Say, where the block ends early and the run has a checkpoint, what to type to go on behind it."""
    try:
        yield
    except BaseException:
        if newest := folders(out):
            step, _ = newest[0]
            typed = replay_command([f"resume={out}"], _script(), command)
            log.error("The run has ended early, with a checkpoint at step %d. Go on with: %s", step, typed)
        raise


def _script() -> str:
    """What was typed; a scheduler's job is started by a program of its own."""
    return sys.argv[0] if Path(sys.argv[0]).name == "run.py" else "run.py"
