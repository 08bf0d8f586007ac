"""The thread that brings an MLflow run up to date while the training goes on."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from analysis.tracking_store import one_line

log = logging.getLogger(__name__)

_INTERVAL = 5.0  # seconds from one look at what there is to send to the next
_RETRY_SECONDS = 15.0  # the same after a failure
_LAST_RETRY_SECONDS = 2.0  # the same at the run's end
_PATIENCE = 20.0  # seconds for which the run's end waits for a store that fails


@dataclass(frozen=True)
class Operation:
    """Something that the store is to take; `send` may be called again after an error."""

    what: str
    send: Callable[[], None]


class Sender:
    """Sends from a thread of its own, and again what the store did not take.

    No store, however slow or dead, holds up whoever adds: a try against a server that is gone can cost a
    minute. Only `drain` waits.
    """

    def __init__(self, standing: Operation) -> None:
        """Prepare; the thread starts with `start` or the first `add`.

        Args:
            standing: What is done before everything else, every few seconds.
        """
        self._standing = standing
        self._waiting: deque[Operation] = deque()
        self._left: list[str] = []  # what the latest round did not get sent
        self._wake = threading.Event()
        self._closing_since: float | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, where it is not going."""
        if self._thread is None:
            self._closing_since = None
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def add(self, what: str, send: Callable[[], None]) -> None:
        """Have something sent, after all that was added before."""
        self._waiting.append(Operation(what, send))
        self.start()

    def drain(self) -> list[str]:
        """Send what waits; returns the names of what the store did not take, after some patience."""
        self.start()
        thread = self._thread
        self._closing_since = time.monotonic()
        self._wake.set()
        if thread is not None:
            thread.join()
        self._thread = None
        return self._left

    def _work(self) -> None:
        while True:
            self._wake.wait(self._pause())
            self._wake.clear()
            # Looked at before the round: what was added by then is in it.
            closing = self._closing_since is not None
            self._round()
            if closing and (not self._left or self._is_overdue()):
                return

    def _pause(self) -> float:
        if not self._left:
            return _INTERVAL
        return _RETRY_SECONDS if self._closing_since is None else _LAST_RETRY_SECONDS

    def _is_overdue(self) -> bool:
        return self._closing_since is not None and time.monotonic() > self._closing_since + _PATIENCE

    def _round(self) -> None:
        """Try everything once, in order."""
        from mlflow.exceptions import MlflowException

        failed_before = bool(self._left)
        operations = [self._waiting.popleft() for _ in range(len(self._waiting))]
        # Should an unforeseen error end this thread, then `drain` still says what is missing.
        self._left = [operation.what for operation in (self._standing, *operations)]
        unsent: list[Operation] = []
        reason: MlflowException | OSError | None = None
        for operation in (self._standing, *operations):
            if reason is not None and self._is_overdue():
                unsent.append(operation)
                continue
            try:
                operation.send()
            except (MlflowException, OSError) as error:
                reason = reason or error
                unsent.append(operation)
        self._waiting.extendleft(
            operation for operation in reversed(unsent) if operation is not self._standing
        )
        self._left = [operation.what for operation in unsent]
        if reason is not None and not failed_before:
            log.warning(
                "the tracking store did not take %s (%s); it is tried again, the run goes on, and nothing is "
                "lost: all is in the run directory",
                unsent[0].what,
                one_line(reason),
            )
        elif failed_before and reason is None:
            log.info("the tracking store answers again, and has all that waited")
