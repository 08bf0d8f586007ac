"""What scoring costs: now and then a plain forward and backward over the rows of a scored pass."""

import statistics
import time
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ghost.batch import Inputs
from runners.losses import Task


@dataclass(frozen=True)
class Probe:
    """A scored pass that is to be held against a plain one.

    Attributes:
        X, Y: What went through it.
        seconds: How long it took.
    """

    X: Inputs
    Y: Tensor
    seconds: float


class OverheadMeter:
    """Compares scored passes with plain ones over the same rows (with `val_mode=concat` the validation rows
    are among them).

    Attributes:
        seconds: Time spent in plain passes since the process began; no part of the training.
        shares: Extra time of each compared step as a share of a plain one.
    """

    def __init__(self, cfg: DictConfig, model: nn.Module, task: Task) -> None:
        self.seconds = 0.0
        self._model, self._task = model, task
        self._steps = probe_steps(cfg)
        self._micro_batches = cfg.trainer.gradient_accumulation_steps
        self._warm_ups = int(cfg.trainer.compile)  # the first pass of a new kind compiles
        self.shares: list[float] = []

    def is_due(self, step: int) -> bool:
        """Whether a micro-batch of this step is compared."""
        return step in self._steps

    @property
    def share(self) -> float | None:
        """Median extra time of a scored step as a share of a plain one; None before the first comparison."""
        return statistics.median(self.shares) if self.shares else None

    def compare(self, probe: Probe, optimizer_seconds: float) -> None:
        """Run the plain pass, with no gradients held before or after it; weights and random state stay as
        they are. Of several processes all run it at once, behind a step's last micro-batch, so that it sums
        gradients over them as that does.

        Args:
            optimizer_seconds: How long an optimizer step takes.
        """
        began = self.now()
        with torch.random.fork_rng(self._task.cuda_devices()):
            for _ in range(self._warm_ups + 1):
                pass_began = self.now()
                self._task.mean(self._model, probe.X, probe.Y).backward()
                for parameter in self._model.parameters():
                    parameter.grad = None
        ended = self.now()
        plain = ended - pass_began
        self._warm_ups = 0
        self.shares.append((probe.seconds - plain) / (plain + optimizer_seconds / self._micro_batches))
        self.seconds += ended - began

    def now(self) -> float:
        """Seconds on a clock, read once the device has done all that it was given."""
        if self._task.device.type == "cuda":
            torch.cuda.synchronize(self._task.device)
        return time.perf_counter()


def probe_steps(cfg: DictConfig) -> set[int]:
    """Steps in which the cost of scoring is measured: spread over the run, without the first, which warms up,
    and the last, after which there is no step to compare in.
    """
    between = cfg.trainer.max_steps - 2
    if cfg.engine.name == "regular" or between < 1:
        return set()
    probes = min(cfg.trainer.overhead_probes, between)
    return {1 + i * between // probes for i in range(probes)}
