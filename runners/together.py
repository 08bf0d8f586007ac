"""How the processes of a run end together: what made one of them fail is said once, and known to all."""

import json
import logging
import time
from dataclasses import asdict, dataclass
from types import TracebackType

import torch.distributed as dist

from conf.command import FAILED, MISTAKE, say
from conf.errors import UserError, first_line
from ghost.errors import GhostError
from runners.logs import log_file, quieten_console
from runners.world import World

log = logging.getLogger(__name__)

# How long to wait for the main process to say the same, and for another to say why it has gone.
SAME_SECONDS, REASON_SECONDS = 1.0, 5.0
_POLL_SECONDS = 0.05
_ARRIVED = "arrived"


class PeerFailedError(UserError):
    """Another process of the run has failed, so that this one cannot go on."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Failure:
    """Why a process has ended.

    Attributes:
        text: In one line.
        exit_code: What it ends with.
    """

    text: str
    exit_code: int


class EndingTogether:
    """A context manager around what all processes do: if one of them fails, the others say which.

    A process left by another raises `PeerFailedError`, in place of what its broken exchange raised, with the
    other's exit code. What the main process says too, no other says on the console again.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        store = self._world.store
        if error is None or store is None or isinstance(error, PeerFailedError):
            return
        if _is_broken_exchange(error):
            raise self._left_by_another(store) from error
        note_failure(store, self._world.rank, Failure(_summary(error), _exit_code(error)))
        if not self._world.is_main and main_says(store, _summary(error)):
            quieten_console()

    def _left_by_another(self, store: dist.Store) -> PeerFailedError:
        found = self._first_failure(store)
        if found is None:
            return PeerFailedError(
                f"Another process of the run has ended without a word: look at all of {log_file(0)} and "
                f"{log_file(1)} to {log_file(self._world.world_size - 1)}.",
                FAILED,
            )
        rank, failure = found
        if not self._world.is_main:
            quieten_console()  # the main process says it
        return peer_failed(rank, failure)

    def _first_failure(self, store: dist.Store) -> tuple[int, Failure] | None:
        """The lowest rank that has noted a failure, and the note; None where none has in a while."""
        end = time.monotonic() + REASON_SECONDS
        while time.monotonic() < end:
            for rank in range(self._world.world_size):
                failure = read_failure(store, rank)
                if failure is not None:
                    return rank, failure
            time.sleep(_POLL_SECONDS)
        return None


def wait_for_all(world: World) -> None:
    """Let the main process wait until all have come here, however long it takes; the others go on.

    Raises:
        PeerFailedError: One of them has failed.
    """
    if world.store is None:
        return
    world.store.add(_ARRIVED, 1)
    while world.is_main and world.store.add(_ARRIVED, 0) < world.world_size:
        for rank in range(1, world.world_size):
            if (failure := read_failure(world.store, rank)) is not None:
                raise peer_failed(rank, failure)
        time.sleep(_POLL_SECONDS)


def peer_failed(rank: int, failure: Failure) -> PeerFailedError:
    """The error for a process that cannot go on without another."""
    return PeerFailedError(f"Rank {rank} has failed, see {log_file(rank)}: {failure.text}", failure.exit_code)


def note_failure(store: dist.Store, rank: int, failure: Failure) -> None:
    """Leave word for the other processes."""
    try:
        store.set(f"failure/{rank}", json.dumps(asdict(failure)))
    except dist.DistError:  # the process that kept the store has ended first
        log.debug("no note could be left for the other processes")


def read_failure(store: dist.Store, rank: int) -> Failure | None:
    """The word that a process has left, if it has."""
    try:
        if store.check([f"failure/{rank}"]):
            return Failure(**json.loads(store.get(f"failure/{rank}")))
    except dist.DistError:
        log.debug("the notes of the other processes cannot be read")
    return None


def main_says(store: dist.Store, text: str) -> bool:
    """Whether the main process ends with these words, now or in a moment."""
    end = time.monotonic() + SAME_SECONDS
    while time.monotonic() < end:
        failure = read_failure(store, 0)
        if failure is not None:
            return failure.text == text
        time.sleep(_POLL_SECONDS)
    return False


def say_once(world: World, line: str) -> None:
    """Write a line that ends the run to stderr, but not a second time what the main process says."""
    if world.store is None or world.is_main:
        if world.store is not None:
            note_failure(world.store, world.rank, Failure(line, MISTAKE))
        say(line)
    elif not main_says(world.store, line):
        say(f"rank {world.rank}: {line}")


def _summary(error: BaseException) -> str:
    text = first_line(error)
    return text if isinstance(error, UserError | GhostError) else f"{type(error).__name__}: {text}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return MISTAKE if isinstance(error, UserError | GhostError) else FAILED


def _is_broken_exchange(error: BaseException) -> bool:
    """Whether torch.distributed raised this because a process on the other side has gone, or answers no
    more.
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
