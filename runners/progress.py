"""The one line that shows how a run is doing: a bar on a terminal, a log line now and then elsewhere."""

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

log = logging.getLogger(__name__)

_WARM_UP = 2  # steps that allocate and cache; a rate with them in it misleads for minutes
_REPORTS = 10  # log lines of a whole run where there is no terminal


@dataclass(frozen=True)
class Status:
    """What the line shows. Losses as the run reports them; memory in bytes."""

    step: int
    total_steps: int
    loss: float
    val_loss: float | None
    overhead: float | None
    memory_bytes: int
    steps_per_second: float | None

    @property
    def eta_seconds(self) -> float | None:
        """Time to the last step at the current rate; None while the rate is unknown."""
        if not self.steps_per_second:
            return None
        return (self.total_steps - self.step) / self.steps_per_second

    def numbers(self) -> str:
        """Losses, overhead and memory as text."""
        parts = [f"loss {self.loss:.3f}"]
        if self.val_loss is not None:
            parts.append(f"val {self.val_loss:.3f}")
        if self.overhead is not None:
            parts.append(f"{100 * self.overhead:+.0f} %")
        parts.append(f"{self.memory_bytes / 1e9:.1f} GB")
        return "  ".join(parts)

    def timing(self) -> str:
        """Rate and remaining time as text."""
        eta = self.eta_seconds
        if self.steps_per_second is None or eta is None:
            return "ETA -:--"
        # Below one step a second, seconds per step are the readable number.
        slow = self.steps_per_second < 1
        rate = f"{1 / self.steps_per_second:.1f} s/step" if slow else f"{self.steps_per_second:.1f} steps/s"
        return f"{rate}  ETA {duration(eta)}"


def duration(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class StatusLine:
    """Shows each step's progress; a context manager around the training loop.

    On a terminal it is one live line, and log records that go to the console appear above it. Elsewhere it is
    a log record every tenth of the run. Rate and ETA leave out the first two steps. The overhead is shown as
    a percentage of a step without scoring.
    """

    def __init__(self, total_steps: int, stream: IO[str]) -> None:
        self.total_steps = total_steps
        self._console = Console(file=stream)
        # A pipe gets log lines whatever rich's own variables (FORCE_COLOR) say about colours.
        self._live = stream.isatty() and not self._console.is_dumb_terminal
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._scope = ExitStack()
        self._updates = 0
        self._rate_from: tuple[int, float] | None = None
        self._val_loss: float | None = None
        self._overhead: float | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._progress = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[timing]}", markup=False),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=self._console,
                expand=True,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("", total=self.total_steps, timing="ETA -:--", numbers="")
            self._scope.enter_context(self._progress)
            self._send_logs_above_the_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope.close()
        self._progress = None

    def update(
        self, step: int, loss: float, val_loss: float | None, overhead: float | None, memory_bytes: int
    ) -> None:
        """Show the state after a step.

        Args:
            step: how many steps are done, 1 for the first.
            loss: the training loss of this step.
            val_loss: the validation loss; None keeps the one that is shown.
            overhead: extra time of a scored step as a share of a plain one (0.04 for 4 %); None keeps the
                one that is shown.
            memory_bytes: memory in use.
        """
        self._val_loss = self._val_loss if val_loss is None else val_loss
        self._overhead = self._overhead if overhead is None else overhead
        rate = self._measure_rate(step)
        status = Status(step, self.total_steps, loss, self._val_loss, self._overhead, memory_bytes, rate)
        if self._progress is not None:
            self._progress.update(
                self._task, completed=step, timing=status.timing(), numbers=status.numbers()
            )
        elif step == self.total_steps or step % max(1, self.total_steps // _REPORTS) == 0:
            log.info("step %d/%d  %s  %s", step, self.total_steps, status.timing(), status.numbers())

    def _measure_rate(self, step: int) -> float | None:
        now = time.monotonic()
        self._updates += 1
        if self._rate_from is None:
            if self._updates == _WARM_UP:
                self._rate_from = (step, now)
            return None
        first, since = self._rate_from
        return (step - first) / max(now - since, 1e-9)

    def _send_logs_above_the_bar(self) -> None:
        """Point console log handlers at the bar's console until it ends.

        A handler keeps the stream that it was made with, so rich's own redirection of `sys.stdout` and
        `sys.stderr` does not reach it, and its records would be written into the middle of the bar.
        """
        for handler in logging.getLogger().handlers:
            if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
                continue
            stream = handler.stream
            if isinstance(stream, FileProxy) or not stream.isatty():
                continue
            handler.setStream(FileProxy(self._console, stream))
            self._scope.callback(handler.setStream, stream)
