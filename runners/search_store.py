"""Search of a store: the samples whose projected gradients are nearest to those of queries."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from omegaconf import DictConfig
from torch import nn

from conf.errors import ConfigError
from conf.help_text import typed
from conf.refuse import refuse
from ghost import GradProjLoRAEngine, ProjectionStore
from ghost.fingerprint import model_fingerprint
from ghost.store.manifest import NAME as MANIFEST
from runners.data import build_data
from runners.data.base import SampleSet
from runners.data.loader import ordered_batches
from runners.losses import Task, build_task
from runners.models import build_model, parameter_dtype, place
from runners.neighbours import HIGHEST, LOWEST, chosen_indices, neighbour_table, with_texts
from runners.project import projection_config
from runners.projection_store import StoreFacts, read_config, read_facts, read_samples
from runners.queries import data_queries, text_queries
from runners.search_kind import Answers, Kind, check_k
from runners.tracking import STORE_FOLDER
from runners.train import prepare_machine

TITLES = {HIGHEST: "Nearest training samples", LOWEST: "Most opposed training samples"}


def check(cfg: DictConfig) -> None:
    """Raises `ConfigError` for queries that cannot be, before anything is read."""
    if cfg.query.samples is not None and cfg.query.samples < 1:
        refuse(cfg, "query.samples", "is too small: type query.samples=1 or more")
    if cfg.query.text is not None and cfg.data is not None:
        raise ConfigError(f"query.text={cfg.query.text} and data={cfg.data.kind} are both queries: give one")
    for name, neutral, needs_text in (("text_field", "text", True), ("split", "val", False)):
        if cfg.query[name] != neutral and needs_text != (cfg.query.text is not None):
            refuse(
                cfg, f"query.{name}", f"has no effect on these queries: type query.{name}={typed(neutral)}"
            )


def answers(cfg: DictConfig) -> Answers:
    """The nearest samples of every query, and the most opposed ones where asked for.

    Raises:
        ConfigError, DataError, GhostError: The store, the queries or the model do not fit each other.
    """
    folder = Path(cfg.store).absolute()
    if not (folder / MANIFEST).exists() and (folder / STORE_FOLDER / MANIFEST).exists():
        refuse(cfg, "store", f"is the directory of its run: type store={Path(cfg.store) / STORE_FOLDER}")
    store, made, facts = ProjectionStore.open(folder), read_config(folder), read_facts(folder)
    made.hardware = cfg.hardware
    if cfg.model.path is not None:
        if made.model.kind != "hf":
            refuse(
                cfg, "model.path", f"has no effect with model={made.model.name}, whose weights are the seed's"
            )
        made.model.path = cfg.model.path
    samples = read_samples(folder)
    allowed = chosen_indices(samples, list(cfg.domains), list(cfg.ids), f"store={folder}")
    if allowed is not None:  # of a store that is not complete, some are not there yet
        allowed = np.intersect1d(allowed, store.sample_ids)
    check_k(cfg, len(store) if allowed is None else len(allowed), f"store={folder}")
    queries = build_queries(cfg, made, facts)
    number = number_of_queries(cfg, len(queries))
    texts = training_set(made, store) if cfg.preview else None
    task, model = rebuild(made, facts, store)
    engine = GradProjLoRAEngine(model, projection_config(made, task))
    store.check_matches(engine.layout, engine.projection, {"model": store.fingerprints["model"]})
    rows = project_queries(engine, task, queries, number, made.trainer.batch_size)
    names = list(zip(queries.sample_ids[:number], queries.domains[:number], strict=True))
    found = find_both_ends(cfg, store, rows, allowed, names, samples)
    if texts is not None:
        asked = {name: queries.preview(i) for i, (name, _) in enumerate(names)}
        shown = set(found["index"].to_pylist())
        found = with_texts(found, {texts.sample_ids[i]: texts.preview(i) for i in shown}, asked)
    return Answers(found, number, str(cfg.metric), TITLES)


def find_both_ends(
    cfg: DictConfig,
    store: ProjectionStore,
    rows: torch.Tensor,
    allowed: np.ndarray | None,
    names: list[tuple[str, str]],
    samples: pa.Table,
) -> pa.Table:
    """The samples found for the queries `rows` `[q, K]`. The lowest are the highest for the opposite query:
    its inner products are the same numbers with the other sign.
    """
    tables = []
    for end, sign in ((HIGHEST, 1), (LOWEST, -1))[: 1 + cfg.query.lowest]:
        found, scores = store.search(
            sign * rows, cfg.k, metric=str(cfg.metric), weights=dict(cfg.weights) or None, sample_ids=allowed
        )
        # Adding 0.0 makes the zero of an opposite query a plain one.
        tables.append(neighbour_table(names, found.numpy(), sign * scores.numpy() + 0.0, samples, end))
    return pa.concat_tables(tables)


def training_set(made: DictConfig, store: ProjectionStore) -> SampleSet:
    """The samples that the store was made of, built again for their text.

    Raises:
        ConfigError: What the store's config describes is something else now.
        DataError: It is there no longer.
    """
    data = build_data(made.data)
    if data.fingerprint != store.fingerprints["data"]:
        raise ConfigError(
            f"preview=true: the data that store={store.directory} was made of have changed since, so their "
            "text may be another: type preview=false, or restore them"
        )
    return data.train


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


KIND = Kind(
    settings={
        "metric": "cosine",
        "weights": {},
        "model.path": None,
        "data": None,
        "hardware.device": "auto",
        "hardware.threads": None,
        "query.text": None,
        "query.text_field": "text",
        "query.split": "val",
        "query.samples": None,
    },
    check=check,
    answers=answers,
)
