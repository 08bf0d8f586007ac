"""A finished run's files, read when they are asked for, each error naming the file that is wrong."""

import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor

from analysis.errors import AnalysisError

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"  # what makes a directory a run
ENVIRONMENT_FILE = "environment.json"
"""Code state, versions, device and MLflow run, which a run writes at its start."""

_SAMPLE_COLUMNS = {"index": pa.int64(), "sample_id": pa.string(), "domain": pa.string()}
_VALUE_COLUMNS = {
    "sample_id": pa.string(),
    "domain": pa.string(),
    "value": pa.float64(),
    "times_seen": pa.int64(),
}
_SCORE_COLUMNS = ("step", "sample", "score", "lr", "clip")
_CURVATURE = "curvature"  # of second-order scores
_WEIGHT = "weight"  # of runs with a policy


def load_run(run_dir: Path) -> "Run":
    """The run in a directory; its files are read on first use.

    Raises:
        AnalysisError: the directory is missing or holds no run.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise AnalysisError(f"{run_dir} is no directory: give the directory that a run left behind.")
    if not (run_dir / CONFIG_FILE).is_file():
        raise AnalysisError(f"{run_dir} holds no run: a run directory has a {CONFIG_FILE}.")
    return Run(run_dir, run_dir.absolute().name)


def score_note(config: Mapping[str, Any]) -> str:
    """What the values of a run with this config are, in one line for tables and plots."""
    sets = "; the loss is the sum of all validation sets'" if has_sets(config) else ""
    policy = policy_name(config)
    weighed = f"; each step's samples count as policy {policy} weighed them" if policy else ""
    return credit_note(config) + sets + weighed


def policy_name(config: Mapping[str, Any]) -> str | None:
    """By which policy a run with this config weighed the samples of its steps; None for an ordinary run."""
    name = config.get("policy", {}).get("name", "none")
    return None if name == "none" else str(name)


def has_sets(config: Mapping[str, Any]) -> bool:
    """Whether a run with this config has several validation objectives, whose values add up to a sample's."""
    return config.get("engine", {}).get("val_sets") not in (None, "one")


def optimizer_name(key: str) -> str:
    """An optimizer's name in words."""
    return {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}.get(key, key)


def credit_note(config: Mapping[str, Any]) -> str:
    """How a run with this config credits a step, whatever the loss."""
    optimizer = config["optimizer"]
    name = optimizer_name(optimizer["name"])
    engine = config.get("engine", {})
    if engine.get("preconditioner", "none") != "none":
        whole = {"step": "in that step alone", "trajectory": "over all steps to come"}[engine["credit"]]
        return f"gradient dot product weighted by what {name} makes of the batch, credited {whole}"
    order, what = "first-order", "plain gradient dot product"
    if is_second_order(config):
        order, what = "second-order", "plain gradient and Hessian products"
    if optimizer["name"] != "sgd":
        return f"{what}; the optimizer is {name}, so values are a {order} SGD proxy"
    if optimizer.get("momentum"):
        return f"{what}; momentum is not credited, so values are a {order} SGD proxy"
    return f"{order} In-Run Data Shapley ({what}, SGD)"


def is_second_order(config: Mapping[str, Any]) -> bool:
    """Whether values of a run with this config count what a step's samples take from each other."""
    return config.get("engine", {}).get("order") == 2


_SCORING = "graddotprod"  # the engine that gives values


@dataclass(frozen=True)
class Run:
    """A run directory. Every reader raises `AnalysisError` for a file that is missing or damaged.

    Attributes:
        directory: Where its files are.
        name: What tables and plots call it.
        run_id: Its id in MLflow, where it was found there.
    """

    directory: Path
    name: str
    run_id: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config, `config.yaml`."""
        path = self._existing(CONFIG_FILE)
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise _damaged(path, error) from error
        if not isinstance(config, dict):
            raise AnalysisError(f"{path} is damaged: it holds no mapping.")
        return config

    @cached_property
    def samples(self) -> pa.Table:
        """`samples.parquet`: `index` int64, `sample_id` string, `domain` string."""
        return self._table("samples.parquet", _SAMPLE_COLUMNS)

    @cached_property
    def splits(self) -> pa.ChunkedArray:
        """The column `split` of `samples.parquet`, in step with `samples`: "train" or "val"."""
        return self._table("samples.parquet", {"split": pa.string()})["split"]

    @cached_property
    def values(self) -> pa.Table:
        """`values.parquet`: `sample_id` string, `domain` string, `value` float64, `times_seen` int64."""
        engine = self.config.get("engine", {}).get("name", _SCORING)
        if engine != _SCORING and not (self.directory / "values.parquet").exists():
            raise AnalysisError(
                f"{self.directory} has no values, since engine={engine} gives none: give a run of "
                f"engine={_SCORING}"
            )
        return self._table("values.parquet", _VALUE_COLUMNS)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, oldest first; an unfinished last one (a killed run) is left out."""
        path = self._existing("metrics.jsonl")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            log.warning("%s ends in an unfinished line; it is left out", path)
            lines.pop()
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise AnalysisError(f"{path} is damaged: line {number} is no JSON ({error}).") from error
        return rows

    def series(self, name: str) -> dict[int, float]:
        """One metric by ascending step; empty where the run did not log it.

        NaN stands for NaN and infinities. Of lines that repeat a step (a resumed run) the last counts.
        """
        found = {row["step"]: row[name] for row in self.metrics if name in row}
        return {step: float("nan") if found[step] is None else float(found[step]) for step in sorted(found)}

    @property
    def has_shards(self) -> bool:
        """Whether the run left scores behind, or they were left here."""
        return any((self.directory / "scores").glob("shard-*.pt"))

    def shards(self) -> list[Path]:
        """The files of the score shards in the order written, those of all ranks together.

        Raises:
            AnalysisError: There is none, or one is missing.
        """
        return [path for paths in self.shards_of_ranks() for path in paths]

    def shards_of_ranks(self) -> list[list[Path]]:
        """The files of the score shards in the order written; those that the ranks of a run wrote of the same
        steps are one entry.

        Raises:
            AnalysisError: There is none, or one is missing.
        """
        folder = self.directory / "scores"
        found = {_shard_place(path): path for path in folder.glob("shard-*.pt")}
        if not found:
            raise AnalysisError(f"{folder} has no score shards: the run scored nothing or wrote nothing.")
        numbers, ranks = (range(max(place) + 1) for place in zip(*found, strict=True))
        for number, rank in product(numbers, ranks):
            if (number, rank) not in found:
                of_rank = f" of rank {rank}" if len(ranks) > 1 else ""
                raise AnalysisError(
                    f"{folder} lacks shard {number}{of_rank} of 0-{numbers[-1]}: sums would be wrong."
                )
        return [[found[number, rank] for rank in ranks] for number in numbers]

    def scores(self) -> Iterator[dict[str, Tensor]]:
        """The score shards in the order written, as `read_shard` reads them."""
        return map(read_shard, self.shards())

    def _existing(self, name: str) -> Path:
        path = self.directory / name
        if not path.is_file():
            raise AnalysisError(f"{path} is missing: the run has not ended, or ended before it was written.")
        return path

    def _table(self, name: str, columns: dict[str, pa.DataType]) -> pa.Table:
        path = self._existing(name)
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        if absent := [column for column in columns if column not in table.column_names]:
            present = ", ".join(table.column_names)
            raise AnalysisError(f"{path} has no column {absent[0]!r}; it has {present}.")
        try:
            return table.select(list(columns)).cast(pa.schema(columns))
        except pa.ArrowInvalid as error:
            raise _damaged(path, error) from error


def _shard_place(path: Path) -> tuple[int, int]:
    """A shard's number, and the rank that wrote it."""
    number, _, rank = path.stem.removeprefix("shard-").partition("-rank")
    return int(number), int(rank or 0)


def read_shard(path: Path) -> dict[str, Tensor]:
    """A score shard, mapped into memory rather than read.

    Returns:
        `step` `[n]` int64, `sample` `[n]` int64 (running index), `score` and `lr` `[n]` or `[n, K]`, `clip`
        `[n]`; of second-order scores `curvature`, shaped as `score`; of runs with a policy `weight` `[n]`;
        of pairs `val` `[n, V]`.

    Raises:
        AnalysisError: It is damaged.
    """
    try:
        shard = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise _damaged(path, error) from error
    further = {_CURVATURE, _WEIGHT} & set(shard) if isinstance(shard, dict) else set()
    names = (*_SCORE_COLUMNS, *further)
    columns = [shard.get(name) for name in names] if isinstance(shard, dict) else []
    if not columns or not all(isinstance(column, Tensor) and column.dim() > 0 for column in columns):
        raise AnalysisError(f"{path} is damaged: a shard holds the tensors {', '.join(_SCORE_COLUMNS)}.")
    lengths = {name: len(shard[name]) for name in names}
    shapes = {shard[name].shape for name in ("score", "lr", *(further & {_CURVATURE}))}
    if len(set(lengths.values())) > 1 or len(shapes) > 1:
        raise AnalysisError(f"{path} is damaged: its columns differ in length or width ({lengths}).")
    return shard


def _damaged(path: Path, error: Exception) -> AnalysisError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return AnalysisError(f"{path} is damaged: {lines[0]}")
