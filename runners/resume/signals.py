"""Signals that ask a run to end: noted until its state is safe, or answered at once."""

import logging
import signal
import threading
from collections.abc import Callable, Mapping
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
        _give_back(self._previous)

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


class ExitOnSignal:
    """A context in which SIGTERM raises SystemExit(143), the status that shells give to what signal 15 ended;
    so do SIGUSR1 and SIGUSR2 where no scheduler's handler takes them. Only the main thread gets signals.

    Attributes:
        end: What was raised; None while no signal has come. A library that it is raised in may put an error
            of its own in its place, from a clean-up that it interrupted.
    """

    def __init__(self) -> None:
        self.end: SystemExit | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            idle = [n for n in (signal.SIGUSR1, signal.SIGUSR2) if signal.getsignal(n) is signal.SIG_DFL]
            self._previous = {n: signal.signal(n, self._exit) for n in (signal.SIGTERM, *idle)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _give_back(self._previous)

    def _exit(self, number: int, frame: FrameType | None) -> None:
        # A second signal must not interrupt the ending that this one starts.
        signal.signal(number, signal.SIG_IGN)
        self.end = SystemExit(128 + number)
        raise self.end


def _give_back(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler or signal.SIG_DFL)
