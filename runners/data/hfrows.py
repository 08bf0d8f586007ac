"""Which rows of a Hugging Face data set are samples, and their ids, domains and classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from runners.data.hub import Source
from runners.data.labels import classes_of
from runners.data.selection import choose_rows
from runners.errors import DataError

ROWS_PER_READ = 1000

# What a field's key stands for while it is null.
DEFAULT_FIELDS = {
    "text_field": "text",
    "source_field": "source",
    "target_field": "target",
    "image_field": "image",
    "label_field": "label",
}


@dataclass(frozen=True)
class Side:
    """Rows that are trained on, or validated with."""

    rows: list[int]
    """Ascending positions in the data set."""
    ids: Sequence[str]
    domains: Sequence[str]


def choose_sides(cfg: DictConfig, source: Source, domains: Sequence[str]) -> tuple[Side, Side]:
    """The training side and the validation side; `domains` `[rows]` where no `data.domain_field` is given."""
    ids = row_ids(cfg, source, source.row_names("/"))
    domains = row_domains(cfg, source, domains)
    chosen = choose_rows(ids, cfg.train_samples, cfg.val_samples, cfg.seed, source.held)
    train, val = (
        Side(rows, [ids[i] for i in rows], [domains[i] for i in rows])
        for rows in (part.tolist() for part in chosen)
    )
    return train, val


def field_of(cfg: DictConfig, source: Source, key: str) -> str:
    """The column that `data.<key>` names. Raises ConfigError if there is none."""
    return source.column(key, DEFAULT_FIELDS[key] if cfg[key] is None else cfg[key])


def row_ids(cfg: DictConfig, source: Source, otherwise: Sequence[str]) -> Sequence[str]:
    """The value of `data.id_field` in each row. Raises DataError if two rows have the same."""
    if cfg.id_field is None:
        return otherwise
    ids = _strings(source, "id_field", cfg.id_field)
    seen: set[str] = set()
    for row, name in enumerate(ids):
        if name in seen:
            raise DataError(
                f"{source.label} has the id {name!r} twice, the second time in row {row}; ids must be unique "
                f"(data.id_field={cfg.id_field})."
            )
        seen.add(name)
    return ids


def row_domains(cfg: DictConfig, source: Source, otherwise: Sequence[str]) -> Sequence[str]:
    """The value of `data.domain_field` in each row."""
    return otherwise if cfg.domain_field is None else _strings(source, "domain_field", cfg.domain_field)


def row_classes(cfg: DictConfig, source: Source) -> tuple[NDArray[np.int64], list[str]]:
    """The class of each row, `[rows]`, and the classes' names: as the data set has them, else its labels in
    sorted order.
    """
    from datasets import ClassLabel  # an extra, which the source has found

    field = field_of(cfg, source, "label_field")
    values = list(column_values(source, field))
    feature = source.table.features[field]
    if not isinstance(feature, ClassLabel):
        return classes_of(values, source.label, field)
    names = feature.names
    for row, value in enumerate(values):
        if value is None or not 0 <= value < len(names):
            raise DataError(
                f"{source.label} has the label {value} in row {row} of {field!r} (data.label_field), which "
                f"is none of its {len(names)} classes; choose rows that are labelled."
            )
    return np.array(values, dtype=np.int64), list(names)


def column_values(source: Source, field: str) -> Iterator[Any]:
    """One column's values, read a few at a time."""
    for batch in source.table.select_columns([field]).iter(ROWS_PER_READ):
        yield from batch[field]


def text_of(value: Any, source: Source, row: int, field: str) -> str:
    """The value itself. Raises DataError if it is no text."""
    if not isinstance(value, str):
        said = "no value" if value is None else f"a {type(value).__name__} and no text"
        raise DataError(f"{source.label} has {said} in row {row} of {field!r}; choose another field.")
    return value


def _strings(source: Source, key: str, field: str) -> list[str]:
    values = list(column_values(source, source.column(key, field)))
    if None in values:
        raise DataError(
            f"{source.label} has no value in row {values.index(None)} of {field!r} (data.{key}); set "
            f"data.{key} to another field, or to null."
        )
    return [str(value) for value in values]
