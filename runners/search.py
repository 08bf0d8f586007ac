"""Finds the training samples whose projected gradients are nearest to those of queries.

python -m runners.search store=outputs/DAY/TIME/projections query.text=queries.txt k=10
"""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from conf.command import Reported, run_command
from conf.errors import ConfigError, UserError
from conf.help_text import typed
from conf.refuse import refuse
from conf.schema import free, key, schema_node
from ghost import GhostError, GradProjLoRAEngine, ProjectionStore
from ghost.fingerprint import model_fingerprint
from runners.choices import Metric, QuerySplit
from runners.config import DataConfig, HardwareConfig
from runners.data.base import SampleSet
from runners.data.loader import ordered_batches
from runners.losses import Task, build_task
from runners.models import build_model, parameter_dtype, place
from runners.neighbours import (
    chosen_indices,
    neighbour_table,
    print_neighbours,
    refuse_output,
    save_neighbours,
)
from runners.project import projection_config
from runners.projection_store import StoreFacts, read_config, read_facts, read_samples
from runners.queries import data_queries, text_queries
from runners.train import prepare_machine

log = logging.getLogger(__name__)

SHOWN = 10  # queries whose neighbours are printed


@dataclass
class QueryConfig:
    """What is looked for."""

    text: str | None = key(
        "file with the text: windows of a .txt, each row of a .jsonl; null: samples of data"
    )
    text_field: str = key("field that holds the text (rows)")
    split: QuerySplit = key("which samples of the data are queries (without query.text)")
    samples: int | None = key("how many queries, the first ones; null: all")


@dataclass
class WeightsPlace:
    """Where the model's weights are."""

    path: str | None = key("folder of the model's weights, where they have moved; null: as the store says")


@dataclass
class SearchConfig:
    """The whole tree of this command."""

    store: str = key("folder that engine=gradprojlora wrote")
    k: int = key("neighbours of each query")
    metric: Metric = key("what is highest for the nearest")
    weights: dict[str, float] = free("factor on the parameters that the pattern KEY matches")
    domains: list[str] = key("only samples of these domains; []: all")
    ids: list[str] = key("only these samples; []: all")
    out: str | None = key("save the neighbours to this .parquet, .json or .csv; null: print them")
    query: QueryConfig = MISSING
    model: WeightsPlace = MISSING
    data: DataConfig | None = None
    hardware: HardwareConfig = MISSING


ConfigStore.instance().store(name="schema_search", node=schema_node(SearchConfig), provider="ghostrunner")


def search(cfg: DictConfig) -> pa.Table:
    """The nearest samples of every query, as rows of `runners.neighbours.SCHEMA`; printed or saved.

    Raises:
        ConfigError, DataError, GhostError: The store, the queries or the model do not fit each other.
    """
    check_search(cfg)
    folder = Path(cfg.store).absolute()
    store, made, facts = ProjectionStore.open(folder), read_config(folder), read_facts(folder)
    made.hardware = cfg.hardware
    if cfg.model.path is not None:
        if made.model.kind != "hf":
            refuse(
                cfg, "model.path", f"has no effect with model={made.model.name}, whose weights are the seed's"
            )
        made.model.path = cfg.model.path
    samples = read_samples(folder)
    allowed = chosen_indices(samples, list(cfg.domains), list(cfg.ids))
    if allowed is not None:  # of a store that is not complete, some are not there yet
        allowed = np.intersect1d(allowed, store.sample_ids)
    check_k(cfg, folder, len(store) if allowed is None else len(allowed))
    queries = build_queries(cfg, made, facts)
    task, model = rebuild(made, facts, store)
    engine = GradProjLoRAEngine(model, projection_config(made, task))
    store.check_matches(engine.layout, engine.projection, {"model": store.fingerprints["model"]})
    number = number_of_queries(cfg, len(queries))
    rows = project_queries(engine, task, queries, number, made.trainer.batch_size)
    found, scores = store.search(
        rows, cfg.k, metric=str(cfg.metric), weights=dict(cfg.weights) or None, sample_ids=allowed
    )
    names = list(zip(queries.sample_ids[:number], queries.domains[:number], strict=True))
    nearest = neighbour_table(names, np.asarray(found), np.asarray(scores), samples)
    show(cfg, nearest)
    return nearest


def check_search(cfg: DictConfig) -> None:
    """Raises `ConfigError` for keys that cannot work, before anything is read."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"{missing[0]} has no value: type {missing[0]}=VALUE, see --help")
    for name in ("k", "query.samples"):
        value = OmegaConf.select(cfg, name)
        if value is not None and value < 1:
            refuse(cfg, name, f"is too small: type {name}=1 or more")
    if cfg.query.text is not None and cfg.data is not None:
        raise ConfigError(f"query.text={cfg.query.text} and data={cfg.data.kind} are both queries: give one")
    for name, neutral, needs_text in (("text_field", "text", True), ("split", "val", False)):
        if cfg.query[name] != neutral and needs_text != (cfg.query.text is not None):
            refuse(
                cfg, f"query.{name}", f"has no effect on these queries: type query.{name}={typed(neutral)}"
            )
    if cfg.out is not None:
        refuse_output(Path(cfg.out))


def check_k(cfg: DictConfig, folder: Path, searched: int) -> None:
    """Raises `ConfigError` for more neighbours than there are samples to search."""
    if not searched:
        raise ConfigError(f"store={folder} has none of the samples that are to be searched: search others")
    if cfg.k > searched:
        refuse(cfg, "k", f"is more than the {searched} samples that are searched: type k={searched} or less")


def number_of_queries(cfg: DictConfig, there: int) -> int:
    """How many of the queries are looked for; raises `ConfigError` for more than there are."""
    wanted = cfg.query.samples or there
    if wanted > there:
        refuse(cfg, "query.samples", f"is more than the {there} queries: type query.samples={there} or less")
    return wanted


def build_queries(cfg: DictConfig, made: DictConfig, facts: StoreFacts) -> SampleSet:
    """The samples that are looked for."""
    if cfg.query.text is not None:
        return text_queries(cfg.query, made, facts)
    return data_queries(cfg.query, cfg.data, made, facts)


def rebuild(made: DictConfig, facts: StoreFacts, store: ProjectionStore) -> tuple[Task, nn.Module]:
    """The model that the store was made with, in evaluation mode, and its task.

    Raises:
        ConfigError: Its weights are others now.
    """
    device = prepare_machine(made)
    task = build_task(made, device)
    of = facts.data
    model = build_model(made.model, of.vocab_size, of.input_shape, of.num_classes, of.seq_len)
    place(model, device, parameter_dtype(made.dtype))
    if model_fingerprint(model) != store.fingerprints["model"]:
        raise ConfigError(
            f"model.path={typed(made.model.get('path'))} gives other weights than those that store="
            f"{store.directory} was made with: type model.path=FOLDER of those"
        )
    return task, model.eval()


def project_queries(
    engine: GradProjLoRAEngine, task: Task, queries: SampleSet, number: int, batch_size: int
) -> torch.Tensor:
    """The rows `[q, K]` of the first so many queries, on the CPU.

    Raises:
        ConfigError: A query has no label that the loss counts, and so no gradient.
    """
    rows = []
    with engine.attached():
        for batch in ordered_batches(queries, batch_size, range(-(-number // batch_size)), num_workers=0):
            X, Y = task.place(batch.inputs, batch.labels)
            rows.append(engine.project(X, Y, task.mean).cpu())
    found = torch.cat(rows)[:number]
    if (empty := (found == 0).all(1)).any():
        name = queries.sample_ids[int(empty.nonzero()[0])]
        raise ConfigError(f"the query {name} has a gradient of zero, which nothing is near to: leave it out")
    return found


def show(cfg: DictConfig, nearest: pa.Table) -> None:
    """Save the neighbours where `out` says, else print those of the first queries."""
    queries = len(nearest) // cfg.k
    if cfg.out is not None:
        save_neighbours(nearest, Path(cfg.out))
        log.info("Wrote the neighbours of %d queries to %s", queries, cfg.out)
        return
    shown = min(SHOWN, queries)
    print_neighbours(nearest[: shown * cfg.k], str(cfg.metric), None, Console())
    if shown < queries:
        log.info("%d more queries are not shown: out=neighbours.parquet saves all.", queries - shown)


def task(cfg: DictConfig) -> None:
    """Hydra's task function: one search. Raises as `runners.cli.task` does."""
    with Reported(UserError, GhostError):
        search(cfg)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("search", task, groups=("data", "hardware"))


if __name__ == "__main__":
    sys.exit(main())
