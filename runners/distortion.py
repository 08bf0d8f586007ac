"""Measures what projections lose: inner products of projected gradients against exact ones.

python -m runners.distortion model=gpt2-mini data=interpreter distortion.ranks=[16,64,256]
"""

import logging
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor, nn

from analysis.distortion import plot_distortion
from conf.command import Reported, run_command
from conf.errors import ConfigError, UserError
from ghost import GhostConfig, GradProjLoRAEngine
from ghost.batch import Inputs, take_rows
from ghost.distortion import dense_error, measured_distortion, parameter_errors
from ghost.errors import GhostError
from ghost.gram import Gram, exact_gram
from ghost.projection import ProjectionKind
from runners.cli import refuse_earlier_run
from runners.data import build_data
from runners.data.base import DataBundle
from runners.data.loader import train_batches
from runners.distortion_config import check_distortion
from runners.distortion_report import Draw, Measurement, metrics, samples, table, write_report
from runners.layers import layer_selection
from runners.losses import Task, build_task
from runners.report import REPORT_FILE, headline, leave_report
from runners.summary import print_whole
from runners.tracking import NullTracker, build_tracker
from runners.train import build_placed, prepare_machine, record_setup

log = logging.getLogger(__name__)

REPORT, PLOT = "distortion.json", Path("plots/distortion.png")


def run(cfg: DictConfig) -> list[Measurement]:
    """Measure as configured, and leave the report, the plot and the record behind.

    Raises:
        ConfigError, DataError, GhostError: The config, the data or the model cannot work.
    """
    out = Path(cfg.output_dir)
    device = prepare_machine(cfg)
    with build_tracker(cfg.tracking, out, Path(HydraConfig.get().runtime.cwd)) as tracker:
        data = build_data(cfg.data)
        log.info("%s", data.description)
        index, X, Y = _samples(cfg, data)
        # Dropout would make every pass another network's.
        model = build_placed(cfg, data, device).eval()
        record_setup(cfg, out, device, data, tracker)
        _warn_of_rounding(cfg)
        task = build_task(cfg, device)
        found = measure(cfg, model, task, *task.place(X, Y))
        sample_ids = [data.train.sample_ids[i - data.train.offset] for i in index.tolist()]
        write_report(found, sample_ids, cfg.model.name, out / REPORT)
        plot_distortion(out / REPORT, out / PLOT)
        for step, values in metrics(found).items():
            tracker.log_metrics(step, values)
        leave_report(out, None)
        tracker.describe(headline(out))
        tracker.log_artifacts(out)
        tracker.finish()
        _say_left_out(len(Y) - samples(found))
        print_whole(table(found))
        _log_ways_on(out, tracker)
        return found


def measure(cfg: DictConfig, model: nn.Module, task: Task, X: Inputs, Y: Tensor) -> list[Measurement]:
    """Project the samples at every rank, with every kind and seed, and compare with the exact products."""
    plan = {
        (rank, kind): [_engine_config(cfg, task, rank, kind, seed) for seed in cfg.distortion.seeds]
        for rank in cfg.distortion.ranks
        for kind in map(str, cfg.distortion.kinds)
    }
    first = next(iter(plan.values()))[0]
    parameters = GradProjLoRAEngine(model, first).layout.parameters
    gram = _exact(cfg, model, task, X, Y, parameters)
    found = []
    for (rank, kind), configs in plan.items():
        started = time.monotonic()
        engines = (GradProjLoRAEngine(model, config) for config in configs)
        draws = [_draw(engine, _project(cfg, engine, task, X, Y), gram) for engine in engines]
        found.append(Measurement(rank, kind, draws))
        seconds = time.monotonic() - started
        log.info("Rank %d, %s: error %.3f (%.1f s)", rank, kind, found[-1].rms, seconds)
    return found


def _samples(cfg: DictConfig, data: DataBundle) -> tuple[Tensor, Inputs, Tensor]:
    """Running indices, inputs and labels of the samples that are compared."""
    wanted = cfg.distortion.samples
    if wanted > len(data.train):
        raise ConfigError(
            f"distortion.samples={wanted} is more than the {len(data.train)} training samples: use at most "
            f"{len(data.train)}, or more data."
        )
    batch = next(train_batches(data.train, wanted, cfg.seed, cfg.data.shuffle, num_workers=0))
    return batch.index, batch.inputs, batch.labels


def _engine_config(cfg: DictConfig, task: Task, rank: int, kind: str, seed: int) -> GhostConfig:
    return GhostConfig(
        engine="gradprojlora",
        loss_reduction=task.reduction,
        selection=layer_selection(cfg.layers),
        include_embeddings=cfg.distortion.include_embeddings,
        proj_rank_total=rank,
        proj_rank_min=cfg.distortion.rank_min,
        proj_kind=ProjectionKind(kind),
        proj_seed=seed,
    )


def _exact(
    cfg: DictConfig, model: nn.Module, task: Task, X: Inputs, Y: Tensor, parameters: Collection[str]
) -> Gram:
    started = time.monotonic()
    config = GhostConfig(loss_reduction=task.reduction)
    gram = exact_gram(model, config, X, Y, task.mean, parameters=parameters, block=cfg.distortion.batch_size)
    seconds = time.monotonic() - started
    log.info("Exact inner products of %d samples over %d parameters: %.1f s", len(Y), len(gram), seconds)
    return gram


def _project(cfg: DictConfig, engine: GradProjLoRAEngine, task: Task, X: Inputs, Y: Tensor) -> Tensor:
    """The samples' rows `[n, K]`."""
    with engine.attached():
        rows = [engine.project(*part, task.mean) for part in _batches(X, Y, cfg.distortion.batch_size)]
    return torch.cat(rows)


def _batches(X: Inputs, Y: Tensor, size: int) -> Iterator[tuple[Inputs, Tensor]]:
    for start in range(0, len(Y), size):
        rows = slice(start, start + size)
        yield take_rows(X, rows), Y[rows]


def _draw(engine: GradProjLoRAEngine, rows: Tensor, gram: Gram) -> Draw:
    layout = engine.layout
    return Draw(
        layout,
        measured_distortion(rows, layout, gram),
        dense_error(layout, gram),
        parameter_errors(rows, layout, gram),
    )


def _warn_of_rounding(cfg: DictConfig) -> None:
    """Where gradients themselves have few digits, two passes differ by more than the projection."""
    for key in ("model", "autocast"):
        if cfg.dtype[key] == "bfloat16":
            log.warning(
                "dtype.%s=bfloat16: errors include this format's own rounding; dtype=fp32 leaves the "
                "projections' alone.",
                key,
            )


def _say_left_out(number: int) -> None:
    if number:
        log.warning("%d samples are left out: their gradient is zero, as without a counted label.", number)


def _log_ways_on(out: Path, tracker: NullTracker) -> None:
    log.info("Report: %s", out / REPORT)
    log.info("Plot: %s", out / PLOT)
    log.info("Page: %s", out / REPORT_FILE)
    if (command := tracker.ui_command()) is not None:
        log.info("Open MLflow: %s", command)
    if (url := tracker.run_url()) is not None:
        log.info("This run's page: %s", url)


def job(cfg: DictConfig) -> None:
    """Hydra's task function: one measurement. Raises as `runners.cli.task` does."""
    with Reported(UserError, GhostError):
        check_distortion(cfg)
        refuse_earlier_run(Path(cfg.output_dir), "output_dir")
        run(cfg)


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return run_command("distortion", job, groups=("model", "data", "layers", "dtype", "hardware", "tracking"))


if __name__ == "__main__":
    sys.exit(main())
