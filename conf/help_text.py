"""The part of `--help` that lists every key of the composed config with its value and meaning."""

import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import EnumType
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf

COLUMN = 46  # where the meanings start


def keys_help(*, _root_: DictConfig) -> str:
    """Lines `key=value  meaning` for every typed key; the value of the OmegaConf resolver `keys_help`.

    `_root_` is the composed config, passed by OmegaConf. Dollar signs are doubled, because Hydra takes its
    help for a `string.Template`.
    """
    lines = []
    for name, value, meaning in _documented_keys(_root_, prefix=""):
        left = f"  {name}={value}"
        if not meaning:
            lines.append(left)
            continue
        body = textwrap.wrap(meaning, width=112 - COLUMN)
        head = left.ljust(COLUMN) if len(left) < COLUMN else f"{left}\n{' ' * COLUMN}"
        lines.append(head + f"\n{' ' * COLUMN}".join(body))
    return "\n".join(lines).replace("$", "$$")


def _documented_keys(node: DictConfig, prefix: str) -> Iterator[tuple[str, str, str]]:
    schema = OmegaConf.get_type(node)
    if schema is None or not is_dataclass(schema):
        return
    for item in fields(schema):
        name = f"{prefix}{item.name}"
        child = None if is_unresolved(node, item.name) else node[item.name]
        if item.metadata.get("free") and isinstance(child, DictConfig):
            yield from _free_keys(child, f"{name}.", item.metadata["meaning"])
        elif isinstance(child, DictConfig):
            yield from _documented_keys(child, prefix=f"{name}.")
        elif "meaning" in item.metadata:
            yield name, _shown(node, item.name), item.metadata["meaning"] + _choices(item.type)


def _free_keys(node: DictConfig, prefix: str, meaning: str) -> Iterator[tuple[str, str, str]]:
    """The keys of a free dictionary that have values; the meaning of all stands beside `KEY`."""
    yield f"{prefix}KEY", "VALUE", meaning
    for name in map(str, node):
        if not is_unresolved(node, name) and isinstance(node[name], DictConfig):
            yield from list(_free_keys(node[name], f"{prefix}{name}.", ""))[1:]
        else:
            yield f"{prefix}{name}", _shown(node, name), ""


def is_unresolved(node: DictConfig, name: str) -> bool:
    """Whether reading the key would fail or would ask a resolver."""
    return OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name)


def _shown(node: DictConfig, name: str) -> str:
    """The value as one types it on the command line."""
    if OmegaConf.is_missing(node, name):
        return "???"
    if OmegaConf.is_interpolation(node, name):
        return str(OmegaConf.to_container(node, resolve=False)[name])  # type: ignore[call-overload,index]
    return typed(node[name])


def typed(value: Any) -> str:
    """A config value as one types it on the command line: `null`, `true`, `[a,b]`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple | ListConfig):
        return f"[{','.join(typed(item) for item in value)}]"
    return str(value)


def _choices(annotation: Any) -> str:
    """` (a | b)` for an enumerated field, also within `list[...]` and `... | None`."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, EnumType):
            return f" ({' | '.join(kind.__members__)})"
    return ""
