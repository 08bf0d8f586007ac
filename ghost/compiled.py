"""Arithmetic element by element, compiled where a compiler works."""

import logging
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch._dynamo.exc import BackendCompilerFailed

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class CompiledWhereItWorks(Generic[P, R]):
    """A function of tensors that is compiled when it is first called.

    PyTorch takes a chain of element-wise operations one pass over memory at a time; compiled, all of it is
    one pass. That asks for a C++ compiler, which not every machine has: there the function is called as it
    is, and the log says so once.

    Args:
        function: Of tensors, which may write to some of them.
        what: What it computes, for the log, such as "the slopes of Adam's update".

    Attributes:
        works: False once a compiler has failed.
    """

    def __init__(self, function: Callable[P, R], what: str) -> None:
        self._function, self._what = function, what
        self._compiled: Callable[P, R] | None = None
        self.works = True

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.works:
            return self._function(*args, **kwargs)
        if self._compiled is None:
            logger.info("Compiling %s, once for this machine.", self._what)
            self._compiled = torch.compile(self._function, dynamic=True)
        try:
            return self._compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            self.works = False
            logger.warning(
                "cannot compile %s, which takes several times as long so: install a C++ compiler such as "
                "g++ (%s).",
                self._what,
                type(error.inner_exception).__name__,
            )
            logger.debug("What the compiler said: %s", error)
            return self._function(*args, **kwargs)
