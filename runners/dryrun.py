"""`dry_run=true`: what a run would train, need and write, without building anything large.

The model is built on PyTorch's meta device, so its parameters are counted and not allocated. What its forward
keeps for the backward is counted on tensors without memory, for the largest step; transient buffers, the
allocator and the libraries come on top.
"""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from runners.data import build_data
from runners.kept import kept_values
from runners.models import build_on_meta
from runners.models.hf_config import DataFacts
from runners.models.keys import CLASS_TASKS
from runners.progress import readable
from runners.tasks import model_task
from runners.wrapping import blocks

# Logits, their log-probabilities and their gradient live at once.
LOGIT_COPIES = 3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    scoring: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.scoring


def report(cfg: DictConfig) -> None:
    """Prints the run's size, memory estimate and output directory on the console."""
    facts = data_facts(cfg)
    model = build_on_meta(cfg.model, facts)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    estimate = estimate_memory(cfg, model, facts)

    table = Table(title="dry run: nothing was trained", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("model", f"{cfg.model.name}, {parameters:,} parameters in {cfg.dtype.model}")
    for name, size in _work(cfg).items():
        table.add_row(name, size)
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "scoring"):
        table.add_row(f"memory: {part}", readable(getattr(estimate, part)))
    table.add_row("memory: total", f"{readable(estimate.total)} and PyTorch itself")
    for remark in _remarks(cfg):
        table.add_row("", remark)
    table.add_row("output directory", cfg.output_dir)
    Console().print(table)


def data_facts(cfg: DictConfig) -> DataFacts:
    """What the data tells the model; it is read only for what the model's config leaves open."""
    seq_len = OmegaConf.select(cfg, "data.seq_len")
    if _is_complete(cfg.model):
        return DataFacts(seq_len=seq_len)
    data = build_data(cfg.data)
    return DataFacts(data.vocab_size, data.input_shape, data.num_classes, seq_len)


def estimate_memory(cfg: DictConfig, model: nn.Module, facts: DataFacts) -> MemoryEstimate:
    """Memory that a training step takes of each process, from the parameters' sizes and a forward pass of its
    rows.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    itself = itemsize(cfg.dtype.model)
    weight_bytes = itself * sum(sizes)
    part = 1 / _parts(cfg)
    # Gradients of several micro-batches are summed whole before they are shared out.
    gradient_part = part if cfg.trainer.gradient_accumulation_steps == 1 else 1
    gathered = itself * _gathered_values(cfg, model, sum(sizes))
    rows = _rows_at_once(cfg)
    kept, logits = kept_values(model, model_task(cfg.model), rows, facts.seq_len, facts.input_shape)
    if cfg.trainer.eval_only:
        # No backward: only the logits of one batch and their log-probabilities are alive.
        held = round(weight_bytes * part) + gathered
        return MemoryEstimate(held, 0, 0, 0, logits * 2 * logit_itemsize(cfg), 0)
    return MemoryEstimate(
        weights=round(weight_bytes * part) + gathered,
        gradients=round(weight_bytes * gradient_part),
        optimizer=round(weight_bytes * part) * _optimizer_copies(cfg.optimizer),
        activations=kept * itemsize(cfg.dtype.autocast or cfg.dtype.model),
        logits=logits * LOGIT_COPIES * logit_itemsize(cfg),
        scoring=_scoring_values(cfg, sizes) * itemsize(cfg.dtype.score),
    )


def _parts(cfg: DictConfig) -> int:
    """Into how many parts weights, gradients and optimizer are split."""
    return int(cfg.hardware.processes) if cfg.hardware.strategy == "fsdp" else 1


def _gathered_values(cfg: DictConfig, model: nn.Module, total: int) -> int:
    """Of a split model, the values that are whole at once: a block, the next one, and what is in no block."""
    if _parts(cfg) == 1:
        return 0
    inside = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks(model)]
    return total - sum(inside) + 2 * max(inside, default=0)


def _remarks(cfg: DictConfig) -> list[str]:
    """What to know about the numbers."""
    found = []
    if cfg.hardware.strategy != "none":
        found.append(
            f"memory is that of each of {cfg.hardware.processes} processes ({cfg.hardware.strategy})"
        )
    if cfg.trainer.activation_checkpointing:
        found.append("activation checkpointing keeps less of the activations than is counted here")
    return found


def _is_complete(model: DictConfig) -> bool:
    """Whether the model's config alone says how large it is."""
    reads_classes = model.kind != "hf" or model_task(model) in CLASS_TASKS
    return not reads_classes and not _leaves_vocabulary_open(model.config)


def _leaves_vocabulary_open(config: DictConfig) -> bool:
    parts = [part for part in config.values() if isinstance(part, DictConfig)]
    return config.get("vocab_size", 0) is None or any(map(_leaves_vocabulary_open, parts))


def _rows_at_once(cfg: DictConfig) -> int:
    """Rows of the largest forward pass."""
    if cfg.trainer.eval_only:
        return cfg.trainer.eval_batch_size
    if cfg.engine.name == "regular":
        return cfg.trainer.batch_size
    if cfg.engine.val_mode == "concat":
        return cfg.trainer.batch_size + cfg.engine.val_batch_size
    return max(cfg.trainer.batch_size, cfg.engine.val_batch_size)


def _optimizer_copies(optimizer: DictConfig) -> int:
    """Tensors of a parameter's size that the optimizer keeps for each parameter."""
    if optimizer.name in ("adam", "adamw"):
        return 2
    return 1 if optimizer.momentum > 0 else 0


def _scoring_values(cfg: DictConfig, sizes: list[int]) -> int:
    """Values of the validation gradient: of one layer at a time (concat) or of the whole model (separate)."""
    if cfg.engine.name == "regular":
        return 0
    return max(sizes) if cfg.engine.val_mode == "concat" else sum(sizes) // _parts(cfg)


def _work(cfg: DictConfig) -> dict[str, str]:
    """Steps, samples and tokens of the run."""
    trainer = cfg.trainer
    if trainer.eval_only:
        return {"evaluation": f"{cfg.data.val_samples:,} samples"}
    micro_batches = trainer.gradient_accumulation_steps * (cfg.hardware.processes or 1)
    samples = trainer.max_steps * trainer.batch_size * micro_batches
    work = {"steps": f"{trainer.max_steps:,}", "samples": f"{samples:,}"}
    train_samples = OmegaConf.select(cfg, "data.train_samples")
    if train_samples is not None:
        work["samples"] += f" ({samples / train_samples:.2f} epochs)"
    seq_len = OmegaConf.select(cfg, "data.seq_len")
    if seq_len is not None:
        work["tokens"] = f"{samples * seq_len:,}"
    return work


def itemsize(dtype: str) -> int:
    """Bytes of a number in the format that torch calls by this name."""
    return getattr(torch, dtype).itemsize


def logit_itemsize(cfg: DictConfig) -> int:
    """Bytes of a logit where the loss is taken: in float32 or more, whatever the model's format."""
    return max(4, itemsize(cfg.dtype.model))
