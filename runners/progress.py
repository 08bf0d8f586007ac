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
            parts.append(f"scoring {100 * self.overhead:+.0f} %")
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


def readable(size: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


class LiveLine:
    """A context manager around a loop: on a terminal one live line, elsewhere a log record every tenth of it.

    Log records that go to the console appear above the live line.
    """

    def __init__(self, total: int, noun: str, stream: IO[str]) -> None:
        """`total`: of what is counted; `noun`: what a log record calls one of it."""
        self.total = total
        self._noun = noun
        self._console = Console(file=stream)
        # A pipe gets log lines whatever rich's own variables (FORCE_COLOR) say about colours.
        self._live = stream.isatty() and not self._console.is_dumb_terminal
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._scope = ExitStack()
        self._updates = 0
        self._tenths: int | None = None
        self._rate_from: tuple[int, float] | None = None

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
            self._task = self._progress.add_task("", total=self.total, timing="ETA -:--", numbers="")
            self._scope.enter_context(self._progress)
            self._send_logs_above_the_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope.close()
        self._progress = None

    def _show(self, done: int, timing: str, numbers: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, timing=timing, numbers=numbers)
            return
        if self._tenths is None:  # a run that goes on with another starts anywhere
            self._tenths = (done - 1) * _REPORTS // self.total
        tenths = done * _REPORTS // self.total
        if tenths > self._tenths:
            self._tenths = tenths
            log.info("%s %d/%d  %s  %s", self._noun, done, self.total, timing, numbers)

    def _measure_rate(self, done: int) -> float | None:
        """What is done in a second, without the first two updates; None while it is unknown."""
        now = time.monotonic()
        self._updates += 1
        if self._rate_from is None:
            if self._updates == _WARM_UP:
                self._rate_from = (done, now)
            return None
        first, since = self._rate_from
        return (done - first) / max(now - since, 1e-9)

    def _send_logs_above_the_bar(self) -> None:
        """Point console log handlers at the bar's console until it ends.

        A handler keeps the stream that it was made with, so rich's own redirection of `sys.stdout` and
        `sys.stderr` does not reach it, and its records would be written into the middle of the bar.
        """
        for handler in logging.getLogger().handlers:
            if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
                continue
            stream = handler.stream
            # Whoever closed a handler's stream keeps the handler's own complaints, but must not stop a run.
            if isinstance(stream, FileProxy) or getattr(stream, "closed", False) or not stream.isatty():
                continue
            handler.setStream(FileProxy(self._console, stream))
            self._scope.callback(handler.setStream, stream)


class StatusLine(LiveLine):
    """The progress of training, counted in steps.

    Rate and ETA leave out the first two steps. The overhead is shown as a percentage of a step without
    scoring.
    """

    def __init__(self, total_steps: int, stream: IO[str]) -> None:
        super().__init__(total_steps, "step", stream)
        self._val_loss: float | None = None
        self._overhead: float | None = None

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
        status = Status(step, self.total, loss, self._val_loss, self._overhead, memory_bytes, rate)
        self._show(step, status.timing(), status.numbers())


class ProjectionLine(LiveLine):
    """The progress of a projection pass, counted in samples."""

    def __init__(self, total_samples: int, stream: IO[str]) -> None:
        super().__init__(total_samples, "sample", stream)

    def update(self, samples: int, written_bytes: int, memory_bytes: int) -> float | None:
        """Show the state after a batch; returns samples a second, None while the rate is unknown.

        Args:
            samples: how many are projected, those of an earlier, interrupted run among them.
            written_bytes: what is on disk.
            memory_bytes: memory in use.
        """
        rate = self._measure_rate(samples)
        timing = "ETA -:--"
        if rate:
            timing = f"{rate:,.1f} samples/s  ETA {duration((self.total - samples) / rate)}"
        numbers = f"{written_bytes / 1e9:.3f} GB written  memory {memory_bytes / 1e9:.1f} GB"
        self._show(samples, timing, numbers)
        return rate
