"""What a projection run writes beside its store's rows, so that the folder suffices to search it, and what
must be the same for a run that goes on with it.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.errors import ConfigError, first_line
from conf.help_text import typed
from ghost import GradProjLoRAEngine, ProjectionStore
from ghost.atomic import written_beside
from ghost.fingerprint import model_fingerprint
from ghost.layout import Layout
from ghost.store import StoreWriter
from ghost.store.files import writing
from runners.choices import TaskName
from runners.data.base import DataBundle
from runners.data.loader import write_samples
from runners.data.tokenfiles import META, Meta
from runners.models.hf_config import DataFacts
from runners.resume.names import CONFIG_FILE
from runners.tracking import STORE_FOLDER, flatten

MANIFEST, CONFIG, SAMPLES, FACTS = "manifest.json", "config.yaml", "samples.parquet", "facts.json"

# What a search or a run that goes on reads of the config.
GROUPS = {"seed", "model", "data", "engine", "layers", "dtype", "trainer"}

# With a row go its id, its scale and a norm for each parameter.
BYTES_A_SAMPLE, BYTES_A_PARAMETER = 12, 4

# What decides the rows and their order. Weights and samples have fingerprints of their own.
DECIDING = (
    *("seed", "model", "data", "layers", "dtype.model", "dtype.autocast", "trainer.batch_size"),
    *(f"engine.{key}" for key in ("rank_total", "rank_min", "kind", "seed", "include_embeddings")),
    *(f"engine.{key}" for key in ("storage", "format", "save_every", "world_size")),
)
# Names, places that fingerprints see through, and how samples are loaded.
WITHOUT_EFFECT = (
    *("model.name", "model.path"),
    *("data.path", "data.tokenizer", "data.num_workers", "data.shuffle"),
)


@dataclass(frozen=True)
class StoreFacts:
    """What the data told the model, and how text becomes tokens.

    Attributes:
        data: As the model was built for it.
        tokenizer: Its name or folder; None where the samples are no text, or come as bare tokens.
        classes: The domains, where these are the labels; else None.
    """

    data: DataFacts
    tokenizer: str | None
    classes: list[str] | None


def store_folder(cfg: DictConfig) -> Path:
    """Where the run's store is."""
    return Path(cfg.engine.store or Path(cfg.output_dir) / STORE_FOLDER).absolute()


def refuse_other_store(cfg: DictConfig, folder: Path) -> None:
    """Raises `ConfigError` where the folder has a complete store, one that other settings began, or none but
    other files; and where it would be uploaded with the run directory's files.
    """
    out = Path(cfg.output_dir).absolute()
    if out in folder.parents and folder != out / STORE_FOLDER:
        raise ConfigError(
            f"engine.store={folder} is in the run directory {out}, whose files are copied to MLflow: name "
            f"{out / STORE_FOLDER}, or a folder elsewhere"
        )
    if not (folder / MANIFEST).is_file():
        found = sorted(path.name for path in folder.glob("[!.]*"))
        if found:
            raise ConfigError(
                f"engine.store={folder} has {found[0]} and no {MANIFEST}, so it is no store: name another "
                "folder"
            )
        return
    goes_on = (out / CONFIG_FILE).exists()  # killed once the rows were written, before its end
    if ProjectionStore.open(folder).complete and not goes_on:
        raise ConfigError(
            f"engine.store={folder} is complete: name another folder, or search this one with python -m "
            f"runners.search store={folder}"
        )
    if (folder / CONFIG).is_file():
        ours, theirs = deciding_keys(cfg), deciding_keys(read_config(folder))
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                raise ConfigError(
                    f"{key}={typed(ours.get(key))} does not go on with engine.store={folder}, begun with "
                    f"{key}={typed(theirs.get(key))}: type that, or name another folder"
                )


def row_bytes(layout: Layout, storage: str) -> int:
    """Bytes that a sample takes in the store."""
    return (
        layout.width * getattr(torch, storage).itemsize
        + BYTES_A_SAMPLE
        + BYTES_A_PARAMETER * len(layout.slices)
    )


def open_writer(cfg: DictConfig, folder: Path, engine: GradProjLoRAEngine, data: DataBundle) -> StoreWriter:
    """The writer of this run's part: of a new store, or where an earlier run left off.

    Raises:
        StoreError: The folder holds something else.
    """
    return StoreWriter(
        folder,
        engine.layout,
        projection=engine.projection,
        fingerprints={
            "model": model_fingerprint(engine.model),
            "data": data.fingerprint,
            "config": config_fingerprint(cfg),
        },
        dtype=str(cfg.engine.storage),
        shard_format=str(cfg.engine.format),
        batches_per_shard=cfg.engine.save_every,
        rank=cfg.engine.rank,
        world_size=cfg.engine.world_size,
    )


def describe_store(cfg: DictConfig, folder: Path, data: DataBundle, seq_len: int | None) -> None:
    """Write config, samples and facts into the store's folder, the same bytes from every rank.

    Raises:
        StoreError: The system refuses.
    """
    config = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    config.output_dir, config.engine.store, config.engine.rank = None, None, 0
    for group, key in (("model", "path"), ("data", "path"), ("data", "tokenizer")):
        place = OmegaConf.select(config, f"{group}.{key}")
        if place is not None and Path(place).exists():  # a search is typed in another directory
            OmegaConf.update(config, f"{group}.{key}", str(Path(place).absolute()))
    facts = StoreFacts(
        DataFacts(data.vocab_size, data.input_shape, data.num_classes, seq_len),
        _tokenizer(config.data),
        domain_classes(config.data, data),
    )
    with writing(folder, f"{CONFIG}, {FACTS} or {SAMPLES}"):
        _write_text(folder / CONFIG, OmegaConf.to_yaml(config))
        _write_text(folder / FACTS, json.dumps(asdict(facts), indent=2) + "\n")
        write_samples({"train": data.train}, folder / SAMPLES)


def read_config(folder: Path) -> DictConfig:
    """The config that the store was made with.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    with _reading(folder, CONFIG) as path:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig) or not set(config) >= GROUPS:
            raise ValueError(f"it should have {', '.join(sorted(GROUPS))}")
    return config


def read_facts(folder: Path) -> StoreFacts:
    """What `describe_store` wrote.

    Raises:
        ConfigError: There is nothing, or it is damaged.
    """
    with _reading(folder, FACTS) as path:
        saved = json.loads(path.read_text(encoding="utf-8"))
        shape = saved["data"].pop("input_shape")
        facts = DataFacts(input_shape=shape and tuple(shape), **saved["data"])
        return StoreFacts(facts, saved["tokenizer"], saved["classes"])


def read_samples(folder: Path) -> pa.Table:
    """`index`, `sample_id` and `domain` of the store's samples.

    Raises:
        ConfigError: There are none, or the table is damaged.
    """
    with _reading(folder, SAMPLES) as path:
        return pq.read_table(path, columns=["index", "sample_id", "domain"])


def domain_classes(cfg: DictConfig, data: DataBundle) -> list[str] | None:
    """The domains of the samples, where a sample's label is the number of its domain; else None."""
    if data.task != TaskName.text_classes or cfg.kind == "hf":
        return None
    return sorted({*data.train.domains, *data.val.domains})


def deciding_keys(cfg: DictConfig) -> dict[str, Any]:
    """The keys that decide rows and their order, by dotted name."""
    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    return {
        key: value
        for key, value in flatten(
            {name: part for name, part in resolved.items() if name != "output_dir"}
        ).items()
        if f"{key}.".startswith(tuple(f"{name}." for name in DECIDING)) and key not in WITHOUT_EFFECT
    }


def config_fingerprint(cfg: DictConfig) -> str:
    """SHA-256 (hex) over `deciding_keys`."""
    return hashlib.sha256(json.dumps(deciding_keys(cfg), sort_keys=True).encode()).hexdigest()


def _tokenizer(data: DictConfig) -> str | None:
    if data.kind == "tokens" and (Path(data.path) / META).is_file():
        return Meta.read(Path(data.path)).tokenizer
    name: str | None = data.get("tokenizer")
    return name


@contextmanager
def _reading(folder: Path, name: str) -> Iterator[Path]:
    """A file of the store's folder, to be read whole within the block.

    Raises:
        ConfigError: It is missing, or the block meets something that should not be in it.
    """
    if not (folder / name).is_file():
        raise ConfigError(
            f"store={folder} has no {name}, so what its rows were made with is unknown: give a folder that "
            "engine=gradprojlora wrote."
        )
    try:
        yield folder / name
    except (OSError, ValueError, KeyError, TypeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"store={folder} has a damaged {name} ({first_line(error)}): restore it, or build the store anew"
        ) from error


def _write_text(path: Path, text: str) -> None:
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")
