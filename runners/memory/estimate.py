"""What memory a run will take: its rehearsed step, split over processes, and the process itself."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from conf.errors import UserError, first_line
from ghost import GhostConfig
from ghost.errors import GhostError, UnsupportedModelError
from runners.data.base import DataBundle
from runners.memory.rehearsal import GRADIENTS, OPTIMIZER, TARGETS, WEIGHTS, Rehearsal
from runners.models.hf_config import DataFacts
from runners.progress import readable
from runners.wrapping import blocks

log = logging.getLogger(__name__)

PROCESS, HEAP = "PyTorch and libraries", "holes in the heap"

# What code and buffers of the libraries take once a run uses them, beyond what is loaded when it begins
# (measured, docs/memory.md).
LATER = 100 * 2**20

# What the C library's heap loses between blocks that come and go, as a share of these (measured,
# docs/memory.md).
HOLES = 0.2


class NoEstimateError(UserError):
    """The step cannot be rehearsed without memory."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What is held when most is held, in bytes.

    Attributes:
        terms: Bytes by what they hold, largest first.
        on_device: Whether it is memory of a GPU, where the process itself takes nothing of it.
    """

    terms: Mapping[str, int]
    on_device: bool

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{readable(size)} {name}" for name, size in self.terms.items() if size >= 2**20)
        return f"{readable(self.total)} of {'GPU' if self.on_device else 'host'} memory ({parts})"


def facts_of(cfg: DictConfig, data: DataBundle) -> DataFacts:
    """What the data tells the model, and the rehearsal."""
    seq_len = OmegaConf.select(cfg, "data.seq_len")
    return DataFacts(data.vocab_size, data.input_shape, data.num_classes, seq_len)


def estimate_memory(
    cfg: DictConfig, config: GhostConfig, facts: DataFacts, val_rows: Mapping[str, int], device: torch.device
) -> MemoryEstimate:
    """The most memory that each process of the run holds at once.

    What the process holds now counts as part of it, so it is asked before the model is built, with the data
    there or not.

    Args:
        config: The engine's settings that the run makes of `cfg`.
        facts: What the data tells the model.
        val_rows: Validation rows by the set that they are in; one set has the name "".
        device: Where the run computes.

    Raises:
        ConfigError, GhostError: As the run itself would.
        NoEstimateError: The model asks for values that the rehearsal does not have, or cannot be scored,
            which the run says of the model itself.
    """
    held = psutil.Process().memory_info().rss
    rehearsal = Rehearsal(cfg, config, facts, val_rows, device)
    try:
        peak = rehearsal.peak()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, GhostError) and not isinstance(error, UnsupportedModelError):
            raise
        raise NoEstimateError(f"memory cannot be estimated: {first_line(error)}") from error
    terms = _split(cfg, peak, rehearsal.model)
    if device.type == "cpu":
        terms[PROCESS] = held + LATER
        terms[HEAP] = round(HOLES * rehearsal.in_small_blocks)
    return MemoryEstimate(
        {name: size for name, size in terms.most_common() if size > 0}, on_device=device.type != "cpu"
    )


def told_estimate(
    cfg: DictConfig, config: GhostConfig, facts: DataFacts, val_rows: Mapping[str, int], device: torch.device
) -> MemoryEstimate | None:
    """`estimate_memory`, in the log; None, and why in the log, where there is none."""
    try:
        estimate = estimate_memory(cfg, config, facts, val_rows, device)
    except NoEstimateError as error:
        log.info("The %s", error)
        return None
    log.info("Memory estimate: %s", estimate)
    return estimate


def estimate_tag(estimate: MemoryEstimate | None) -> dict[str, str]:
    """The tag that a run's record has of it."""
    return {} if estimate is None else {"memory.estimate_bytes": str(estimate.total)}


def _split(cfg: DictConfig, terms: Counter[str], model: nn.Module) -> Counter[str]:
    """What each of several processes has of it: `fsdp` splits, `ddp` holds all gradients all the time."""
    if cfg.hardware.strategy == "ddp":
        terms[GRADIENTS] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    if cfg.hardware.strategy != "fsdp":
        return terms
    part = 1 / int(cfg.hardware.processes)
    # Gradients of several micro-batches are summed whole before they are shared out.
    splits = [WEIGHTS, OPTIMIZER, TARGETS] + [GRADIENTS] * (cfg.trainer.gradient_accumulation_steps == 1)
    found = Counter({name: round(size * part) if name in splits else size for name, size in terms.items()})
    found[WEIGHTS] += _gathered_bytes(model)
    return found


def _gathered_bytes(model: nn.Module) -> int:
    """Of a split model, what is whole at once: a block, the next one, and what is in no block."""
    inside = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks(model)]
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total - sum(inside) + 2 * max(inside, default=0)
