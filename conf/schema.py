"""What typed schemas of configs are made of: fields with their documentation, and closed trees."""

from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf


def key(meaning: str, default: Any = MISSING) -> Any:
    """A field with its documentation; without a default, the YAML of the choice must give the value."""
    return field(default=default, metadata={"meaning": meaning})


def free(meaning: str) -> Any:
    """A dictionary whose keys the schema leaves open: they can be typed without a plus, and are checked by
    what reads them. YAML files that build on each other are merged key by key.
    """
    return field(default_factory=dict, metadata={"meaning": meaning, "free": True})


def fixed(value: StrEnum) -> Any:
    """The field that tells the choices of a group apart; `check` refuses any other value."""
    return field(default=value, metadata={"fixed": True})


def schema_node(schema: type) -> DictConfig:
    """The schema as a config; free dictionaries take new keys, also once Hydra has closed the rest."""
    node = OmegaConf.structured(schema)
    for item in fields(schema):
        if item.metadata.get("free"):
            OmegaConf.set_struct(node[item.name], False)
    return node


def several(value: Any) -> list[str]:
    """A key that takes one or a list; null is none."""
    if value is None:
        return []
    return [str(one) for one in (value if isinstance(value, ListConfig) else [value])]


@dataclass
class TrackingStore:
    """Where commands that read runs by MLflow id or experiment look for them."""

    uri: str | None = key("MLflow's store; null: mlflow.db in the folder the command is typed in", None)
