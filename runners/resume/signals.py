"""Signals that ask a run to end: noted while it works, and answered once its state is safe."""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)

# Those that schedulers send ahead of the end come first: their handlers may put the job back in the queue.
SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)


class StopSignals:
    """A context in which SIGTERM, SIGUSR1 and SIGUSR2 are noted and change nothing else.

    Only the main thread gets signals; in another nothing is ever noted.
    """

    def __init__(self) -> None:
        self._noted: set[signal.Signals] = set()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    @property
    def noted(self) -> bool:
        """Whether one has come."""
        return bool(self._noted)

    def end(self) -> None:
        """Answer what was noted: call the handler that the signal had before, which for a scheduler's puts
        the job back in the queue and ends it; where there was none, end with `128 + number`, the status that
        shells give to what a signal ended.
        """
        # Of several ranks one may have been told and not this one.
        number = next((number for number in SIGNALS if number in self._noted), signal.SIGTERM)
        log.warning("Ending on %s.", number.name)
        handler: Callable[[int, FrameType | None], object] | Any = self._previous.get(number)
        if callable(handler):
            handler(number, None)
        raise SystemExit(128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.add(signal.Signals(number))
