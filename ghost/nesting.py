"""Nested inputs, such as a processor's output or an encoder's output that is given back to a model: mappings,
lists and tuples in each other, to any depth.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any


def children(node: Any) -> dict[Any, Any] | None:
    """A container's entries by key or position; None for a single value."""
    if isinstance(node, Mapping):
        if is_dataclass(node):  # Hugging Face's outputs, which leave out their fields of None
            return {f.name: getattr(node, f.name) for f in fields(node)}
        return dict(node)
    return dict(enumerate(node)) if isinstance(node, list | tuple) else None


def rebuilt(node: Any, entries: dict[Any, Any]) -> Any:
    """A container like `node` with other entries; of a mapping that is no dataclass, a dict."""
    if isinstance(node, Mapping):
        return replace(node, **entries) if is_dataclass(node) else entries
    if isinstance(node, tuple):
        return getattr(node, "_make", tuple)(entries.values())  # a named tuple's own
    return list(entries.values())


def within(path: str, key: Any) -> str:
    """The path of a container's entry, such as `images.pixel_values`."""
    return f"{path}.{key}" if path else str(key)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All single values with their paths, in order."""
    entries = children(node)
    if entries is None:
        yield path, node
        return
    for key, entry in entries.items():
        yield from leaves(entry, within(path, key))


def mapped(change: Callable[[Any], Any], node: Any) -> Any:
    """The same containers with every single value changed."""
    entries = children(node)
    if entries is None:
        return change(node)
    return rebuilt(node, {key: mapped(change, entry) for key, entry in entries.items()})
