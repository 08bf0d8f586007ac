"""Writes a report as one HTML file: of a run, or of several that were aggregated.

python -m analysis.report run=outputs/DAY/TIME out=report.html
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from analysis.report import write_comparison_report, write_run_report
from analysis.report.texts import read_texts
from analysis.sources import open_runs
from conf.command import Reported, run_command
from conf.errors import ConfigError, UserError
from conf.refuse import refuse
from conf.schema import TrackingStore, key, schema_node
from ghost import GhostError

log = logging.getLogger(__name__)


@dataclass
class ReportConfig:
    """The whole tree of this command."""

    run: str | None = key("run directory, or id of an MLflow run: a report of this run")
    aggregate: str | None = key(
        "folder that analysis.aggregate wrote: a report of its runs beside each other"
    )
    comparison: str | None = key(
        "comparison.json that analysis.compare wrote, shown too (aggregate); null: the one in the folder, if "
        "any"
    )
    texts: str | None = key("JSONL of sample_id and text: first words beside the ids (run); null: ids alone")
    tracking: TrackingStore = MISSING
    out: str = key("HTML file to write")


ConfigStore.instance().store(name="schema_report", node=schema_node(ReportConfig), provider="ghostrunner")


def report(cfg: DictConfig) -> Path:
    """Write the report and return its path.

    Raises:
        ConfigError, AnalysisError: The keys do not go together, or what they name cannot be read.
    """
    check_report(cfg)
    out = Path(cfg.out)
    if cfg.aggregate is not None:
        comparison = Path(cfg.comparison) if cfg.comparison is not None else None
        return write_comparison_report(Path(cfg.aggregate), out, comparison)
    previews = read_texts(Path(cfg.texts)) if cfg.texts is not None else None
    with open_runs([cfg.run], cfg.tracking.uri, Path.cwd()) as runs:
        if len(runs) > 1:
            refuse(
                cfg,
                "run",
                f"is {len(runs)} runs: name one of them, or aggregate them and type aggregate=FOLDER",
            )
        return write_run_report(runs[0], out, previews)


def check_report(cfg: DictConfig) -> None:
    """Raises `ConfigError` for keys that do not go together, before anything is read."""
    if (cfg.run is None) == (cfg.aggregate is None):
        raise ConfigError("run and aggregate: type exactly one of run=DIRECTORY and aggregate=FOLDER")
    idle = ("texts", "tracking.uri") if cfg.run is None else ("comparison",)
    other = "aggregate" if cfg.run is None else "run"
    for name in idle:
        if OmegaConf.select(cfg, name) is not None:
            refuse(cfg, name, f"has no effect on a report of {other}={cfg[other]}: leave it out")
    if Path(cfg.out).suffix not in (".html", ".htm"):
        refuse(cfg, "out", "is no HTML file: type a name that ends in .html")
    if Path(cfg.out).is_dir() or not Path(cfg.out).absolute().parent.is_dir():
        refuse(cfg, "out", "cannot be written: name a file in a folder that is there")


def task(cfg: DictConfig) -> None:
    """Hydra's task function: one report."""
    with Reported(UserError, GhostError):
        log.info("Wrote %s", report(cfg))


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("report", task, groups=())
