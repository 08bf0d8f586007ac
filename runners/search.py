"""Finds the training samples that matter to queries: nearest in a store of projected gradients, or of the
highest and lowest values in a scored run.

python -m runners.search store=outputs/DAY/TIME/projections query.text=queries.txt k=10
python -m runners.search run=outputs/DAY/TIME query.column=mlp query.lowest=true
"""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console

from conf.command import Reported, run_command
from conf.errors import ConfigError, UserError
from conf.help_text import typed
from conf.refuse import refuse
from conf.schema import TrackingStore, free, key, schema_node
from ghost import GhostError
from runners import search_scores, search_store
from runners.choices import Metric, QuerySplit
from runners.config import DataConfig, HardwareConfig
from runners.neighbours import print_neighbours, refuse_output, save_neighbours
from runners.search_kind import Answers, Kind
from runners.summary import print_line

log = logging.getLogger(__name__)

SHOWN = 10  # queries whose answers are printed

KINDS: dict[str, Kind] = {"store": search_store.KIND, "run": search_scores.KIND}


@dataclass
class QueryConfig:
    """What is looked for."""

    text: str | None = key(
        "store: file with the text: windows of a .txt, each row of a .jsonl; null: samples of data"
    )
    text_field: str = key("store: field that holds the text (rows)")
    split: QuerySplit = key("store: which samples of the data are queries (without query.text)")
    samples: int | None = key("store: how many queries, the first ones; null: all")
    column: Any = key("run: NAME or [NAME,NAME]: a column, part, set or validation sample; value: the whole")
    lowest: bool = key("find the lowest too: samples that made the model worse at the query")


@dataclass
class WeightsPlace:
    """Where the model's weights are."""

    path: str | None = key(
        "store: folder of the model's weights, where they have moved; null: as the store says"
    )


@dataclass
class SearchConfig:
    """The whole tree of this command."""

    store: str | None = key("folder that engine=gradprojlora wrote")
    run: str | None = key("directory or MLflow id of a run that engine=graddotprod scored")
    k: int = key("training samples for each query, and end")
    metric: Metric = key("store: what is highest for the nearest")
    weights: dict[str, float] = free("store: factor on the parameters that the pattern KEY matches")
    domains: list[str] = key("only samples of these domains; []: all")
    ids: list[str] = key("only these samples; []: all")
    out: str | None = key("save the answers to this .parquet, .json or .csv; null: print them")
    preview: bool = key("show first words of samples and queries; with out=: save them")
    query: QueryConfig = MISSING
    model: WeightsPlace = MISSING
    tracking: TrackingStore = MISSING
    data: DataConfig | None = None
    hardware: HardwareConfig = MISSING


ConfigStore.instance().store(name="schema_search", node=schema_node(SearchConfig), provider="ghostrunner")


def search(cfg: DictConfig) -> pa.Table:
    """The training samples found for every query, as rows of `runners.neighbours.SCHEMA`; printed or saved.

    Raises:
        ConfigError, DataError, AnalysisError, GhostError: What is searched and the queries do not fit each
            other, or cannot be read.
    """
    kind = chosen_kind(cfg)
    check_search(cfg)
    kind.check(cfg)
    answers = kind.answers(cfg)
    show(cfg, answers)
    return answers.rows


def chosen_kind(cfg: DictConfig) -> Kind:
    """The kind of which something is named; raises `ConfigError` for none, two, and keys of another kind."""
    named = [name for name in KINDS if cfg[name] is not None]
    if not named:
        raise ConfigError(
            f"nothing is searched: type {' or '.join(f'{name}=DIR' for name in KINDS)}, see --help"
        )
    if len(named) > 1:
        given = " and ".join(f"{name}={cfg[name]}" for name in named)
        raise ConfigError(f"{given} are both searched: give one")
    for other in (name for name in KINDS if name != named[0]):
        for name, neutral in KINDS[other].settings.items():
            if OmegaConf.select(cfg, name) != neutral:
                refuse_foreign(cfg, name, neutral, named[0], other)
    return KINDS[named[0]]


def refuse_foreign(cfg: DictConfig, name: str, neutral: object, chosen: str, reader: str) -> None:
    """Raises `ConfigError` for a key that only another kind of search reads."""
    value = OmegaConf.select(cfg, name)
    shown = value.kind if name == "data" else typed(value)
    raise ConfigError(
        f"{name}={shown} has no effect with {chosen}={cfg[chosen]}: leave it at {name}={typed(neutral)}, or "
        f"search {reader}=DIR"
    )


def check_search(cfg: DictConfig) -> None:
    """Raises `ConfigError` for keys of every search that cannot work, before anything is read."""
    if cfg.k < 1:
        refuse(cfg, "k", "is too small: type k=1 or more")
    if cfg.out is not None:
        refuse_output(Path(cfg.out))


def show(cfg: DictConfig, answers: Answers) -> None:
    """Save the answers where `out` says, else print those of the first queries."""
    if cfg.out is not None:
        save_neighbours(answers.rows, Path(cfg.out))
        log.info("Wrote the answers to %d queries to %s", answers.queries, cfg.out)
        return
    console, shown = Console(), min(SHOWN, answers.queries)
    for end in pc.unique(answers.rows["end"]).to_pylist():
        rows = answers.rows.filter(pc.equal(answers.rows["end"], end))
        print_neighbours(rows[: shown * cfg.k], answers.titles[end], answers.score, console)
    if answers.note:
        print_line(console, answers.note)
    if shown < answers.queries:
        log.info("%d more queries are not shown: out=neighbours.parquet saves all.", answers.queries - shown)


def task(cfg: DictConfig) -> None:
    """Hydra's task function: one search. Raises as `runners.cli.task` does."""
    with Reported(UserError, GhostError):
        search(cfg)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("search", task, groups=("data", "hardware"))


if __name__ == "__main__":
    sys.exit(main())
