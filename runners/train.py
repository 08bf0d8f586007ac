"""One run: build what the config names, train it, and leave its values, plots and record behind."""

import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from analysis.errors import AnalysisError
from analysis.plots import plot_run
from analysis.report import shown_samples
from analysis.runs import load_run, score_note
from conf.errors import ConfigError
from ghost import GhostConfig, GhostEngineManager
from ghost.atomic import written_beside
from ghost.batch import take_rows
from ghost.coverage import coverage, coverage_lines
from runners.checkpoint import save_model
from runners.data import build_data
from runners.data.base import DataBundle
from runners.data.loader import train_batches, val_batch, val_batches_by_domain, write_samples
from runners.environment import PROJECT, device_description, git_state, versions
from runners.identity import fingerprint
from runners.layers import layer_selection
from runners.loop import VAL_LOSS, TrainingLoop, held_out_losses
from runners.losses import Task, build_task
from runners.memory.estimate import MemoryEstimate, estimate_tag, facts_of, told_estimate
from runners.memory.exhausted import memory_errors_named
from runners.models import build_model, parameter_dtype, place
from runners.optim import build_optimizer, build_scaler, build_schedule
from runners.progress import StatusLine
from runners.report import headline, leave_report, record_environment
from runners.resume.checkpoints import Checkpoints
from runners.resume.earlier import mark_finished, take_up, tracked_run_id
from runners.resume.faults import disk_errors_named, way_on_said
from runners.resume.keeping import Keeping
from runners.resume.names import CONFIG_FILE
from runners.resume.signals import StopSignals
from runners.resume.state import Trained
from runners.summary import print_summary, replay_command
from runners.sweep.record import parent_run_id
from runners.together import EndingTogether
from runners.tracking import MODEL_FOLDER, NullTracker, build_tracker, flatten
from runners.values import VALUES_FILE, VALUES_SCHEMA, write_columns, write_values
from runners.world import ALONE, World
from runners.wrapping import checkpoint_activations, wrapped

log = logging.getLogger(__name__)


def run(cfg: DictConfig, world: World) -> float:
    """Train (or evaluate) as configured; returns the final validation loss, the same on every process.

    Raises:
        ConfigError, DataError, GhostError: The config, the data or the model cannot work, before training
            starts.
    """
    out = Path(cfg.output_dir)
    way_on = way_on_said(out, world.command) if world.is_main else nullcontext()
    with run_tracker(cfg, out, world) as tracker, EndingTogether(world), way_on:
        data, val_loss = recorded_run(cfg, tracker, world=world)
        if world.is_main and not cfg.trainer.eval_only:
            show_summary(cfg, out, data, tracker, world)
        return val_loss


def run_tracker(cfg: DictConfig, out: Path, world: World) -> NullTracker:
    """The configured tracker on the main process; on the others one that is never told anything."""
    if not world.is_main:
        return NullTracker(out)
    cwd = Path(HydraConfig.get().runtime.cwd)
    return build_tracker(cfg.tracking, out, cwd, run_id=tracked_run_id(out), parent_run_id=parent_run_id())


def recorded_run(
    cfg: DictConfig, tracker: NullTracker, tags: Mapping[str, str] | None = None, world: World = ALONE
) -> tuple[DataBundle, float]:
    """The same without the tables at the end, recorded by the tracker with these further tags; returns the
    data too.
    """
    out = Path(cfg.output_dir)
    with disk_errors_named(out):
        found = _recorded_run(cfg, tracker, tags, world)
        if world.is_main:
            mark_finished(out)
    return found


def _recorded_run(
    cfg: DictConfig, tracker: NullTracker, tags: Mapping[str, str] | None, world: World
) -> tuple[DataBundle, float]:
    out = Path(cfg.output_dir)
    if not is_scored(cfg):
        log.info("engine=regular scores nothing: the other engine.* keys have no effect.")
    device = world.agreed(lambda: prepare_machine(cfg, world))
    data = world.agreed(lambda: build_data(cfg.data))
    log.info("%s", data.description)
    estimate = world.agreed(lambda: expected_memory(cfg, out, data, device))
    with memory_errors_named(cfg, estimate):
        model = build_placed(cfg, data, device)
        known = dict(tags or {}) | estimate_tag(estimate)
        world.on_main(lambda: record_setup(cfg, out, device, data, tracker, known, world))
        if cfg.trainer.eval_only:
            val_loss = evaluate_only(cfg, wrapped(model, cfg, world, device), data, device, tracker, world)
        else:
            val_loss = train(cfg, out, model, data, device, tracker, world)
            if cfg.trainer.save_model:
                save_model(model, out / MODEL_FOLDER, world)
    world.barrier()  # all score shards are written
    if world.is_main:
        leave_results(cfg, out, data)
        tracker.describe(headline(out))
        tracker.log_artifacts(out)
        tracker.finish()
    return data, val_loss


def expected_memory(
    cfg: DictConfig, out: Path, data: DataBundle, device: torch.device
) -> MemoryEstimate | None:
    """The run's memory estimate, said before the model is built."""
    sets = Counter(data.val.domains) if cfg.engine.val_sets == "domain" else {"": len(data.val)}
    config = ghost_config(cfg, out, build_task(cfg, device))
    return told_estimate(cfg, config, facts_of(cfg, data), sets, device)


def build_placed(cfg: DictConfig, data: DataBundle, device: torch.device) -> nn.Module:
    """The configured model for the data, on the device and in its number format."""
    seq_len = OmegaConf.select(cfg, "data.seq_len")
    model = build_model(cfg.model, data.vocab_size, data.input_shape, data.num_classes, seq_len)
    place(model, device, parameter_dtype(cfg.dtype))
    return model


def prepare_machine(cfg: DictConfig, world: World = ALONE) -> torch.device:
    """Seeds, threads, and the device that this process takes.

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
    kind = found if cfg.hardware.device == "auto" else str(cfg.hardware.device)
    if kind == "cpu" and cfg.hardware.offload:
        raise ConfigError(
            "hardware.offload=true moves weights off a GPU, and the run is on the CPU: type false"
        )
    if kind == "cpu" or world.world_size == 1:
        return torch.device(kind)
    if world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"hardware.device={cfg.hardware.device}: this machine has {torch.cuda.device_count()} GPUs, and "
            f"process {world.local_rank} on it, counted from 0, has none: start as many as there are GPUs, "
            "or type hardware.device=cpu"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device(kind, world.local_rank)


def record_setup(
    cfg: DictConfig,
    out: Path,
    device: torch.device,
    data: DataBundle,
    tracker: NullTracker,
    further_tags: Mapping[str, str] | None = None,
    world: World = ALONE,
) -> None:
    """Start the record: resolved config, code state, versions, device, seed and data; or go on with that of
    an unfinished run.

    Raises:
        ConfigError: The unfinished run was of other data.
    """
    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    earlier = take_up(out, data.fingerprint)
    if not (out / CONFIG_FILE).exists():  # else it says how the run was begun
        with written_beside(out / CONFIG_FILE) as partial:
            OmegaConf.save(OmegaConf.create(resolved), partial)
    sets = {"train": data.train, "val": data.val} | ({} if data.test is None else {"test": data.test})
    write_samples(sets, out / "samples.parquet")
    git = git_state(PROJECT)
    if git.diff:
        (out / "git.diff").write_text(git.diff, encoding="utf-8")
    tags = {f"version.{name}": version for name, version in versions().items()}
    tags |= {"git.commit": git.commit or "unknown", "git.dirty": str(git.dirty).lower()}
    tags |= {
        "device": device_description(device),
        "seed": str(cfg.seed),
        "world_size": str(world.world_size),
        "data.fingerprint": data.fingerprint,
        "config.fingerprint": fingerprint(cfg),
    }
    tags |= further_tags or {}
    log.info("Running on %s", tags["device"])
    tracker.start(flatten(resolved), tags)
    record_environment(out, tags, tracker.run_id, earlier)


def evaluate_only(
    cfg: DictConfig, model: nn.Module, data: DataBundle, device: torch.device, tracker: NullTracker,
    world: World,
) -> float:  # fmt: skip
    """The validation loss of the model as it is."""
    task = build_task(cfg, device)
    losses = held_out_losses(model, data.val, data.test, task, cfg.trainer.eval_batch_size, world)
    if world.is_main:
        tracker.log_metrics(0, losses)
    log.info("Validation loss %.4f over %d samples", losses[VAL_LOSS], len(data.val))
    return losses[VAL_LOSS]


def train(
    cfg: DictConfig, out: Path, model: nn.Module, data: DataBundle, device: torch.device,
    tracker: NullTracker, world: World,
) -> float:  # fmt: skip
    """The training loop around the configured engine; returns the final validation loss."""
    task = build_task(cfg, device)
    checkpoints = Checkpoints(cfg, tracker, world)
    start = checkpoints.start()
    batches = train_batches(
        data.train, cfg.trainer.batch_size, cfg.seed, cfg.data.shuffle, cfg.data.num_workers,
        start_step=0 if start is None else start.step * cfg.trainer.gradient_accumulation_steps, world=world,
    )  # fmt: skip
    val_data = validation_data(cfg, data, task)
    config = ghost_config(cfg, out, task)
    if is_scored(cfg) and start is None and world.is_main:  # before the model is split
        write_coverage(model, config, task, val_data, out / "coverage.json")
    if cfg.trainer.activation_checkpointing:
        checkpoint_activations(model, cfg.model.name)
    model = wrapped(model, cfg, world, device)
    draw_apart(cfg.seed, world)
    optimizer = build_optimizer(cfg.optimizer, model)
    scaler = build_scaler(cfg, device)
    manager = GhostEngineManager(
        config, model, optimizer, val_data=val_data, loss_fn=task.mean, scaler=scaler,
        state=None if start is None else start.manager,
    )  # fmt: skip
    if config.policy is not None:
        log.info(
            "Each step is over its samples as the policy weighs them, and values count as much: %s.",
            config.policy,
        )
    schedule = build_schedule(cfg.trainer, optimizer)
    trained = Trained(manager.model, optimizer, schedule, scaler, task.cuda_devices())
    called: Any = torch.compile(model) if cfg.trainer.compile else model
    try:
        with StatusLine(cfg.trainer.max_steps, world.terminal()) as status, StopSignals() as signals:
            loop = TrainingLoop(
                cfg=cfg, model=called, wrapped=model, task=task, manager=manager, optimizer=optimizer,
                scaler=scaler, schedule=schedule, batches=batches, val=data.val,
                test=data.test, tracker=tracker, status=status, world=world,
                keeping=Keeping(checkpoints, trained, signals), sample_ids=data.train.sample_ids,
            )  # fmt: skip
            if start is not None:
                start.load(trained)
                loop.go_on(start)
            return loop.run()
    finally:
        manager.cleanup()


def draw_apart(seed: int, world: World) -> None:
    """Dropout draws other numbers in each process; until now all have drawn the same weights."""
    if world.world_size > 1:
        torch.manual_seed(int(np.random.SeedSequence([seed, world.rank]).generate_state(1)[0]))


def validation_data(cfg: DictConfig, data: DataBundle, task: Task) -> Any:
    """Inputs and labels of the validation samples on the run's device: of all, or by domain."""
    if is_scored(cfg) and cfg.engine.val_sets == "domain":
        by_domain = val_batches_by_domain(data.val)
        sizes = {domain: len(batch.labels) for domain, batch in by_domain.items()}
        fewest, number = min(sizes.items(), key=lambda item: item[1])
        if number < cfg.engine.val_batch_size:
            raise ConfigError(
                f"engine.val_batch_size={cfg.engine.val_batch_size} is more than the {number} validation "
                f"samples of domain {fewest!r}: use at most {number}, or more data.val_samples."
            )
        return {domain: task.place(batch.inputs, batch.labels) for domain, batch in by_domain.items()}
    rows = val_batch(data.val)
    return task.place(rows.inputs, rows.labels)


def ghost_config(cfg: DictConfig, out: Path, task: Task) -> GhostConfig:
    """The manager's settings."""
    if not is_scored(cfg):
        return GhostConfig(engine="regular")
    settings = {
        "engine": str(cfg.engine.name),
        "val_mode": str(cfg.engine.val_mode),
        "val_batch_size": cfg.engine.val_batch_size,
        "val_every": cfg.engine.val_every,
        "val_grad_device": str(cfg.engine.val_grad_device),
        "order": cfg.engine.order,
        "bitwise": cfg.engine.bitwise,
        "preconditioner": cfg.engine.preconditioner,
        "credit": cfg.engine.credit,
        "policy": policy_settings(cfg),
        "pairwise": cfg.engine.pairwise,
        "resolution": str(cfg.engine.resolution),
        "strict": cfg.engine.strict,
        "algebra": str(cfg.engine.algebra),
        "chunk_mb": cfg.engine.chunk_mb,
        "loss_reduction": task.reduction.value,
        "selection": layer_selection(cfg.layers),
        "score_dtype": getattr(torch, cfg.dtype.score),
        "storage_dtype": getattr(torch, cfg.dtype.storage),
        "gradient_accumulation_steps": cfg.trainer.gradient_accumulation_steps,
        "result_dir": str(out),
        "save_interval": cfg.trainer.flush_every,
    }
    return GhostConfig.read(settings)


def policy_settings(cfg: DictConfig) -> dict[str, Any] | None:
    """The configured policy as the library takes it; None for the ordinary step."""
    if cfg.policy.name == "none":
        return None
    return OmegaConf.to_container(cfg.policy, resolve=True, enum_to_str=True)  # type: ignore[return-value]


def write_coverage(model: nn.Module, config: GhostConfig, task: Task, val_data: Any, path: Path) -> None:
    """Measure on the validation rows of one step what the scores will speak of."""
    sets = list(val_data.values()) if isinstance(val_data, dict) else [val_data]
    rows = slice(0, config.val_batch_size)
    with torch.random.fork_rng(task.cuda_devices()):  # dropout here must not change what the training draws
        losses = [task.mean(model, take_rows(X, rows), Y[rows]) for X, Y in sets]
        report = coverage(model, config, torch.stack(losses).mean())
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for line in coverage_lines(report):
        log.info("%s", line)


def leave_results(cfg: DictConfig, out: Path, data: DataBundle) -> None:
    """Values of a scored run, the plots, and the report."""
    if cfg.trainer.eval_only:
        leave_report(out, None)
        return
    if is_scored(cfg):
        write_values(out, data.train)
        if is_resolved(cfg):
            write_columns(out, data, pairwise=cfg.engine.pairwise)
    try:
        plot_run(out)
    except AnalysisError as error:
        log.error("The plots could not be drawn: %s", error)
    leave_report(out, report_previews(out, data) if cfg.report_text else None)


def report_previews(out: Path, data: DataBundle) -> dict[str, str]:
    """First words of the samples that the run's report names, by id."""
    try:
        shown = shown_samples(load_run(out))
    except AnalysisError:  # no value is finite: the report names no sample, and says so
        return {}
    preview = _previews(data)
    return {sample_id: preview(sample_id) for sample_id in shown}


def show_summary(cfg: DictConfig, out: Path, data: DataBundle, tracker: NullTracker, world: World) -> None:
    """The closing tables on the console."""
    values = pq.read_table(out / VALUES_FILE) if is_scored(cfg) else VALUES_SCHEMA.empty_table()
    notes = [score_note(OmegaConf.to_container(cfg, resolve=True))] if is_scored(cfg) else []  # type: ignore[arg-type]
    print_summary(
        out, values, _previews(data) if cfg.preview else None, tracker.ui_command(), tracker.run_url(),
        replay_command(_replayed(), sys.argv[0], world.command), notes, Console(),
    )  # fmt: skip


def _replayed() -> list[str]:
    """What was typed, for a run that starts anew."""
    return [typed for typed in HydraConfig.get().overrides.task if not typed.startswith("resume=")]


def is_scored(cfg: DictConfig) -> bool:
    """Whether the run gives its samples values."""
    return cfg.engine.name != "regular"


def is_resolved(cfg: DictConfig) -> bool:
    """Whether scores have several columns."""
    return bool(cfg.engine.pairwise or cfg.engine.val_sets != "one" or cfg.engine.resolution != "total")


def _previews(data: DataBundle) -> Callable[[str], str]:
    """From a training sample's id to one line of its text."""
    positions = {sample_id: i for i, sample_id in enumerate(data.train.sample_ids)}
    return lambda sample_id: data.train.preview(positions[sample_id])
