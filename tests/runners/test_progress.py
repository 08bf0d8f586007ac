import io
import logging
import re

import pytest

from runners import progress
from runners.progress import ProjectionLine, StatusLine, duration, readable


class Terminal(io.StringIO):
    """A terminal 80 columns wide that can say what stands on its screen."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines = [""]
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if token == "\n":
                lines.append("")
            elif token == "\x1b[2K":
                lines[-1] = ""
            elif token == "\x1b[1A":
                lines.pop()
            elif token[0] not in "\r\x1b":
                lines[-1] += token
        return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the status line sees, in its last item."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[-1])
    return now


def test_no_terminal_means_ten_log_lines(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    stream = io.StringIO()
    with caplog.at_level(logging.INFO), StatusLine(100, stream) as line:
        for step in range(1, 101):
            clock.append(clock[-1] + (50.0 if step <= 2 else 0.5))
            line.update(step, 2.0, 3.25 if step == 8 else None, 0.041 if step == 8 else None, 3_100_000_000)
    assert len(caplog.messages) == 10
    # The first two steps took 100 s and are not in the rate.
    timing = "step 10/100  2.0 steps/s  ETA 0:45"
    assert caplog.messages[0] == f"{timing}  loss 2.000  val 3.250  scoring +4 %  3.1 GB"
    assert caplog.messages[-1].startswith("step 100/100  2.0 steps/s  ETA 0:00")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("total", [1, 2, 7])
def test_short_runs_log_every_step(caplog: pytest.LogCaptureFixture, total: int) -> None:
    with caplog.at_level(logging.INFO), StatusLine(total, io.StringIO()) as line:
        for step in range(1, total + 1):
            line.update(step, 2.0, None, None, 10**9)
    assert [message.split()[1] for message in caplog.messages] == [
        f"{i}/{total}" for i in range(1, total + 1)
    ]
    assert "ETA -:--" in caplog.messages[0]


def test_last_step_is_always_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), StatusLine(25, io.StringIO()) as line:
        for step in range(1, 26):
            line.update(step, 2.0, None, None, 10**9)
    assert caplog.messages[-1].startswith("step 25/25")


def test_resumed_run_measures_its_own_steps(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    with caplog.at_level(logging.INFO), StatusLine(100, io.StringIO()) as line:
        for step in range(51, 61):
            clock.append(clock[-1] + 4.0)
            line.update(step, 2.0, None, None, 10**9)
    assert caplog.messages == ["step 60/100  4.0 s/step  ETA 2:40  loss 2.000  1.0 GB"]


def test_terminal_shows_one_line(terminal: Terminal, clock: list[float]) -> None:
    with StatusLine(24, terminal) as line:
        for step in range(1, 25):
            clock.append(clock[-1] + 7.0)
            line.update(step, 10.123, 9.876 if step == 8 else None, 0.04, 3_100_000_000)
    screen = [text for text in terminal.screen() if text]
    assert len(screen) == 1
    assert screen[0].startswith("24/24 ━")
    assert screen[0].endswith("7.0 s/step  ETA 0:00 loss 10.123  val 9.876  scoring +4 %  3.1 GB")
    assert len(screen[0]) <= 80


def test_log_records_stand_above_the_bar(terminal: Terminal) -> None:
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    with StatusLine(3, terminal) as line:
        line.update(1, 2.0, None, None, 10**9)
        logging.getLogger("a").warning("first [red]record[/red]")
        line.update(2, 2.0, None, None, 10**9)
        logging.getLogger("a").warning("second record")
        line.update(3, 2.0, None, None, 10**9)
    logging.getLogger("a").warning("after the bar")
    assert handler.stream is terminal
    screen = [text for text in terminal.screen() if text]
    assert screen[:2] == ["first [red]record[/red]", "second record"]
    assert screen[2].startswith("3/3 ━")
    assert screen[3:] == ["after the bar"]


def test_a_handler_whose_stream_is_closed_does_not_stop_the_loop(terminal: Terminal) -> None:
    gone = io.StringIO()
    handler = logging.StreamHandler(gone)
    logging.getLogger().addHandler(handler)  # `root_handlers` takes it off again
    gone.close()
    with StatusLine(2, terminal) as line:
        line.update(1, 2.0, None, None, 10**9)
    assert handler.stream is gone


def test_error_inside_the_loop_leaves_the_terminal_usable(terminal: Terminal) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), StatusLine(3, terminal):
        raise RuntimeError("out of memory")
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_projection_counts_samples(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    with caplog.at_level(logging.INFO), ProjectionLine(1000, io.StringIO()) as line:
        for batch in range(1, 126):
            clock.append(clock[-1] + (9.0 if batch <= 2 else 0.5))
            line.update(8 * batch, 10**7 * batch, 3_100_000_000)
    assert len(caplog.messages) == 10
    assert caplog.messages[0] == (
        "sample 104/1000  16.0 samples/s  ETA 0:56  0.130 GB written  memory 3.1 GB"
    )
    assert caplog.messages[-1].startswith("sample 1000/1000  16.0 samples/s  ETA 0:00  1.250 GB written")


def test_a_projection_that_goes_on_measures_its_own_samples(
    caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    with caplog.at_level(logging.INFO), ProjectionLine(1000, io.StringIO()) as line:
        for batch in range(100, 104):
            clock.append(clock[-1] + 2.0)
            line.update(8 * batch, 0, 0)
    assert [message.split("  ")[:2] for message in caplog.messages] == [["sample 800/1000", "ETA -:--"]]


def test_sizes_are_readable() -> None:
    assert (readable(3 << 19), readable(5 << 29)) == ("1.5 MiB", "2.50 GiB")
