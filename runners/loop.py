"""The training loop: steps, evaluations, and now and then a plain step beside a scored one to tell what
scoring costs.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ghost import GhostEngineManager
from ghost.batch import Inputs, to_device
from ghost.loss import count
from runners.data.base import Batch, SampleSet
from runners.data.loader import eval_batches
from runners.environment import peak_device_memory_bytes, peak_memory_bytes
from runners.losses import Task
from runners.progress import StatusLine
from runners.tracking import NullTracker

TRAIN_LOSS, VAL_LOSS = "train/loss", "val/loss"


@dataclass
class LoopTimes:
    """Seconds of the latest step, and what plain passes over the same rows took beside scored ones."""

    scored: float = 0.0
    optimizer: float = 0.0
    overheads: list[float] = field(default_factory=list)

    @property
    def overhead(self) -> float | None:
        """Median extra time of a scored step as a share of a plain one; None before the first comparison."""
        return statistics.median(self.overheads) if self.overheads else None


@dataclass
class TrainingLoop:
    """Trains for `trainer.max_steps` optimizer steps, scored by the manager.

    Attributes:
        cfg: The whole config.
        model: What is called: the model, compiled maybe.
        batches: The training micro-batches.
        val: The validation samples.
    """

    cfg: DictConfig
    model: nn.Module
    task: Task
    manager: GhostEngineManager
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    batches: Iterator[Batch]
    val: SampleSet
    tracker: NullTracker
    status: StatusLine
    times: LoopTimes = field(default_factory=LoopTimes)

    def __post_init__(self) -> None:
        self._probe_steps = probe_steps(self.cfg)

    def run(self) -> float:
        """All steps; returns the last validation loss."""
        trainer = self.cfg.trainer
        val_loss = self.evaluate()
        self.tracker.log_metrics(0, {VAL_LOSS: val_loss})
        for step in range(trainer.max_steps):
            began = time.perf_counter()
            train_loss, tokens = self.train_step(step)
            seconds = time.perf_counter() - began
            metrics = {
                TRAIN_LOSS: train_loss,
                "train/tokens_per_second": tokens / seconds,
                **self._step_metrics(),
            }
            done = step + 1
            if done % trainer.eval_every == 0 or done == trainer.max_steps:
                val_loss = metrics[VAL_LOSS] = self.evaluate()
            self.tracker.log_metrics(done, metrics)
            self.status.update(done, train_loss, val_loss, self.times.overhead, peak_memory_bytes())
        return val_loss

    def train_step(self, step: int) -> tuple[float, int]:
        """One optimizer step over all its micro-batches; returns the training loss and the counted labels
        (tokens or rows).
        """
        device = self.task.device
        parts = [next(self.batches) for _ in range(self.cfg.trainer.gradient_accumulation_steps)]
        counts = [int(count(batch.labels, self.task.reduction)) for batch in parts]
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=device)
        began = time.perf_counter()
        for batch, n in zip(parts, counts, strict=True):
            X, Y = to_device(batch.inputs, device), batch.labels.to(device)
            with self.manager.step(
                X, Y, batch_idx=batch.index, iteration=step, share=n / sum(counts), last=batch is parts[-1]
            ) as scored:
                loss = self.task.loss(self.model, scored.X, scored.Y)
                scored.backward(loss.mean)
            loss_sum += loss.row_sums[: len(batch.index)].sum()
            if batch is parts[0] and step in self._probe_steps:
                self._compare_with_plain(scored.X, scored.Y, time.perf_counter() - began)
                began = time.perf_counter()
        self._take_optimizer_step()
        return float(loss_sum) / sum(counts), sum(counts)

    def _take_optimizer_step(self) -> None:
        began = time.perf_counter()
        self._lr = float(self.schedule.get_last_lr()[0])
        if self.cfg.trainer.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.trainer.clip_grad_norm)
        self.optimizer.step()
        self.manager.aggregate_and_log()
        self.schedule.step()
        self.times.optimizer = time.perf_counter() - began

    def _step_metrics(self) -> dict[str, float]:
        metrics = {
            "train/lr": float(self.schedule.get_last_lr()[0]),
            "memory/peak_gb": peak_memory_bytes() / 1e9,
        }
        device_memory = peak_device_memory_bytes(self.task.device)
        if device_memory is not None:
            metrics["memory/peak_device_gb"] = device_memory / 1e9
        if self.times.overhead is not None:
            metrics["scoring/overhead"] = self.times.overhead
        if self.cfg.engine.name != "regular":
            scores = self.manager.scores
            metrics |= {
                "scores/mean": float(scores.mean()),
                "scores/negative_share": float((scores < 0).float().mean()),
            }
        return metrics

    def evaluate(self) -> float:
        """The mean loss over all validation samples."""
        return evaluate(self.model, self.val, self.task, self.cfg.trainer.eval_batch_size)

    def _compare_with_plain(self, X: Inputs, Y: Tensor, scored_seconds: float) -> None:
        """Time a plain forward and backward over the same rows; it leaves weights, gradients and random state
        alone.
        """
        params = [p for p in self.model.parameters() if p.requires_grad]
        repeats = 2 if self.cfg.trainer.compile else 1  # the first compiles
        with torch.random.fork_rng():
            for _ in range(repeats):
                began = time.perf_counter()
                torch.autograd.grad(self.task.mean(self.model, X, Y), params)
                plain = time.perf_counter() - began
        self.times.overheads.append((scored_seconds - plain) / (plain + self.times.optimizer))


@torch.no_grad()
def evaluate(model: nn.Module, samples: SampleSet, task: Task, batch_size: int) -> float:
    """The mean loss over all samples, in evaluation mode."""
    model.eval()
    total, counted = 0.0, 0
    for batch in eval_batches(samples, batch_size):
        loss = task.loss(model, to_device(batch.inputs, task.device), batch.labels.to(task.device))
        total += float(loss.row_sums.sum())
        counted += int(loss.row_counts.sum())
    model.train()
    return total / counted


def probe_steps(cfg: DictConfig) -> set[int]:
    """Steps in which the cost of scoring is measured: spread over the run, the first step left out since it
    warms up.
    """
    if cfg.engine.name == "regular" or cfg.trainer.max_steps < 2:
        return set()
    probes = min(cfg.trainer.overhead_probes, cfg.trainer.max_steps - 1)
    return {1 + i * (cfg.trainer.max_steps - 1) // probes for i in range(probes)}
