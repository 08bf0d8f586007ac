import threading
import time
from collections.abc import Callable

import pytest
from mlflow.exceptions import MlflowException

from runners import mlflow_sender
from runners.mlflow_sender import Operation, Sender


class Store:
    """Takes what it is sent, once it answers."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.tries = 0
        self.answers = True

    def taking(self, what: str) -> Callable[[], None]:
        def send() -> None:
            self.tries += 1
            if not self.answers:
                raise MlflowException("the server is gone")
            self.taken.append(what)

        return send


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    for name in ("_INTERVAL", "_RETRY_SECONDS", "_LAST_RETRY_SECONDS"):
        monkeypatch.setattr(mlflow_sender, name, 0.01)
    monkeypatch.setattr(mlflow_sender, "_PATIENCE", 0.1)
    return Store()


def test_a_store_that_hangs_holds_up_nobody_but_the_end(store: Store) -> None:
    hangs, hung = threading.Event(), threading.Event()

    def hang() -> None:
        hung.set()
        hangs.wait(10)

    sender = Sender(Operation("metrics", hang))
    began = time.monotonic()
    sender.start()
    assert hung.wait(5)
    for i in range(100):
        sender.add(f"file {i}", store.taking(f"file {i}"))
    assert time.monotonic() - began < 5
    hangs.set()
    assert sender.drain() == []
    assert store.taken == [f"file {i}" for i in range(100)]


def test_what_a_dead_store_did_not_take_is_sent_in_order_once_it_is_back(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.answers = False
    sender = Sender(Operation("metrics", lambda: None))
    for name in "abc":
        sender.add(name, store.taking(name))
    while store.tries < 9:
        time.sleep(0.005)
    store.answers = True
    with caplog.at_level("INFO"):
        assert sender.drain() == []
    assert store.taken == ["a", "b", "c"]
    assert caplog.text.count("did not take") == 1  # an outage is one warning, however long
    assert "answers again" in caplog.text


def test_the_end_waits_for_a_dead_store_for_a_while_and_names_what_it_lacks(store: Store) -> None:
    store.answers = False
    sender = Sender(Operation("metrics", store.taking("metrics")))
    sender.add("report.html", store.taking("report.html"))
    began = time.monotonic()
    assert sender.drain() == ["metrics", "report.html"]
    assert time.monotonic() - began < 5
    store.answers = True
    sender.add("its end", store.taking("its end"))  # an error after the end of a run comes as late as this
    assert sender.drain() == []
    assert store.taken == ["metrics", "report.html", "its end"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unforeseen_error_of_the_thread_is_not_taken_for_success(store: Store) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    sender = Sender(Operation("metrics", lambda: None))
    sender.add("broken", fail)
    assert sender.drain() == ["metrics", "broken"]
