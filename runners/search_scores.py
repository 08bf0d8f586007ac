"""Search of a scored run: the samples of highest value for a column of its scores, and of lowest."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from omegaconf import DictConfig, ListConfig, OmegaConf

from analysis.runs import Run, credit_note
from analysis.sources import open_runs
from conf.errors import ConfigError
from conf.refuse import refuse
from runners.data import build_data
from runners.data.base import DataBundle
from runners.neighbours import HIGHEST, LOWEST, chosen_indices, neighbour_table, with_texts
from runners.search_columns import Columns
from runners.search_kind import Answers, Kind, check_k

log = logging.getLogger(__name__)

TITLES = {HIGHEST: "Training samples of highest value", LOWEST: "Training samples of lowest value"}
READING = "Positive: the sample lowered the query's loss; negative: it raised it"


def check(cfg: DictConfig) -> None:
    """Raises `ConfigError` for queries that cannot be, before anything is read."""
    names = queried(cfg)
    if len(set(names)) < len(names):
        refuse(cfg, "query.column", "names a column twice: type each once")
    if cfg.tracking.uri is not None and Path(cfg.run).is_dir():
        refuse(cfg, "tracking.uri", f"has no effect with the directory run={cfg.run}: type tracking.uri=null")


def queried(cfg: DictConfig) -> list[str]:
    """The names in `query.column`, which may be one or a list; null is none."""
    given = cfg.query.column
    if given is None:
        return []
    return [str(name) for name in (given if isinstance(given, ListConfig) else [given])]


def answers(cfg: DictConfig) -> Answers:
    """The samples of highest value for every column that is asked about, and of lowest where asked for.

    Raises:
        ConfigError, DataError, AnalysisError: The run has no such columns, or a file is missing or damaged.
    """
    with opened_run(cfg) as run:
        columns = Columns(run, cfg.run)
        names = queried(cfg)
        if not names:
            raise ConfigError(columns.advice())
        values = {name: columns.values(name) for name in names}
        samples = columns.samples
        chosen = chosen_indices(samples, list(cfg.domains), list(cfg.ids), f"run={cfg.run}")
        searched = np.ones(len(samples), bool) if chosen is None else np.isin(samples["index"], chosen)
        rows = pa.concat_tables(
            ranked(cfg, name, columns.domain(name), values[name], samples, searched, end)
            for end in (HIGHEST, LOWEST)[: 1 + cfg.query.lowest]
            for name in names
        )
        if cfg.preview:
            rows = with_texts(rows, *texts(cfg, run, rows, names))
        return Answers(rows, len(names), "value", TITLES, f"{READING} ({credit_note(run.config)}).")


def ranked(
    cfg: DictConfig,
    name: str,
    domain: str,
    values: NDArray[np.float64],
    samples: pa.Table,
    searched: NDArray[np.bool_],
    end: str,
) -> pa.Table:
    """The outermost samples of one query; equal ones in the order of their running index.

    Args:
        values: `[n]`, of each of `samples`.
        searched: `[n]`, which of them may be found.
    """
    places = np.flatnonzero(searched & np.isfinite(values))
    if lost := int(searched.sum()) - len(places):
        log.warning("%d samples have no finite value for %s and are left out.", lost, name)
    check_k(cfg, len(places), f"run={cfg.run}")
    sign = -1 if end == HIGHEST else 1
    best = places[np.argsort(sign * values[places], kind="stable")[: cfg.k]]
    indices = samples["index"].to_numpy()[best]
    return neighbour_table([(name, domain)], indices[None], values[best][None], samples, end)


def texts(
    cfg: DictConfig, run: Run, rows: pa.Table, names: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """First words by id: of the samples in the rows, and of the queries that are validation samples.

    Raises:
        ConfigError: What the run's config describes are other samples now.
        DataError: They are there no longer.
    """
    made = OmegaConf.create(run.config)
    data = build_data(made.data)
    refuse_other_samples(cfg, run, data)
    train = {name: i for i, name in enumerate(data.train.sample_ids)}
    val = {name: i for i, name in enumerate(data.val.sample_ids)}
    shown = {name: data.train.preview(train[name]) for name in pc.unique(rows["sample_id"]).to_pylist()}
    return shown, {name: data.val.preview(val[name]) for name in names if name in val}


def refuse_other_samples(cfg: DictConfig, run: Run, data: DataBundle) -> None:
    """Raises `ConfigError` where the sources give other ids than the run had, so that text would be wrong."""
    sets = [data.train, data.val, *([] if data.test is None else [data.test])]
    now = {samples.offset + i: name for samples in sets for i, name in enumerate(samples.sample_ids)}
    for index, name in zip(
        run.samples["index"].to_pylist(), run.samples["sample_id"].to_pylist(), strict=True
    ):
        if now.get(index) != name:
            raise ConfigError(
                f"preview=true: the data that run={cfg.run} was made of have changed since, {name!r} being "
                f"{now.get(index)!r} now: type preview=false, or restore them"
            )


@contextmanager
def opened_run(cfg: DictConfig) -> Iterator[Run]:
    """The run that `run` names; the files of one in MLflow are there within the block.

    Raises:
        AnalysisError, ConfigError: There is no such run, or there are several.
    """
    with open_runs([cfg.run], cfg.tracking.uri, Path.cwd()) as runs:
        if len(runs) > 1:
            refuse(cfg, "run", f"stands for {len(runs)} runs, such as {runs[0].name}: name one of them")
        yield runs[0]


KIND = Kind(settings={"query.column": [], "tracking.uri": None}, check=check, answers=answers)
