"""`dry_run=true`: what a run would train, need and write, without building anything large.

The model is built on PyTorch's meta device, so its parameters are counted and not allocated. Memory is an
estimate by formula, for the largest step; transient buffers, the allocator and the libraries come on top.
"""

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from runners.models import build_model
from runners.pretrained import find_gpt2

DIGITS_CLASSES = 10

# Values a token that GPT-2's forward keeps for the backward, in units of n_embd, counted with saved-tensor
# hooks: in each block, and around the blocks. Eager attention keeps n_head * seq_len probabilities more.
KEPT_PER_BLOCK = 28
KEPT_AROUND = 2
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
    model = build_on_meta(cfg)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    estimate = estimate_memory(cfg, model)

    table = Table(title="dry run: nothing was trained", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("model", f"{cfg.model.name}, {parameters:,} parameters in {cfg.dtype.model}")
    for name, size in _work(cfg).items():
        table.add_row(name, size)
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "scoring"):
        table.add_row(f"memory: {part}", _readable(getattr(estimate, part)))
    table.add_row("memory: total", f"{_readable(estimate.total)} and PyTorch itself")
    table.add_row("output directory", cfg.output_dir)
    Console().print(table)


def build_on_meta(cfg: DictConfig) -> torch.nn.Module:
    """The model of `cfg` with parameters that have shapes and no memory."""
    model = cfg.model
    if model.kind == "gpt2" and model.path is not None:
        find_gpt2(model)  # its shape is the one that model.config gives
        model = OmegaConf.merge(model, {"path": None})
    with torch.device("meta"):
        return build_model(model, **_model_shapes(cfg))


def estimate_memory(cfg: DictConfig, model: torch.nn.Module) -> MemoryEstimate:
    """Memory of a training step, from the parameters' sizes and the rows of the step."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    weight_bytes = _itemsize(cfg.dtype.model) * sum(sizes)
    rows = _rows_at_once(cfg)
    activations, logits = _kept_values(cfg)
    if cfg.trainer.eval_only:
        # No backward: only the logits of one batch and their log-probabilities are alive.
        return MemoryEstimate(weight_bytes, 0, 0, 0, rows * logits * 2 * _logit_itemsize(cfg), 0)
    return MemoryEstimate(
        weights=weight_bytes,
        gradients=weight_bytes,
        optimizer=weight_bytes * _optimizer_copies(cfg.optimizer),
        activations=rows * activations * _itemsize(cfg.dtype.autocast or cfg.dtype.model),
        logits=rows * logits * LOGIT_COPIES * _logit_itemsize(cfg),
        scoring=_scoring_values(cfg, sizes) * _itemsize(cfg.dtype.score),
    )


def _model_shapes(cfg: DictConfig) -> dict[str, Any]:
    if cfg.model.kind == "gpt2":
        return {"vocab_size": cfg.model.config.vocab_size, "input_shape": None, "num_classes": None}
    shape = (1, 8, 8) if cfg.data.as_image else (64,)
    return {"vocab_size": None, "input_shape": shape, "num_classes": DIGITS_CLASSES}


def _rows_at_once(cfg: DictConfig) -> int:
    """Rows of the largest forward pass."""
    if cfg.trainer.eval_only:
        return cfg.trainer.eval_batch_size
    if cfg.engine.name == "regular":
        return cfg.trainer.batch_size
    if cfg.engine.val_mode == "concat":
        return cfg.trainer.batch_size + cfg.engine.val_batch_size
    return max(cfg.trainer.batch_size, cfg.engine.val_batch_size)


def _kept_values(cfg: DictConfig) -> tuple[int, int]:
    """Values one row keeps for the backward, and values of its logits."""
    if cfg.model.kind == "mlp":
        return 64 + 2 * sum(cfg.model.hidden), DIGITS_CLASSES
    if cfg.model.kind == "cnn":
        return 64 * (1 + 2 * sum(cfg.model.channels)), DIGITS_CLASSES
    shape = cfg.model.config
    eager = shape.n_head * cfg.data.seq_len if shape.attn_implementation == "eager" else 0
    per_token = shape.n_embd * (KEPT_PER_BLOCK * shape.n_layer + KEPT_AROUND) + shape.n_layer * eager
    return cfg.data.seq_len * per_token, cfg.data.seq_len * shape.vocab_size


def _optimizer_copies(optimizer: DictConfig) -> int:
    """Tensors of a parameter's size that the optimizer keeps for each parameter."""
    if optimizer.name == "adamw":
        return 2
    return 1 if optimizer.momentum > 0 else 0


def _scoring_values(cfg: DictConfig, sizes: list[int]) -> int:
    """Values of the validation gradient: of one layer at a time (concat) or of the whole model (separate)."""
    if cfg.engine.name == "regular":
        return 0
    return max(sizes) if cfg.engine.val_mode == "concat" else sum(sizes)


def _work(cfg: DictConfig) -> dict[str, str]:
    """Steps, samples and tokens of the run."""
    trainer = cfg.trainer
    if trainer.eval_only:
        return {"evaluation": f"{cfg.data.val_samples:,} samples"}
    samples = trainer.max_steps * trainer.batch_size * trainer.gradient_accumulation_steps
    work = {"steps": f"{trainer.max_steps:,}", "samples": f"{samples:,}"}
    train_samples = OmegaConf.select(cfg, "data.train_samples")
    if train_samples is not None:
        work["samples"] += f" ({samples / train_samples:.2f} epochs)"
    if cfg.model.kind == "gpt2":
        work["tokens"] = f"{samples * cfg.data.seq_len:,}"
    return work


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def _logit_itemsize(cfg: DictConfig) -> int:
    # Losses are taken in float32 or more, whatever the model's format.
    return max(4, _itemsize(cfg.dtype.model))


def _readable(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"
