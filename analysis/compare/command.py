"""Holds groups of finished runs against each other.

python -m analysis.compare 'groups.full=[A,B]' 'groups.dropped=[C,D]' baseline=full out=FOLDER
"""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import json
import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.compare.comparison import COMPARISON_FILE, Comparison, Contrast, compare, reading
from analysis.compare.contrasts import Estimate
from analysis.compare.outcomes import SPLITS, Outcome
from analysis.errors import AnalysisError
from analysis.sources import open_runs
from conf.command import Reported, run_command
from conf.errors import ConfigError, UserError, first_line
from conf.help_text import typed
from conf.refuse import refuse
from conf.schema import TrackingStore, free, key, schema_node, several
from ghost.atomic import written_beside

log = logging.getLogger(__name__)

CLEAR = "Clear: the 95 % interval over seeds leaves out no difference (× 1, or 0)."


@dataclass
class CompareConfig:
    """The whole tree of this command."""

    groups: dict[str, Any] = free(
        "the runs of the group KEY, NAME or [NAME,NAME]: directories, folders, MLflow ids, experiments"
    )
    baseline: str = key("the group that all others are held against")
    metric: str | None = key("loss that is compared; null: test/loss where all runs have it, else val/loss")
    target_loss: float | None = key(
        "loss to reach; null: the largest of the best losses of the baseline's runs, which all of these reach"
    )
    tracking: TrackingStore = MISSING
    out: str | None = key("folder that comparison.json goes to; null: print only")


ConfigStore.instance().store(name="schema_compare", node=schema_node(CompareConfig), provider="ghostrunner")


def run(cfg: DictConfig) -> Comparison:
    """Compare as configured, print the tables, and write `comparison.json`.

    Raises:
        AnalysisError, ConfigError: A run cannot be read, or the runs do not compare.
    """
    check_compare(cfg)
    with ExitStack() as opened:
        groups = {
            str(name): opened.enter_context(open_runs(several(members), cfg.tracking.uri, Path.cwd()))
            for name, members in cfg.groups.items()
        }
        _refuse_twice({name: [run.directory for run in runs] for name, runs in groups.items()})
        found = compare(groups, cfg.baseline, cfg.metric, cfg.target_loss)
    print_comparison(found, Console())
    if cfg.out is not None:
        log.info("Wrote %s", write_comparison(found, Path(cfg.out)))
    return found


def check_compare(cfg: DictConfig) -> None:
    """Raises `ConfigError` for keys that cannot work, before anything is read."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"{missing[0]} has no value: type {missing[0]}=VALUE, see --help")
    if len(cfg.groups) < 2:
        raise ConfigError(
            f"groups has {len(cfg.groups)} of the two or more groups to compare: type groups.NAME=[RUN,RUN]"
        )
    for name, members in cfg.groups.items():
        if not several(members):
            refuse(cfg, f"groups.{name}", "must name one or more runs, such as [RUN,RUN]")
    if cfg.baseline not in cfg.groups:
        refuse(cfg, "baseline", f"is none of the groups {typed(list(cfg.groups))}: type one of them")
    if cfg.metric not in (None, *SPLITS):
        refuse(cfg, "metric", f"is no loss of held-out samples: type one of {', '.join(SPLITS)}, or null")
    if cfg.target_loss is not None and not math.isfinite(cfg.target_loss):
        refuse(cfg, "target_loss", "is no number that a loss can reach: type a finite one, or null")


def _refuse_twice(directories: dict[str, list[Path]]) -> None:
    group_of: dict[Path, str] = {}
    for name, paths in directories.items():
        for path in paths:
            if path in group_of:
                raise ConfigError(
                    f"groups.{name} has the run {path}, which groups.{group_of[path]} has too: give it to one"
                )
            group_of[path] = name


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write `comparison.json` into the folder, atomically, and return its path.

    Raises:
        AnalysisError: The system refuses.
    """
    path = folder / COMPARISON_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as partial:
            partial.write_text(
                json.dumps(comparison.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8"
            )
    except OSError as error:
        raise AnalysisError(f"{path} cannot be written ({first_line(error)}): name another folder") from error
    return path


def print_comparison(found: Comparison, console: Console) -> None:
    """Print what each group reached, the contrasts, and what to know about them."""
    console.print(_group_table(found))
    console.print(_contrast_table(found))
    for one in found.contrasts:
        console.print(Text(f"{reading(one, found.unit)}."), soft_wrap=True, highlight=False)
    console.print(Text(CLEAR), soft_wrap=True, highlight=False)
    own = [f"{one.group} against {one.against}: {one.note}" for one in found.contrasts if one.note]
    for note in [*found.notes, *own]:
        console.print(Text(f"Note: {note}."), soft_wrap=True, highlight=False)


def _group_table(found: Comparison) -> Table:
    table = Table(
        title=f"{found.metric}: target {found.target:.4g}, {found.target_rule}", title_justify="left"
    )
    table.add_column("group", overflow="fold")
    for heading in ("runs", "seeds", "steps to target", "final loss", "best loss"):
        table.add_column(heading, justify="right")
    for name, runs in found.groups.items():
        table.add_row(
            Text(name), str(len(runs)), str(len({one.seed for one in runs})), _steps(runs),
            f"{fmean(one.final_loss for one in runs):.4f}", f"{fmean(one.best_loss for one in runs):.4f}",
        )  # fmt: skip
    return table


def _steps(runs: Sequence[Outcome]) -> str:
    """The mean, and how many runs never got there: `> 200` where none did."""
    reached = [one.steps_to_target for one in runs if one.steps_to_target is not None]
    if not reached:
        return f"> {min(one.last_step for one in runs):,}"
    missing = len(runs) - len(reached)
    mean = f"{fmean(reached):,.1f}"
    return f"{mean} ({missing} never)" if missing else mean


def _contrast_table(found: Comparison) -> Table:
    table = Table(title="Contrasts, with 95 % intervals", title_justify="left")
    table.add_column("contrast", overflow="fold")
    for heading in (f"{found.unit} to target", "final loss", "pairs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.contrasts:
        name = Text(f"{one.group} against {one.against}")
        table.add_row(name, ratio_text(one), _difference(one.final), str(one.pairs))
    return table


def ratio_text(one: Contrast) -> str:
    """`× 0.71 (0.64 to 0.79)`, or its bound, or a dash."""
    if one.ratio is not None:
        ends = "" if one.ratio.low is None else f" ({one.ratio.low:.3g} to {one.ratio.high:.3g})"
        return f"× {one.ratio.mean:.3g}{ends}"
    for bound, sign in ((one.at_least, ">"), (one.at_most, "<")):
        if bound is not None:
            return f"× {sign} {bound:.3g}"
    return "–"


def _difference(estimate: Estimate) -> str:
    ends = "" if estimate.low is None else f" ({estimate.low:+.3g} to {estimate.high:+.3g})"
    return f"{estimate.mean:+.3g}{ends}"


def task(cfg: DictConfig) -> None:
    """Hydra's task function: one comparison."""
    with Reported(UserError):
        run(cfg)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("compare", task, groups=())
