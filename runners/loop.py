"""The training loop: steps, evaluations, and what is recorded of them."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ghost import GhostEngineManager, LossReduction
from ghost.loss import count
from ghost.memory import is_out_of_memory
from runners.data.base import Batch, SampleSet
from runners.data.loader import shared_eval_batches
from runners.environment import peak_device_memory_bytes, peak_memory_bytes
from runners.losses import Task
from runners.nonfinite import NonFiniteError, are, non_finite, suspects
from runners.overhead import OverheadMeter, Probe
from runners.progress import StatusLine
from runners.resume.checkpoints import Start
from runners.resume.keeping import Keeping
from runners.tracking import NullTracker
from runners.world import ALONE, World
from runners.wrapping import gradient_sync

log = logging.getLogger(__name__)

TRAIN_LOSS, VAL_LOSS, TEST_LOSS = "train/loss", "val/loss", "test/loss"


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        loss: Mean training loss over the micro-batches of all processes.
        counted: What that is a mean over: predicted tokens, or samples.
        lr: The learning rate that the optimizer used.
        scores: The scores' sum, how many are negative, and how many there are.
        weights: How many samples the policy has kept, the sum of their weights and of the weights' squares;
            None without a policy.
    """

    loss: float
    counted: int
    lr: float
    scores: tuple[float, float, float]
    weights: tuple[float, float, float] | None


@dataclass
class TrainingLoop:
    """Trains for `trainer.max_steps` optimizer steps, scored by the manager.

    Attributes:
        cfg: The whole config.
        model: What is called: the model, wrapped for several processes maybe, compiled maybe.
        wrapped: The same without the compilation.
        batches: This process's training micro-batches.
        val: The validation samples.
        test: The test samples, where some are set apart.
        keeping: How the run's state outlives this process.
        sample_ids: Of the training samples, by running index.
        world: The processes that take each step together.
    """

    cfg: DictConfig
    model: nn.Module
    wrapped: nn.Module
    task: Task
    manager: GhostEngineManager
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: LambdaLR
    batches: Iterator[Batch]
    val: SampleSet
    test: SampleSet | None
    tracker: NullTracker
    status: StatusLine
    keeping: Keeping
    sample_ids: Sequence[str]
    world: World = ALONE

    def __post_init__(self) -> None:
        self._first, self._skipped = 0, 0
        self._losses: dict[str, float] = {}  # of the latest evaluation
        self._overhead = OverheadMeter(self.cfg, self.model, self.task)
        self._precise = torch.zeros((), dtype=torch.float64, device=self.task.device)
        self._optimizer_seconds = 0.0  # of the latest step
        self._probe: Probe | None = None

    def run(self) -> float:
        """All steps that are left; returns the last validation loss."""
        trainer = self.cfg.trainer
        if not self._losses:
            self._losses = self.evaluate()
            self._log(0, self._losses)
            self._keep(0)
        for step in range(self._first, trainer.max_steps):
            began, probed = time.perf_counter(), self._overhead.seconds
            result = self.train_step(step)
            seconds = time.perf_counter() - began - (self._overhead.seconds - probed)
            metrics = self._metrics(result, seconds)
            done = step + 1
            if done % trainer.eval_every == 0 or done == trainer.max_steps:
                self._losses = self.evaluate()
                metrics |= self._losses
            self._log(done, metrics)
            self.status.update(
                done, result.loss, self._losses[VAL_LOSS], self._overhead.share, peak_memory_bytes()
            )
            self._keep(done)
        return self._losses[VAL_LOSS]

    def go_on(self, start: Start) -> None:
        """Begin behind the steps that are done."""
        self._first, self._losses, self._skipped = start.step, start.loop["losses"], start.loop["skipped"]
        self._overhead.shares = start.loop["overhead"]

    def _state(self) -> dict[str, Any]:
        """What `go_on` brings back."""
        return {"losses": self._losses, "skipped": self._skipped, "overhead": self._overhead.shares}

    def _keep(self, done: int) -> None:
        """Write a checkpoint where one is due or the run is to end; then end it."""
        stopped = self.world.any(self.keeping.signals.noted, self.task.device)
        if stopped or (done and self.keeping.checkpoints.is_due(done)):
            self.optimizer.zero_grad(set_to_none=True)
            self._compare_last_probe()
            self.keeping.write(done, self.manager.state_dict(), self._state())
        if stopped:
            self.keeping.signals.end()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self.world.is_main:
            self.tracker.log_metrics(step, metrics)

    def train_step(self, step: int) -> StepResult:
        """One optimizer step over all its micro-batches."""
        parts = [next(self.batches) for _ in range(self.cfg.trainer.gradient_accumulation_steps)]
        counts = [int(count(batch.labels, self.task.reduction)) for batch in parts]
        counted = int(self.world.sum(torch.tensor(sum(counts))))
        self.optimizer.zero_grad(set_to_none=True)
        self._compare_last_probe()
        random = self.keeping.trained.random_state()
        # Of one process the first, before gradients are held; of several the last, which sums them over all.
        probed = 1 if self.world.world_size == 1 else len(parts)
        losses = []
        with self._kept_where_memory_ends(step, random):
            for number, (batch, own) in enumerate(zip(parts, counts, strict=True), start=1):
                loss = self._micro_batch(
                    batch, step, share=own / counted, probed=number == probed and self._overhead.is_due(step),
                    last=number == len(parts),
                )  # fmt: skip
                losses.append(loss)
        scores = self.manager.scores if self.cfg.engine.name != "regular" else torch.zeros(0)
        if step == self._first and (algebra := str(self.manager.algebra)):
            log.info("Dot products by algebra, for these batches: %s.", algebra)
        credited = scores
        if self.cfg.engine.name == "graddotprod" and self.cfg.engine.order == 2:
            credited = scores + self.manager.curvatures  # finite where both are
        wrong = self._non_finite(torch.stack(losses), credited)
        if wrong and self.cfg.trainer.non_finite == "stop":
            self._stop_before(step, wrong, suspects(parts, losses, credited), random)
        lr = self._skip_optimizer_step(step, wrong) if wrong else self._take_optimizer_step(step)
        if self.manager.should_save_metrics(step):
            self.manager.save_metrics(step)
        loss_sum = torch.stack(losses).to(self._precise).sum()
        sums = [scores.sum(), (scores < 0).sum(), torch.tensor(scores.numel())]
        has_policy = self.cfg.policy.name != "none"
        if has_policy:
            weights = self.manager.weights
            sums += [(weights > 0).sum(), weights.sum(), weights.square().sum()]
        of_all = self.world.sum(torch.stack([loss_sum, *(value.to(self._precise) for value in sums)]))
        loss, total, negative, number, *weighed = of_all.tolist()
        kept = (weighed[0], weighed[1], weighed[2]) if has_policy else None
        return StepResult(loss / counted, counted, lr, (total, negative, number), kept)

    @contextmanager
    def _kept_where_memory_ends(self, step: int, random: dict[str, Any]) -> Iterator[None]:
        """Where memory runs out in the block, leave the state before this step on disk. Of several processes
        the others would not come to write theirs.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and self.world.world_size == 1:
                self.optimizer.zero_grad(set_to_none=True)
                self.keeping.write(step, self.manager.state_dict(), self._state(), random)
            raise

    def _micro_batch(self, batch: Batch, step: int, share: float, probed: bool, last: bool) -> torch.Tensor:
        """Forward and scored backward; returns the training rows' summed loss, 0-dim."""
        began = self._overhead.now() if probed else 0.0
        X, Y = self.task.place(batch.inputs, batch.labels)
        micro_batch = self.manager.step(
            X, Y, batch_idx=batch.index, iteration=step, share=share, last=last
        )  # fmt: skip
        with micro_batch as scored, gradient_sync(self.wrapped, last):
            loss = self.task.loss(self.model, scored.X, scored.Y)
            scored.backward(loss.mean)
        if probed:
            self._probe = Probe(scored.X, scored.Y, self._overhead.now() - began)
        return loss.row_sums[: len(batch.index)].sum()

    def _compare_last_probe(self) -> None:
        """Hold the last step's probe against a plain pass: now, with no gradients held, as it was for the
        probe.
        """
        if self._probe is not None:
            self._overhead.compare(self._probe, self._optimizer_seconds)
            self._probe = None

    def _take_optimizer_step(self, step: int) -> float:
        """Clip and update; returns the learning rate.

        A step whose gradients overflow in float16 is left out: it changes no weight and credits no sample,
        and the learning rate stays where it is in its schedule.
        """
        began = time.perf_counter()
        lr = float(self.schedule.get_last_lr()[0])
        scale = self.scaler.get_scale()
        if self.cfg.trainer.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.trainer.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.manager.aggregate_and_log()
        if self.scaler.get_scale() < scale:
            log.info(
                "Step %d is skipped: its gradients overflow in float16 at a loss scale of %g.", step, scale
            )
        else:
            self.schedule.step()
        self._optimizer_seconds = time.perf_counter() - began
        return lr

    def _non_finite(self, losses: Tensor, scores: Tensor) -> list[str]:
        """What of the step is no finite number, in any process; nothing where that is not to be acted on."""
        if self.cfg.trainer.non_finite == "mark":
            return []
        grads = [p.grad for p in self.manager.model.parameters() if p.grad is not None]
        return non_finite(losses, grads, scores, self.scaler.is_enabled(), self.world)

    def _stop_before(
        self, step: int, wrong: list[str], samples: list[int], random: dict[str, Any]
    ) -> NoReturn:
        """End the run with the state before this step on disk, naming the samples by running index."""
        self.optimizer.zero_grad(set_to_none=True)
        self.manager.drop_step()
        self.keeping.write(step, self.manager.state_dict(), self._state(), random)
        raise NonFiniteError(step, wrong, [self.sample_ids[i] for i in samples])

    def _skip_optimizer_step(self, step: int, wrong: list[str]) -> float:
        """Leave weights, optimizer and schedule as they are; returns the learning rate that was due."""
        self._skipped += 1
        self.manager.aggregate_and_log()
        log.warning("Step %d is skipped: %s not finite.", step, are(wrong))
        return float(self.schedule.get_last_lr()[0])

    def _metrics(self, result: StepResult, seconds: float) -> dict[str, float]:
        counted = "samples" if self.task.reduction is LossReduction.SAMPLE_MEAN else "tokens"
        metrics = {
            TRAIN_LOSS: result.loss,
            "train/lr": result.lr,
            f"train/{counted}_per_second": result.counted / seconds,
        } | self._memory()
        if self.scaler.is_enabled():
            metrics["train/loss_scale"] = self.scaler.get_scale()
        if self._skipped:
            metrics["train/skipped_steps"] = self._skipped
        if self._overhead.share is not None:
            metrics["scoring/overhead"] = self._overhead.share
        if self.cfg.engine.name != "regular":
            total, negative, number = result.scores
            metrics |= {"scores/mean": total / number, "scores/negative_share": negative / number}
        if result.weights is not None:
            kept, total, squares = result.weights
            metrics |= {"policy/kept": kept, "policy/effective_samples": total**2 / squares if kept else 0.0}
        return metrics

    def _memory(self) -> dict[str, float]:
        """What the process that takes most of it has taken."""
        device_memory = peak_device_memory_bytes(self.task.device)
        peaks = torch.tensor([peak_memory_bytes(), device_memory or 0], dtype=torch.float64)
        host, on_device = (self.world.max(peaks) / 1e9).tolist()
        found = {"memory/peak_gb": host}
        return found if device_memory is None else found | {"memory/peak_device_gb": on_device}

    def evaluate(self) -> dict[str, float]:
        """The mean losses over all held-out samples, by metric."""
        losses = held_out_losses(
            self.model, self.val, self.test, self.task, self.cfg.trainer.eval_batch_size, self.world
        )
        for name, loss in losses.items():
            if not math.isfinite(loss):
                log.warning("%s is %s.", name, loss)
        return losses


def held_out_losses(
    model: nn.Module, val: SampleSet, test: SampleSet | None, task: Task, batch_size: int,
    world: World = ALONE,
) -> dict[str, float]:  # fmt: skip
    """The mean losses over all validation samples and, where there are some, all test samples, by metric."""
    losses = {VAL_LOSS: evaluate(model, val, task, batch_size, world)}
    if test is not None:
        losses[TEST_LOSS] = evaluate(model, test, task, batch_size, world)
    return losses


@torch.no_grad()
def evaluate(
    model: nn.Module, samples: SampleSet, task: Task, batch_size: int, world: World = ALONE
) -> float:  # fmt: skip
    """The mean loss over all samples, in evaluation mode; every layer's own mode is put back. Processes share
    the samples.
    """
    trained = [module for module in model.modules() if module.training]
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # of the losses, and of what they count
    for batch, counts in shared_eval_batches(samples, batch_size, world):
        loss = task.loss(model, *task.place(batch.inputs, batch.labels))
        if counts:
            sums[0] += float(loss.row_sums.sum())
            sums[1] += int(loss.row_counts.sum())
    # Not model.train(): BatchNorm layers stay in evaluation mode.
    for module in trained:
        module.training = True
    total, counted = world.sum(sums).tolist()
    return total / counted
