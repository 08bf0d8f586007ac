"""The library's own errors: one sentence each, naming the key or layer, the value and what would be right."""


class GhostError(Exception):
    """Base of every error that the library raises on purpose."""


class GhostConfigError(GhostError, ValueError):
    """A setting has a value that cannot work."""


class UnsupportedModelError(GhostError, TypeError):
    """A layer or parameter of the model cannot be handled exactly, so the model is refused by name."""


class BatchError(GhostError, ValueError):
    """A batch has a shape, key or type that does not fit the model, the validation rows or its sample ids."""


class ProtocolError(GhostError, RuntimeError):
    """The manager's methods were called out of order."""


class StoreError(GhostError):
    """A projection store cannot be written, read, searched or changed as asked."""


def shown(value: object) -> str:
    """The beginning of a value's `repr`, on one line, for messages."""
    return " ".join(repr(value).split())[:60]
