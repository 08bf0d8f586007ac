"""Parts training samples by their values: lists of what to keep and what to drop.

python -m analysis.select values=outputs/DAY/TIME method=quantile quantile=0.1 out=keep.parquet
"""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.errors import AnalysisError
from analysis.lists import ENDINGS, write_list
from analysis.select.rules import RuleConfig, Side, check_rule, described
from analysis.select.selection import METADATA, Parted, list_of, select
from analysis.sources import open_runs, refuse_idle_store
from conf.command import Reported, run_command
from conf.errors import ConfigError, UserError, first_line
from conf.refuse import refuse
from conf.schema import TrackingStore, key, schema_node

log = logging.getLogger(__name__)

VALUES, SAMPLES, RUNS = "values.parquet", "samples.parquet", "runs.parquet"
Written = StrEnum("Written", ["keep", "drop", "both"])


@dataclass
class SelectConfig(RuleConfig):
    """The whole tree of this command."""

    values: str = key("a run's directory or MLflow id, an aggregate's folder, or a values.parquet")
    tracking: TrackingStore = MISSING
    out: str | None = key("the list: .txt, .csv or .parquet; null: show the outcome and write nothing")
    write: Written = key("which list; both: out=NAME.parquet gives NAME-keep.parquet and NAME-drop.parquet")


ConfigStore.instance().store(name="schema_select", node=schema_node(SelectConfig), provider="ghostrunner")


def run(cfg: DictConfig) -> Parted:
    """Part the samples as configured, show how many go where, and write the lists.

    Raises:
        AnalysisError, ConfigError: The values cannot be read, or the rule does not fit them.
    """
    check_select(cfg)
    source = cfg["values"]  # as an attribute it is a method of the mapping
    with opened_values(source, cfg.tracking.uri, Path.cwd()) as path:
        values = read_table(path)
        parted = select(values, cfg, never_scored(path.parent, values))
    Console().print(outcome(parted, described(cfg)))
    if cfg.out is not None:
        for side, target in targets(Path(cfg.out), Written(cfg.write)).items():
            write_list(list_of(parted, side, cfg, source), target)
            log.info("%s: %d ids; train with data.%s=%s", target, len(parted.part(side)), side, target)
    return parted


def check_select(cfg: DictConfig) -> None:
    """Raises `ConfigError` for keys that cannot work, before anything is read."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"{missing[0]} has no value: type {missing[0]}=VALUE, see --help")
    check_rule(cfg)
    if cfg.out is None and cfg.write != Written.keep:
        refuse(cfg, "write", "has no effect without out=FILE: give it one")
    if cfg.out is not None and Path(cfg.out).suffix not in ENDINGS:
        refuse(cfg, "out", f"ends in none of {', '.join(ENDINGS)}: give it one of these endings")
    if cfg.out is not None:
        for path in targets(Path(cfg.out), Written(cfg.write)).values():
            if path.is_dir() or _is_other_table(path):
                refuse(cfg, "out", f"would replace {path}, which is no list of this command: name a new file")


def _is_other_table(path: Path) -> bool:
    """Whether a Parquet file is there that this command did not write, such as a run's own."""
    if path.suffix != ".parquet" or not path.is_file():
        return False
    try:
        return METADATA not in (pq.read_schema(path).metadata or {})
    except pa.ArrowException:
        return True


def targets(out: Path, written: Written) -> dict[Side, Path]:
    """The lists' paths."""
    if written != Written.both:
        return {Side(written): out}
    return {side: out.with_name(f"{out.stem}-{side}{out.suffix}") for side in Side}


@contextmanager
def opened_values(name: str, uri: str | None, cwd: Path) -> Iterator[Path]:
    """The path of the table of values that a name stands for; what is downloaded is removed at the end."""
    path = cwd / name
    refuse_idle_store(uri, [path])
    if path.is_file():
        yield path
    elif path.is_dir():
        if not (path / VALUES).is_file():
            raise AnalysisError(
                f"{path} has no {VALUES}: give a scored run's directory, or the folder that python -m "
                "analysis.aggregate makes of several"
            )
        yield path / VALUES
    else:
        with open_runs([name], uri, cwd) as runs:
            if len(runs) > 1:
                raise AnalysisError(
                    f"values={name} stands for {len(runs)} runs: give one, or make an aggregate of them "
                    "first (python -m analysis.aggregate)"
                )
            if not (runs[0].directory / VALUES).is_file():
                raise AnalysisError(f"run {name} has no {VALUES}: give a run that was scored")
            yield runs[0].directory / VALUES


def read_table(path: Path, columns: Sequence[str] = ()) -> pa.Table:
    """A Parquet table as it is.

    Raises:
        AnalysisError: It is damaged, or lacks one of the columns.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise AnalysisError(
            f"{path} is no table of values ({first_line(error)}): give a Parquet file"
        ) from error
    if absent := [name for name in columns if name not in table.column_names]:
        raise AnalysisError(f"{path} has no column {absent[0]}: it is not what a run writes")
    return table


def never_scored(folder: Path, values: pa.Table) -> pa.Table:
    """`sample_id` and `domain` of the training samples that a folder's runs had and its values lack.

    A run's samples are in the `samples.parquet` beside its values; those of an aggregate's runs in the
    directories that its `runs.parquet` names.
    """
    missing = pa.table({"sample_id": pa.array([], pa.string()), "domain": pa.array([], pa.string())})
    paths = _sample_files(folder)
    found = [path for path in paths if path.is_file()]
    if len(found) < max(len(paths), 1):
        log.warning(
            "%d of %d runs' %s are not there, so samples that were never scored may be unknown: a list of "
            "what to keep leaves these out, a list of what to drop does not.",
            max(len(paths), 1) - len(found), max(len(paths), 1), SAMPLES,
        )  # fmt: skip
    known = values["sample_id"].cast(pa.string()).combine_chunks()
    for path in found:
        samples = read_table(path, ("sample_id", "domain", "split"))
        train = samples.filter(pc.equal(samples["split"], "train")).select(["sample_id", "domain"])
        unknown = train.filter(pc.invert(pc.is_in(train["sample_id"], known)))
        known = pa.concat_arrays([known, unknown["sample_id"].combine_chunks()])
        missing = pa.concat_tables([missing, unknown])
    return missing


def _sample_files(folder: Path) -> list[Path]:
    if (folder / RUNS).is_file():
        directories = read_table(folder / RUNS, ("directory",))["directory"].to_pylist()
        return [Path(directory) / SAMPLES for directory in directories]
    return [folder / SAMPLES] if (folder / SAMPLES).is_file() else []


def outcome(parted: Parted, rule: str) -> Table:
    """How many samples of each domain go where, and the sums of their values."""
    table = Table(title=f"Samples by {rule}", title_justify="left")
    table.add_column("domain", overflow="fold")
    for heading in ("kept", "dropped", "without value", "sum of kept", "sum of dropped"):
        table.add_column(heading, justify="right", no_wrap=True)
    domains = parted.table["domain"].to_numpy()
    value = parted.table["value"].to_numpy().astype(np.float64)
    value = np.where(np.isfinite(value), value, 0.0)
    names = sorted(set(domains.tolist()))
    for name in [*names, None]:
        of = np.ones(len(domains), dtype=bool) if name is None else domains == name
        if name is None:
            table.add_section()
        kept, dropped = of & parted.kept, of & ~parted.kept
        table.add_row(
            Text("all" if name is None else name), f"{kept.sum():,}", f"{dropped.sum():,}",
            f"{(of & parted.unscored).sum():,}", f"{value[kept].sum():+.3e}", f"{value[dropped].sum():+.3e}",
        )  # fmt: skip
    return table


def task(cfg: DictConfig) -> None:
    """Hydra's task function: one selection."""
    with Reported(UserError):
        run(cfg)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("select", task, groups=())
