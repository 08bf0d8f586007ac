"""Tables of numbers with a class for each row: scikit-learn's bundled ones, or a CSV or Parquet file."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from conf.errors import ConfigError
from runners.choices import TaskName
from runners.data.base import DataBundle, Item, SampleSet, one_line, require_at_least
from runners.data.labels import classes_of
from runners.data.selection import choose_rows
from runners.errors import DataError

log = logging.getLogger(__name__)

BUNDLED = ("breast_cancer", "wine", "iris")
READERS: dict[str, Callable[[Path], pa.Table]] = {".csv": pyarrow.csv.read_csv, ".parquet": pq.read_table}


@dataclass(frozen=True)
class LabelledTable:
    features: NDArray[np.float64]
    """`[rows, columns]`, finite."""
    columns: Sequence[str]
    labels: NDArray[np.int64]
    """`[rows]`"""
    class_names: Sequence[str]
    ids: Sequence[str]
    domains: Sequence[str]


class TableSet(SampleSet):
    """Standardised rows of a table and their classes."""

    def __init__(
        self, table: LabelledTable, features: torch.Tensor, rows: NDArray[np.int64], offset: int
    ) -> None:
        """`features` `[table rows, columns]` float32; `rows` `[n]`: which of them are the samples."""
        self.features = features[rows]
        self.labels = torch.from_numpy(table.labels[rows])
        self.offset = offset
        self.sample_ids = [table.ids[i] for i in rows.tolist()]
        self.domains = [table.domains[i] for i in rows.tolist()]
        self._class_names = table.class_names

    def __getitem__(self, i: int) -> Item:
        return self.features[i], self.labels[i], self.offset + i

    def preview(self, i: int, width: int = 80) -> str:
        numbers = " ".join(f"{value:.2f}" for value in self.features[i].tolist())
        return one_line(f"{self._class_names[int(self.labels[i])]}: {numbers}", width)


def build_table(cfg: DictConfig) -> DataBundle:
    """All rows: `data.val_samples` of them, the same for every seed, for validation, the rest for training.

    Columns are standardised by the training rows' mean and standard deviation.

    Raises ConfigError for a key that does not fit the table, DataError for a file that is damaged, too small,
    or holds something else than finite numbers.
    """
    require_at_least(cfg, "val_samples", 1)
    table = _bundled(cfg) if cfg.path in BUNDLED else _from_file(cfg)
    train_rows, val_rows = choose_rows(table.ids, cfg.train_samples, cfg.val_samples, cfg.seed)
    features = _standardised(table, train_rows)
    train = TableSet(table, features, train_rows, 0)
    val = TableSet(table, features, val_rows, len(train))
    return DataBundle(
        train=train,
        val=val,
        task=TaskName.table_classes,
        vocab_size=None,
        input_shape=(len(table.columns),),
        num_classes=len(table.class_names),
        fingerprint=_fingerprint([train, val]),
        description=(
            f"table {cfg.path}: {len(train)} training and {len(val)} validation rows of "
            f"{len(table.columns)} numbers, {len(table.class_names)} classes"
        ),
    )


def _bundled(cfg: DictConfig) -> LabelledTable:
    for key in ("label_field", "domain_field", "id_field"):
        if cfg[key] is not None:
            raise ConfigError(f"data.{key}={cfg[key]} has no effect on data.path={cfg.path}; set it to null.")
    # scikit-learn takes a second to import, and other data do without it.
    from sklearn.datasets import load_breast_cancer, load_iris, load_wine

    found = {"breast_cancer": load_breast_cancer, "wine": load_wine, "iris": load_iris}[cfg.path]()
    labels = found.target.astype(np.int64)
    class_names = [str(name) for name in found.target_names]
    ids = [f"{cfg.path}/{row}" for row in range(len(labels))]
    domains = [class_names[label] for label in labels.tolist()]
    return LabelledTable(found.data, list(found.feature_names), labels, class_names, ids, domains)


def _from_file(cfg: DictConfig) -> LabelledTable:
    path = Path(cfg.path)
    if path.suffix not in READERS or not path.is_file():
        raise DataError(
            f"data.path={cfg.path!r} must be one of {', '.join(BUNDLED)}, or a {' or '.join(READERS)} file."
        )
    try:
        read = READERS[path.suffix](path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as a {path.suffix} table ({error}).") from error
    for key in ("label_field", "domain_field", "id_field"):
        if cfg[key] not in (read.column_names if key == "label_field" else [None, *read.column_names]):
            raise ConfigError(
                f"data.{key}={cfg[key]} is no column of {path}; it has {', '.join(read.column_names)}."
            )
    other = {cfg.label_field, cfg.domain_field, cfg.id_field}
    columns = [name for name in read.column_names if name not in other]
    if not columns:
        raise DataError(f"{path} has no column of numbers beside {', '.join(read.column_names)}.")
    labels, class_names = classes_of(read.column(cfg.label_field).to_pylist(), str(path), cfg.label_field)
    return LabelledTable(
        features=np.stack([_numbers(read.column(name), name, path) for name in columns], axis=1),
        columns=columns,
        labels=labels,
        class_names=class_names,
        ids=_ids(read, cfg, path),
        domains=_domains(read, cfg, path) if cfg.domain_field else [class_names[k] for k in labels.tolist()],
    )


def _numbers(column: pa.ChunkedArray, name: str, path: Path) -> NDArray[np.float64]:
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"The column {name!r} of {path} holds {kind} and not numbers; name it as data.id_field or "
            "data.domain_field, or remove it."
        )
    values = np.array([np.nan if v is None else v for v in column.to_pylist()], dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"{path} has no finite number in row {bad[0]}, column {name!r} ({len(bad)} such rows); fill or "
            "remove them."
        )
    return values


def _ids(table: pa.Table, cfg: DictConfig, path: Path) -> list[str]:
    if cfg.id_field is None:
        return [f"{path.stem}/{row}" for row in range(table.num_rows)]
    ids = [str(value) for value in table.column(cfg.id_field).to_pylist()]
    if len(set(ids)) < len(ids):
        raise DataError(
            f"The ids in {path} (data.id_field={cfg.id_field}) are not unique; choose another field."
        )
    return ids


def _domains(table: pa.Table, cfg: DictConfig, path: Path) -> list[str]:
    values = table.column(cfg.domain_field).to_pylist()
    if None in values:
        raise DataError(
            f"{path} has no value in row {values.index(None)} for data.domain_field={cfg.domain_field}."
        )
    return [str(value) for value in values]


def _standardised(table: LabelledTable, train_rows: NDArray[np.int64]) -> torch.Tensor:
    """All rows, `[rows, columns]` float32."""
    mean = table.features[train_rows].mean(axis=0)
    std = table.features[train_rows].std(axis=0)
    constant = [name for name, spread in zip(table.columns, std, strict=True) if spread == 0]
    log.info(
        "Table: %d columns standardised by the mean and deviation of %d training rows.",
        len(mean),
        len(train_rows),
    )
    if constant:
        log.warning(
            "Columns that are constant in the training rows are only centred: %s.", ", ".join(constant)
        )
    return torch.from_numpy(((table.features - mean) / np.where(std > 0, std, 1)).astype(np.float32))


def _fingerprint(sets: list[TableSet]) -> str:
    digest = hashlib.sha256()
    for samples in sets:
        digest.update("\0".join(samples.sample_ids).encode())
        digest.update(samples.features.numpy().astype("<f4").tobytes())
        digest.update(samples.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
