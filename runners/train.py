"""One run: build what the config names, train it, and leave its values, plots and record behind."""

import json
import logging
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from analysis.errors import AnalysisError
from analysis.plots import plot_run
from analysis.runs import score_note
from ghost import GhostConfig, GhostEngineManager, Selection
from ghost.batch import take_rows
from ghost.coverage import coverage
from ghost.values import accumulate, read_shards
from runners.data import build_data
from runners.data.base import DataBundle
from runners.data.loader import train_batches, val_batch, write_samples
from runners.environment import device_description, git_state, versions
from runners.errors import ConfigError
from runners.loop import VAL_LOSS, TrainingLoop, evaluate
from runners.losses import Task, build_task
from runners.models import build_model, parameter_dtype
from runners.optim import build_optimizer, build_schedule
from runners.progress import StatusLine
from runners.summary import print_summary, replay_command
from runners.tracking import NullTracker, build_tracker, flatten

log = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parent.parent

VALUES_FILE = "values.parquet"

VALUES_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("domain", pa.string()), ("value", pa.float64()), ("times_seen", pa.int64())]
)


def run(cfg: DictConfig) -> float:
    """Train (or evaluate) as configured; returns the final validation loss.

    Raises:
        ConfigError, DataError, GhostError: The config, the data or the model cannot work, before training
            starts.
    """
    out = Path(cfg.output_dir)
    device = prepare_machine(cfg)
    with build_tracker(cfg.tracking, out, Path(HydraConfig.get().runtime.cwd)) as tracker:
        data = build_data(cfg.data, cfg.seed)
        log.info("%s", data.description)
        model = build_model(cfg.model, data.vocab_size, data.input_shape, data.num_classes)
        model.to(device=device, dtype=parameter_dtype(cfg.dtype))
        record_setup(cfg, out, device, data, tracker)
        if cfg.trainer.eval_only:
            val_loss = evaluate_only(cfg, model, data, device, tracker)
        else:
            val_loss = train(cfg, out, model, data, device, tracker)
            write_results(cfg, out, data)
        tracker.log_artifacts(out)
        tracker.finish()
        if not cfg.trainer.eval_only:
            show_summary(cfg, out, data, tracker)
        return val_loss


def prepare_machine(cfg: DictConfig) -> torch.device:
    """Seeds, threads, and the device that the run takes.

    Raises:
        ConfigError: There is no such device.
    """
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    if cfg.hardware.threads is not None:
        torch.set_num_threads(cfg.hardware.threads)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.hardware.device == "cuda" and found != "cuda":
        raise ConfigError(
            "hardware.device=cuda, but PyTorch sees no CUDA device here: use hardware=auto or hardware=cpu."
        )
    return torch.device(found if cfg.hardware.device == "auto" else str(cfg.hardware.device))


def record_setup(
    cfg: DictConfig, out: Path, device: torch.device, data: DataBundle, tracker: NullTracker
) -> None:
    """Start the record: resolved config, code state, versions, device, seed and data."""
    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    OmegaConf.save(OmegaConf.create(resolved), out / "config.yaml")
    write_samples(data, out / "samples.parquet")
    git = git_state(PROJECT)
    if git.diff:
        (out / "git.diff").write_text(git.diff, encoding="utf-8")
    tags = {f"version.{name}": version for name, version in versions().items()}
    tags |= {"git.commit": git.commit or "unknown", "git.dirty": str(git.dirty).lower()}
    tags |= {
        "device": device_description(device),
        "seed": str(cfg.seed),
        "data.fingerprint": data.fingerprint,
    }
    log.info("Running on %s", tags["device"])
    tracker.start(flatten(resolved), tags)


def evaluate_only(
    cfg: DictConfig, model: nn.Module, data: DataBundle, device: torch.device, tracker: NullTracker
) -> float:
    """The validation loss of the model as it is."""
    val_loss = evaluate(model, data.val, build_task(cfg, device), cfg.trainer.eval_batch_size)
    tracker.log_metrics(0, {VAL_LOSS: val_loss})
    log.info("Validation loss %.4f over %d samples", val_loss, len(data.val))
    return val_loss


def train(
    cfg: DictConfig, out: Path, model: nn.Module, data: DataBundle, device: torch.device, tracker: NullTracker
) -> float:
    """The training loop around the configured engine; returns the final validation loss."""
    task = build_task(cfg, device)
    optimizer = build_optimizer(cfg.optimizer, model)
    batches = train_batches(
        data.train, cfg.trainer.batch_size, cfg.seed, cfg.data.shuffle, cfg.data.num_workers
    )
    rows = val_batch(data.val)
    val_data = task.place(rows.inputs, rows.labels)
    config = ghost_config(cfg, out, task)
    if is_scored(cfg):
        write_coverage(model, config, task, val_data, out / "coverage.json")
    manager = GhostEngineManager(config, model, optimizer, val_data=val_data, loss_fn=task.mean)
    called: Any = torch.compile(model) if cfg.trainer.compile else model
    try:
        with StatusLine(cfg.trainer.max_steps, sys.stderr) as status:
            loop = TrainingLoop(
                cfg=cfg, model=called, task=task, manager=manager, optimizer=optimizer,
                schedule=build_schedule(cfg.trainer, optimizer), batches=batches, val=data.val,
                tracker=tracker, status=status,
            )  # fmt: skip
            return loop.run()
    finally:
        manager.cleanup()


def ghost_config(cfg: DictConfig, out: Path, task: Task) -> GhostConfig:
    """The manager's settings."""
    if not is_scored(cfg):
        return GhostConfig(engine="regular")
    settings = {
        "engine": str(cfg.engine.name),
        "val_mode": str(cfg.engine.val_mode),
        "val_batch_size": cfg.engine.val_batch_size,
        "val_every": cfg.engine.val_every,
        "bitwise": cfg.engine.bitwise,
        "algebra": str(cfg.engine.algebra),
        "loss_reduction": task.reduction.value,
        "selection": Selection(
            tuple(cfg.layers.include), tuple(cfg.layers.exclude), tuple(str(f) for f in cfg.layers.families)
        ),
        "score_dtype": getattr(torch, cfg.dtype.score),
        "storage_dtype": getattr(torch, cfg.dtype.storage),
        "gradient_accumulation_steps": cfg.trainer.gradient_accumulation_steps,
        "result_dir": str(out),
        "save_interval": cfg.trainer.flush_every,
    }
    return GhostConfig.read(settings)


def write_coverage(
    model: nn.Module, config: GhostConfig, task: Task, val_data: tuple[Any, Any], path: Path
) -> None:
    """Measure on the validation rows of one step what the scores will speak of."""
    X, Y = val_data
    rows = slice(0, config.val_batch_size)
    with torch.random.fork_rng(task.cuda_devices()):  # dropout here must not change what the training draws
        report = coverage(model, config, task.mean(model, take_rows(X, rows), Y[rows]))
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    log.info(
        "Scoring %.1f %% of %d trainable parameters and %.1f %% of the validation gradient's squared norm",
        100 * report["scored_parameter_share"], report["parameters"],
        100 * report["scored_val_grad_share"],
    )  # fmt: skip


def write_results(cfg: DictConfig, out: Path, data: DataBundle) -> None:
    """Values of a scored run, and the plots."""
    if is_scored(cfg):
        write_values(out, data)
    try:
        plot_run(out)
    except AnalysisError as error:
        log.error("The plots could not be drawn: %s", error)


def show_summary(cfg: DictConfig, out: Path, data: DataBundle, tracker: NullTracker) -> None:
    """The closing tables on the console."""
    values = pq.read_table(out / VALUES_FILE) if is_scored(cfg) else VALUES_SCHEMA.empty_table()
    notes = [score_note(OmegaConf.to_container(cfg, resolve=True))] if is_scored(cfg) else []  # type: ignore[arg-type]
    print_summary(
        out, values, _previews(data) if cfg.preview else None, tracker.ui_command(), tracker.run_url(),
        replay_command(list(HydraConfig.get().overrides.task), sys.argv[0]), notes, Console(),
    )  # fmt: skip


def is_scored(cfg: DictConfig) -> bool:
    """Whether the run gives its samples values."""
    return cfg.engine.name != "regular"


def write_values(out: Path, data: DataBundle) -> None:
    """One row for each training sample that was scored, atomically written to `values.parquet`."""
    found = accumulate(read_shards(out / "scores"))
    indices = found.sample.tolist()
    table = pa.table(
        [
            [data.train.sample_ids[i] for i in indices],
            [data.train.domains[i] for i in indices],
            found.value.numpy(),
            found.times_seen.numpy(),
        ],
        schema=VALUES_SCHEMA,
    )
    partial = out / ".values.parquet.partial"
    pq.write_table(table, partial)
    os.replace(partial, out / VALUES_FILE)


def _previews(data: DataBundle) -> Callable[[str], str]:
    """From a training sample's id to one line of its text."""
    positions = {sample_id: i for i, sample_id in enumerate(data.train.sample_ids)}
    return lambda sample_id: data.train.preview(positions[sample_id])
