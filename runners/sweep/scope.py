"""Where a sweep ends: Hydra tells no launcher, and no callback of a sweep that ended by an error."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar

_stack: ContextVar[ExitStack] = ContextVar("sweep")


@contextmanager
def sweeps_end_here() -> Iterator[None]:
    """A sweep that begins in the block ends with it."""
    with ExitStack() as stack:
        token = _stack.set(stack)
        try:
            yield
        finally:
            _stack.reset(token)


def begin(sweep: AbstractContextManager[object]) -> None:
    """Enter the sweep's context until the command line's block ends."""
    _stack.get().enter_context(sweep)
