"""Values every training sample, drops the worst, trains again, and says what that was worth.

python -m runners.retrain experiment=digits
"""

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from analysis.aggregate.command import aggregate_runs
from analysis.aggregate.tables import read_aggregate, write_aggregate
from analysis.compare.command import print_comparison, write_comparison
from analysis.compare.comparison import COMPARISON_FILE, Comparison, compare
from analysis.errors import AnalysisError
from analysis.lists import write_list
from analysis.report import write_comparison_report
from analysis.runs import Run
from analysis.select.command import never_scored, outcome
from analysis.select.rules import Side, described
from analysis.select.selection import Parted, list_of, random_samples, random_samples_per_domain, select
from conf.command import CONF_DIR, Reported, compose_and_run, exit_code
from conf.errors import UserError
from ghost.errors import GhostError
from runners.cli import refuse_earlier_run
from runners.config import GROUPS
from runners.dryrun import data_facts, memory_rows, planned_memory
from runners.experiment_file import register_experiment_files
from runners.report import REPORT_FILE
from runners.retrain_config import again_config, check_retrain, number_of_runs, score_config, test_samples
from runners.retrain_runs import Runs, begin
from runners.summary import print_ways_on
from runners.tracking import NullTracker, build_tracker, flatten

log = logging.getLogger(__name__)

RESULTS, AGGREGATE, DROPPED = "results", "aggregate", "drop.parquet"
FULL, WITHOUT, RANDOM = "full", "dropped", "random"
TRAJECTORY_POINTS = 1000
_TRACKED_AS = "mlflow-run-id"


def run(cfg: DictConfig) -> Comparison:
    """Score, select, train again and compare, as configured.

    Raises:
        ConfigError, DataError, AnalysisError, GhostError: A run or the selection cannot work as configured.
    """
    out, cwd = Path(cfg.output_dir), Path(HydraConfig.get().runtime.cwd)
    begin(cfg, out)
    (out / RESULTS).mkdir(exist_ok=True)
    log.info("If this is killed, it goes on with: %s", shlex.join([*_typed(), f"hydra.run.dir={out}"]))
    say_shared_seeds(cfg)
    with build_tracker(cfg.tracking, out, cwd, run_id=_earlier_run_id(out)) as tracker:
        _start(cfg, out, tracker)
        runs = Runs(out, cwd, number_of_runs(cfg), tracker.run_id)
        scored = [runs.made("score", seed, score_config(cfg, seed)) for seed in cfg.retrain.score_seeds]
        parted = chosen(cfg, scored, out / RESULTS)
        groups = train_again(cfg, runs, parted, out / RESULTS)
        found = compare(groups, FULL, None, cfg.retrain.target_loss)
        write_comparison(found, out / RESULTS)
        leave_comparison_report(out / RESULTS)
        tracker.log_metrics(0, _metrics(found))
        tracker.log_artifacts(out / RESULTS)
        tracker.finish()
        show(cfg, out, parted, found, tracker)
    return found


def _typed() -> list[str]:
    """The command, without Hydra's own settings."""
    return ["python", "-m", "runners.retrain", *HydraConfig.get().overrides.task]


def say_shared_seeds(cfg: DictConfig) -> None:
    """Warn of seeds that give values and train again."""
    if shared := sorted(set(cfg.retrain.score_seeds) & set(cfg.retrain.seeds)):
        log.warning(
            "retrain.seeds has %s of retrain.score_seeds: runs that start as those that gave the values may "
            "gain more from them than others would.",
            ", ".join(map(str, shared)),
        )


def chosen(cfg: DictConfig, scored: Sequence[Run], folder: Path) -> Parted:
    """Who is kept by the runs' values taken together; leaves their aggregate and the list of the dropped."""
    rule = cfg.retrain.select
    write_aggregate(aggregate_runs(scored, None, TRAJECTORY_POINTS), folder / AGGREGATE)
    values = read_aggregate(folder / AGGREGATE).values
    parted = select(values, rule, never_scored(scored[0].directory, values))
    write_list(
        list_of(parted, Side.drop, rule, f"the mean of {', '.join(one.name for one in scored)}"),
        folder / DROPPED,
    )
    return parted


def train_again(cfg: DictConfig, runs: Runs, parted: Parted, folder: Path) -> dict[str, list[Run]]:
    """The runs on all samples, without the dropped ones, and without random ones, seed by seed."""
    groups: dict[str, list[Run]] = {FULL: [], WITHOUT: [], RANDOM: []}
    dropped = parted.part(Side.drop)
    draw = random_samples_per_domain if cfg.retrain.controls_per_domain else random_samples
    for seed in cfg.retrain.seeds:
        groups[FULL].append(runs.made(FULL, seed, again_config(cfg, seed, None)))
        groups[WITHOUT].append(runs.made(WITHOUT, seed, again_config(cfg, seed, folder / DROPPED)))
        for number in range(cfg.retrain.controls):
            path = folder / f"{RANDOM}-{number}-seed-{seed}.parquet"
            write_list(draw(parted.table, dropped, (seed, number)), path)
            groups[RANDOM].append(runs.made(f"{RANDOM}-{number}", seed, again_config(cfg, seed, path)))
    return groups


def leave_comparison_report(results: Path) -> None:
    """Write `report.html` about the runs; that it cannot be written is logged and loses nothing else."""
    try:
        write_comparison_report(results / AGGREGATE, results / REPORT_FILE, results / COMPARISON_FILE)
    except (AnalysisError, OSError, ValueError) as error:
        log.error("The report could not be written: %s", error)


def show(cfg: DictConfig, out: Path, parted: Parted, found: Comparison, tracker: NullTracker) -> None:
    """The closing tables on the console."""
    console = Console()
    console.print(outcome(parted, described(cfg.retrain.select)))
    print_comparison(found, console)
    ways = {
        "Directory": str(out),
        "Results": str(out / RESULTS),
        "Report": str(out / RESULTS / REPORT_FILE),
        "Run it again": shlex.join(_typed()),
    }
    print_ways_on(console, ways, tracker.ui_command(), tracker.run_url())


def plan(cfg: DictConfig) -> Table:
    """What the command would do, and the memory of its largest run."""
    table = Table(title="dry run: nothing was trained", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    retrain, trainer = cfg.retrain, cfg.trainer
    runs = number_of_runs(cfg)
    table.add_row("runs that give values", f"{len(retrain.score_seeds)}")
    table.add_row("rule", described(retrain.select))
    table.add_row(
        "runs that train again", f"{len(retrain.seeds)} seeds × (full, dropped, {retrain.controls} random)"
    )
    table.add_row("runs in all", f"{runs:,}, one after another")
    table.add_row("steps in all", f"{runs * trainer.max_steps:,}")
    test = test_samples(cfg)
    table.add_row("held-out samples", f"{cfg.data.val_samples - test} to score with, {test} to compare on")
    score = score_config(cfg, 0)
    _, memory = memory_rows(lambda: planned_memory(score, data_facts(score)))[-1]
    table.add_row("memory of a scored run", memory)
    table.add_row("output directory", cfg.output_dir)
    return table


def _start(cfg: DictConfig, out: Path, tracker: NullTracker) -> None:
    """The MLflow run that all others are shown under; a command that is typed again takes it up."""
    resolved = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    tracker.start(flatten(resolved), {"retrain.group": "all"})  # type: ignore[arg-type]
    if tracker.run_id is not None:
        (out / _TRACKED_AS).write_text(tracker.run_id, encoding="utf-8")


def _earlier_run_id(out: Path) -> str | None:
    path = out / _TRACKED_AS
    return path.read_text(encoding="utf-8") if path.exists() else None


def _metrics(found: Comparison) -> Mapping[str, float]:
    """The contrasts as numbers by name."""
    metrics = {"comparison/target_loss": found.target}
    for one in found.contrasts:
        name = f"comparison/{one.group}_against_{one.against}"
        metrics[f"{name}/final_loss"] = one.final.mean
        if one.ratio is not None:
            metrics[f"{name}/ratio"] = one.ratio.mean
    return metrics


def task(cfg: DictConfig) -> None:
    """Hydra's task function. Raises as `runners.cli.task` does."""
    with Reported(UserError, GhostError):
        check_retrain(cfg)
        refuse_earlier_run(Path(cfg.output_dir), "output_dir")
        if cfg.dry_run:
            Console().print(plan(cfg))
        else:
            run(cfg)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return exit_code(_run, GROUPS)


def _run() -> None:
    register_experiment_files(sys.argv[1:], CONF_DIR / "experiment")
    compose_and_run("retrain", task)


if __name__ == "__main__":
    sys.exit(main())
