"""A projection run: one pass over the training samples at a fixed checkpoint, into a store."""

import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from omegaconf import DictConfig, OmegaConf

from conf.errors import ConfigError
from ghost import GhostConfig, GradProjLoRAEngine, ProjectionStore
from ghost.store import StoreWriter
from runners.data import build_data
from runners.data.base import DataBundle, SampleSet
from runners.data.loader import ordered_batches
from runners.environment import peak_memory_bytes
from runners.layers import layer_selection
from runners.losses import Task, build_task
from runners.memory.estimate import estimate_tag, facts_of, told_estimate
from runners.memory.exhausted import memory_errors_named
from runners.progress import ProjectionLine, readable
from runners.project_summary import measure_distortion, show_projection, typed_overrides
from runners.projection_store import describe_store, open_writer, refuse_other_store, row_bytes, store_folder
from runners.report import headline, leave_report
from runners.resume.earlier import mark_finished
from runners.resume.signals import StopSignals
from runners.summary import replay_command
from runners.together import EndingTogether, wait_for_all
from runners.tracking import NullTracker
from runners.train import build_placed, prepare_machine, record_setup, run_tracker
from runners.world import ALONE, World

log = logging.getLogger(__name__)


def project(cfg: DictConfig, world: World) -> None:
    """Project this rank's part of the training samples, from where the store ends.

    Raises:
        ConfigError, DataError, GhostError: The config, the data, the model or the store cannot work.
    """
    typed, cfg = cfg, with_rank(cfg, world)
    out, folder = Path(cfg.output_dir), store_folder(cfg)
    device = world.agreed(lambda: prepare_machine(cfg, world))
    world.on_main(lambda: refuse_other_store(cfg, folder))
    with run_tracker(cfg, out, world) as tracker, EndingTogether(world):
        data = world.agreed(lambda: build_data(cfg.data))
        log.info("%s", data.description)
        part = part_of(len(data.train), cfg.trainer.batch_size, cfg.engine.rank, cfg.engine.world_size)
        config = projection_config(cfg, build_task(cfg, device))
        estimate = world.agreed(lambda: told_estimate(cfg, config, facts_of(cfg, data), {}, device))
        # In evaluation mode: with dropout a row would depend on the random numbers of the pass.
        model = build_placed(cfg, data, device).eval()
        if world.is_main and OmegaConf.select(cfg, "model.path") is None:
            place = "model.path=null" if cfg.model.kind == "hf" else f"model={cfg.model.name}"
            log.warning("%s: these are gradients at a random start (seed=%d).", place, cfg.seed)
        task = build_task(cfg, device)
        engine = GradProjLoRAEngine(model, config)
        if world.is_main:
            record_coverage(engine, out / "coverage.json")
        writer = open_writer(cfg, folder, engine, data)
        with memory_errors_named(cfg, estimate), Resumable(cfg, folder, world), writer:
            if world.is_main:
                warn_of_space(folder, len(data.train) * row_bytes(engine.layout, str(cfg.engine.storage)))
                describe_store(cfg, folder, data, OmegaConf.select(cfg, "data.seq_len"))
            known = estimate_tag(estimate)
            world.on_main(lambda: record_setup(typed, out, device, data, tracker, known, world))
            Projection(cfg, engine, task, writer, tracker, data.train, part, world).run()
        if engine.uncounted:
            log.warning(
                "%d samples have no label that the loss counts: their rows are zeros.", engine.uncounted
            )
        wait_for_all(world)
        if world.is_main:
            finish(cfg, out, folder, engine, data, task, tracker, last_step=len(part), world=world)
            mark_finished(out)


def with_rank(cfg: DictConfig, world: World) -> DictConfig:
    """The config with the part of the corpus that falls to this one of several processes."""
    if world.world_size == 1:
        return cfg
    own = cfg.copy()
    own.engine.rank, own.engine.world_size = world.rank, world.world_size
    return own


def part_of(samples: int, batch_size: int, rank: int, world_size: int) -> range:
    """The numbers of the batches that a rank projects: ranks follow each other through the corpus.

    Raises:
        ConfigError: There are fewer batches than ranks.
    """
    batches = -(-samples // batch_size)
    if batches < world_size:
        raise ConfigError(
            f"engine.world_size={world_size} is more than the {batches} batches of trainer.batch_size="
            f"{batch_size} in {samples} samples: type {batches} or less, or start so few processes"
        )
    return range(batches * rank // world_size, batches * (rank + 1) // world_size)


def projection_config(cfg: DictConfig, task: Task) -> GhostConfig:
    """The engine's settings."""
    settings = {
        "engine": "gradprojlora",
        "proj_rank_total": cfg.engine.rank_total,
        "proj_rank_min": cfg.engine.rank_min,
        "proj_seed": cfg.engine.seed,
        "proj_kind": str(cfg.engine.kind),
        "include_embeddings": cfg.engine.include_embeddings,
        "loss_reduction": task.reduction.value,
        "selection": layer_selection(cfg.layers),
    }
    return GhostConfig.read(settings)


def record_coverage(engine: GradProjLoRAEngine, path: Path) -> None:
    """Write and say what a row is made of, and what of the model it leaves out."""
    report = engine.coverage()
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    log.info(
        "A row has %d numbers, of %d parameters with %.1f %% of all trainable entries.",
        engine.layout.width,
        len(engine.layout.slices),
        100 * report["projected_parameter_share"],
    )
    if engine.left_out:
        log.info(
            "%d trainable parameters are not projected, such as %s: see %s.",
            len(engine.left_out),
            engine.left_out[0],
            path,
        )


def warn_of_space(folder: Path, needed: int) -> None:
    """Say before the pass that the disk is too small for the whole store, in bytes."""
    present = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(folder).free
    if needed - present > free:
        log.warning(
            "The store takes %s more, and %s has %s left: make room, or the pass will stop half-way.",
            readable(needed - present),
            folder,
            readable(free),
        )


@dataclass
class Projection:
    """The pass over one rank's part.

    Attributes:
        part: Numbers of the batches of the part, the ones that are in the store already among them.
    """

    cfg: DictConfig
    engine: GradProjLoRAEngine
    task: Task
    writer: StoreWriter
    tracker: NullTracker
    samples: SampleSet
    part: range
    world: World = ALONE

    def run(self) -> None:
        """Project what the store does not have yet."""
        trainer, ready = self.cfg.trainer, self.writer.next_batch
        if ready:
            log.info("%d of %d batches are in the store: going on behind them.", ready, len(self.part))
        batches = ordered_batches(
            self.samples, trainer.batch_size, self.part[ready:], self.cfg.data.num_workers
        )
        first, last = self.part.start * trainer.batch_size, self._end(self.part.stop)
        with (
            self.engine.attached(),
            ProjectionLine(last - first, self.world.terminal()) as line,
            StopSignals() as signals,
        ):
            for step, batch in enumerate(batches, start=ready + 1):
                X, Y = self.task.place(batch.inputs, batch.labels)
                self.writer.append(batch.index, self.engine.project(X, Y, self.task.mean))
                done = self._end(self.part.start + step) - first
                rate = line.update(done, self.writer.bytes_written, peak_memory_bytes())
                if self.world.is_main and (step % self.cfg.engine.save_every == 0 or step == len(self.part)):
                    self._log_metrics(step, rate)
                if signals.noted:
                    signals.end()

    def _end(self, batch: int) -> int:
        """How many samples the first so many batches of the corpus have."""
        return min(batch * self.cfg.trainer.batch_size, len(self.samples))

    def _log_metrics(self, step: int, rate: float | None) -> None:
        metrics = {
            "projection/gb_written": self.writer.bytes_written / 1e9,
            "memory/peak_gb": peak_memory_bytes() / 1e9,
        }
        if rate is not None:
            metrics["projection/samples_per_second"] = rate
        self.tracker.log_metrics(step, metrics)


class Resumable:
    """Says, where a pass ends early, that what is written stays, and what to type to go on."""

    def __init__(self, cfg: DictConfig, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        overrides = [*typed_overrides(), f"engine.store={folder}"]
        self.command = replay_command(overrides, sys.argv[0], world.command)

    def __enter__(self) -> None:
        log.info("Writing to %s; if this run is killed, go on with: %s", self.folder, self.command)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.world.is_main:
            log.error(
                "The pass has ended early; whole shards are safe in %s. Go on with: %s",
                self.folder,
                self.command,
            )


def finish(
    cfg: DictConfig,
    out: Path,
    folder: Path,
    engine: GradProjLoRAEngine,
    data: DataBundle,
    task: Task,
    tracker: NullTracker,
    last_step: int,
    world: World,
) -> None:
    """What a written part is worth: numbers in the record, and the closing report."""
    store = ProjectionStore.open(folder)
    metrics = {"projection/samples": float(len(store)), "projection/gb_stored": store.nbytes / 1e9}
    distortion = None
    if store.complete:
        distortion = measure_distortion(cfg, store, engine, data.train, task)
    if distortion is not None:
        metrics |= {"distortion/rms": distortion.rms, "distortion/spearman": distortion.spearman}
    tracker.log_metrics(last_step, metrics)
    leave_report(out, None)
    tracker.describe(headline(out))
    tracker.log_artifacts(out)
    tracker.log_store(folder)
    tracker.finish()
    show_projection(cfg, out, store, data.train, distortion, tracker, sys.argv[0], world)
