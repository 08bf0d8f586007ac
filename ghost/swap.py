"""Replace modules' forwards and put them back exactly."""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class ForwardSwap:
    """Replaces modules' forwards and puts them back exactly."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Set `module.forward` to `make(its present forward)`."""
        had_own = "forward" in module.__dict__
        original = module.forward
        replacement = make(original)

        @functools.wraps(getattr(original, "__func__", original))
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self is not module:  # a deep copy took this method along, and is not what is scored
                return type(self).forward(self, *args, **kwargs)
            return replacement(*args, **kwargs)

        module.forward = MethodType(forward, module)

        def undo() -> None:
            if had_own:
                module.forward = original
            else:
                del module.forward

        self._undo.append(undo)

    def restore(self) -> None:
        """Put every forward back, the last replaced first."""
        while self._undo:
            self._undo.pop()()
