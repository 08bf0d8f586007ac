"""`manifest.json`: what a store's rows are, and once it is complete, which files hold them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghost.atomic import sync, write_atomically
from ghost.errors import StoreError, shown
from ghost.layout import Layout, Slice
from ghost.store.codec import codec
from ghost.store.files import FileRecord

SCHEMA_VERSION = 1
NAME = "manifest.json"
FORMATS = ("npy", "pt")


@dataclass(frozen=True)
class Facts:
    """What all writers of a store agree on, and what resuming asks for again.

    Attributes:
        layout: What the columns are.
        projection: How they were made; anything that JSON can hold.
        fingerprints: Of the model's weights, the data and the configuration.
        dtype: The rows' format on disk.
        shard_format: `npy` or `pt`.
        world_size: How many ranks write.
        batches_per_shard: How many batches one file holds.
    """

    layout: Layout
    projection: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    dtype: str
    shard_format: str
    world_size: int
    batches_per_shard: int

    def __post_init__(self) -> None:
        if not self.layout.width:
            raise StoreError("layout has no columns: select at least one parameter to project.")
        codec(self.dtype)
        if self.shard_format not in FORMATS:
            raise StoreError(f"shard_format is {shown(self.shard_format)}: it should be npy or pt.")
        for name in ("world_size", "batches_per_shard"):
            if getattr(self, name) < 1:
                raise StoreError(f"{name} is {getattr(self, name)}: it should be 1 or more.")

    def described(self) -> dict[str, Any]:
        """As JSON reads it back.

        Raises:
            StoreError: `projection` or `fingerprints` hold what JSON cannot.
        """
        whole = {
            "dtype": self.dtype,
            "shard_format": self.shard_format,
            "world_size": self.world_size,
            "batches_per_shard": self.batches_per_shard,
            "projection": dict(self.projection),
            "fingerprints": dict(self.fingerprints),
            "layout": [asdict(part) for part in self.layout.slices],
        }
        try:
            return json.loads(json.dumps(whole))
        except TypeError as error:
            raise StoreError(
                f"projection and fingerprints should be of plain numbers and text: {error}."
            ) from error

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> "Facts":
        """From what `described` gave."""
        return cls(
            Layout(tuple(Slice(**part) for part in described["layout"])),
            described["projection"],
            described["fingerprints"],
            described["dtype"],
            described["shard_format"],
            described["world_size"],
            described["batches_per_shard"],
        )


@dataclass(frozen=True)
class ShardRecord:
    """One shard: the rows of consecutive batches of one rank.

    Attributes:
        stem: What its files' names have in common, `r0-000000`.
        rank: Who wrote it.
        first_batch, batches: Which of the rank's batches.
        rows: How many rows it holds.
        files: Its matrix, ids, norms and, for int8, scales.
    """

    stem: str
    rank: int
    first_batch: int
    batches: int
    rows: int
    files: tuple[FileRecord, ...]

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> "ShardRecord":
        """From what `described` gave."""
        return cls(**{**described, "files": tuple(FileRecord(**file) for file in described["files"])})


@dataclass(frozen=True)
class Contents:
    """What a store holds.

    Attributes:
        shards: In the order of their rows: rank after rank, batch after batch.
        batches: How many batches each rank has written.
        generation: How often the store has been compacted.
    """

    shards: tuple[ShardRecord, ...]
    batches: tuple[int, ...]
    generation: int = 0

    @property
    def rows(self) -> int:
        """How many rows the shards hold."""
        return sum(shard.rows for shard in self.shards)

    @property
    def files(self) -> Iterator[FileRecord]:
        """All files."""
        return (file for shard in self.shards for file in shard.files)


@dataclass(frozen=True)
class Manifest:
    """A store's manifest.

    Attributes:
        facts: What its rows are.
        contents: Which files hold them; None while the store is being built.
    """

    facts: Facts
    contents: Contents | None = None

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            StoreError: There is none, or it is damaged or of another version.
        """
        path = directory / NAME
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            version = described["schema_version"]
            if version != SCHEMA_VERSION:
                raise StoreError(
                    f"{path} has schema_version {shown(version)} and this version of ghost reads "
                    f"{SCHEMA_VERSION}: open it with the version that wrote it."
                )
            facts = Facts.read(described)
            if not described["complete"]:
                return cls(facts)
            shards = tuple(ShardRecord.read(shard) for shard in described["shards"])
            return cls(facts, Contents(shards, tuple(described["batches"]), described["generation"]))
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{directory} holds no projection store: it has no {NAME}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} is no manifest ({type(error).__name__}: {shown(str(error))}): restore it."
            ) from error

    def write(self, directory: Path) -> None:
        """Replace the folder's manifest; whoever calls this holds its lock."""
        described: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "complete": self.contents is not None}
        described |= self.facts.described()
        if self.contents is not None:
            described |= {
                "generation": self.contents.generation,
                "rows": self.contents.rows,
                "batches": list(self.contents.batches),
                "shards": [shard.described() for shard in self.contents.shards],
            }
        text = json.dumps(described, indent=1) + "\n"
        write_atomically(directory / NAME, lambda file: file.write(text.encode()))
        sync(directory)


def difference(there: Any, here: Any, where: str = "") -> str | None:
    """The first thing that differs between two JSON values, in words; None where they are equal."""
    if there == here:
        return None
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            name = f"{where}.{key}" if where else str(key)
            if key not in there or key not in here:
                return f"{name} is only {'there' if key in there else 'here'}"
            found = difference(there[key], here[key], name)
            if found is not None:
                return found
    if isinstance(there, list) and isinstance(here, list):
        if len(there) != len(here):
            return f"{where} has {len(there)} entries there and {len(here)} here"
        for i, (one, other) in enumerate(zip(there, here, strict=True)):
            found = difference(one, other, f"{where}[{i}]")
            if found is not None:
                return found
    return f"{where} is {shown(there)} there and {shown(here)} here"
