"""Hugging Face data sets opened: from the hub, from a folder of `save_to_disk`, or from local files.

Rows stay in memory-mapped Arrow files. No code that comes with a data set is run: `datasets` 4 has none.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pyarrow as pa
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from omegaconf import DictConfig

from conf.errors import ConfigError, first_line
from runners.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

HUB_TIMEOUT = 10.0  # seconds

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SAVED_SPLITS, SAVED_SPLIT = "dataset_dict.json", "state.json"


@dataclass(frozen=True)
class Source:
    """The rows of `data.split`, then those of `data.val_split`, as one table."""

    table: "Dataset"
    splits: Sequence[tuple[str, int]]
    """The splits' names and numbers of rows."""
    label: str
    """What errors and the log call it."""

    @property
    def held(self) -> range | None:
        """The rows of the validation split, if there is one."""
        return range(self.splits[0][1], len(self.table)) if len(self.splits) > 1 else None

    def split_names(self) -> list[str]:
        """The split of each row."""
        return [name for name, count in self.splits for _ in range(count)]

    def row_numbers(self) -> list[str]:
        """Each row's number in its split, from 0 on."""
        return [str(row) for _, count in self.splits for row in range(count)]

    def row_names(self, separator: str) -> list[str]:
        """`<split><separator><number>` of each row."""
        pairs = zip(self.split_names(), self.row_numbers(), strict=True)
        return [f"{name}{separator}{number}" for name, number in pairs]

    def column(self, key: str, field: str) -> str:
        """`field`, if it is one of the columns; else raises ConfigError, naming `data.<key>`."""
        present = self.table.column_names
        if field not in present:
            raise ConfigError(
                f"data.{key}={field} is no column of {self.label}; it has {', '.join(present)}."
            )
        return field


def open_source(cfg: DictConfig) -> Source:
    """The data set that the config's `data` node names.

    Raises ConfigError if the package `datasets` is missing, DataError if there is no such data set or split,
    or it is damaged.
    """
    datasets = _datasets()
    names = [cfg.split] if cfg.val_split is None else [cfg.split, cfg.val_split]
    label = cfg.path if cfg.name is None else cfg.name
    try:
        parts = _saved(datasets, cfg, names) if _is_saved(cfg) else _loaded(datasets, cfg, names)
        table = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except (OSError, ValueError, RuntimeError, HTTPError, pa.ArrowException) as error:
        hint = "give files as data.path" if cfg.name else "give data.path another folder or file"
        raise DataError(f"The data set {label} cannot be opened ({first_line(error)}): {hint}.") from error
    except datasets.exceptions.DatasetsError as error:
        raise DataError(
            f"The data set {label} is damaged ({first_line(error.__cause__ or error)})."
        ) from error
    return Source(table, [(name, len(part)) for name, part in zip(names, parts, strict=True)], label)


def _datasets() -> ModuleType:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(f"data=hf needs a package ({error}): pip install 'ghostrunner[hf]'") from error
    return datasets


def _is_saved(cfg: DictConfig) -> bool:
    """Whether `data.path` was written by `save_to_disk`."""
    return cfg.path is not None and any(
        (Path(cfg.path) / name).is_file() for name in (SAVED_SPLITS, SAVED_SPLIT)
    )


def _saved(datasets: ModuleType, cfg: DictConfig, names: list[str]) -> "list[Dataset]":
    saved = datasets.load_from_disk(cfg.path)
    present = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    for key, name in zip(("split", "val_split"), names, strict=False):
        if name not in present:
            raise DataError(f"data.{key}={name} is not in {cfg.path}; its splits are {', '.join(present)}.")
    return [present[name] for name in names]


def _loaded(datasets: ModuleType, cfg: DictConfig, names: list[str]) -> "list[Dataset]":
    if cfg.name is not None:
        with _hub_asked_once(datasets, cfg.name):
            return [datasets.load_dataset(cfg.name, cfg.subset, split=name) for name in names]
    path = Path(cfg.path).absolute()
    if path.is_dir():
        return [datasets.load_dataset(str(path), split=name) for name in names]
    if path.suffix not in BUILDERS or not path.is_file():
        raise DataError(
            f"data.path={cfg.path!r} must be a folder, or a {', '.join(BUILDERS)} file; data.name is for the "
            "hub."
        )
    if len(names) > 1:
        raise ConfigError(
            f"data.val_split={cfg.val_split} is not in data.path={cfg.path}, a single file: give a folder, "
            "or data.val_split=null."
        )
    builder = BUILDERS[path.suffix]
    return [datasets.load_dataset(builder, data_files={name: str(path)}, split=name) for name in names]


@contextmanager
def _hub_asked_once(datasets: ModuleType, name: str) -> Iterator[None]:
    """Keeps `datasets` to earlier downloads if the hub does not give the data set: by itself it would ask
    again for every file, for up to minutes.
    """
    before = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except (HTTPError, OSError, ValueError) as error:
        log.warning(
            "The hub does not give %s (%s): looking for an earlier download.", name, first_line(error)
        )
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
