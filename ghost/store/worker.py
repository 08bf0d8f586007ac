"""Work in the background, in order, whose first failure nobody can miss."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Worker:
    """One thread that does jobs one after the other. After a failure it does none, and every call raises it.

    Args:
        limit: How many jobs may wait; `submit` waits for the oldest beyond that.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._jobs: deque[Future[None]] = deque()
        self._usable = True

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done after those before it.

        Raises:
            Exception: What an earlier job raised.
        """
        while self._jobs and (self._jobs[0].done() or len(self._jobs) >= self._limit):
            self._forget_oldest()
        self._jobs.append(self._pool.submit(self._do, job))

    def finish(self) -> None:
        """Wait for all jobs.

        Raises:
            Exception: What a job raised.
        """
        while self._jobs:
            self._forget_oldest()

    def stop(self) -> None:
        """End the thread; jobs that have not begun are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _forget_oldest(self) -> None:
        self._jobs[0].result()  # a failed job stays the oldest, so that the next call raises as well
        self._jobs.popleft()

    def _do(self, job: Callable[[], None]) -> None:
        if self._usable:
            self._usable = False
            job()
            self._usable = True
