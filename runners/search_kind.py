"""What every kind of search shares: its keys, its answers, and what is checked of both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyarrow as pa
from omegaconf import DictConfig

from conf.errors import ConfigError
from conf.refuse import refuse


@dataclass(frozen=True)
class Answers:
    """What was found for every query.

    Attributes:
        rows: Of `runners.neighbours.SCHEMA`, k for each query at each end, with texts where asked for.
        queries: How many.
        score: What the scores are, in a word.
        titles: What stands above the rows of each end.
        note: How to read the scores; empty where that is plain.
    """

    rows: pa.Table
    queries: int
    score: str
    titles: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of thing that can be searched.

    Attributes:
        settings: The keys that only this kind reads, with the values that leave them alone.
        check: Raises `ConfigError` for keys that cannot work, before anything is read.
        answers: The search.
    """

    settings: Mapping[str, object]
    check: Callable[[DictConfig], None]
    answers: Callable[[DictConfig], Answers]


def check_k(cfg: DictConfig, searched: int, what: str) -> None:
    """Raises `ConfigError` for more samples a query than there are in `what`, `key=value`."""
    if not searched:
        raise ConfigError(f"{what} has none of the samples that are to be searched: search others")
    if cfg.k > searched:
        refuse(cfg, "k", f"is more than the {searched} samples that are searched: type k={searched} or less")
