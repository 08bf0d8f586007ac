"""Optimizers, learning-rate schedules and gradient scalers from the config."""

import math

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the config's `optimizer` node over all trainable parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    if cfg.name in ("adam", "adamw"):
        kind = torch.optim.AdamW if cfg.name == "adamw" else torch.optim.Adam
        return kind(
            params,
            lr=cfg.lr,
            betas=(cfg.betas[0], cfg.betas[1]),
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        params, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, weight_decay=cfg.weight_decay
    )


def build_scaler(cfg: DictConfig, device: torch.device) -> torch.amp.GradScaler:
    """The gradient scaler that float16 needs; in any other format one that does nothing."""
    return torch.amp.GradScaler(device.type, enabled=cfg.dtype.autocast == "float16")


def build_schedule(cfg: DictConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, then constant, or down to zero as a line or half a cosine."""
    warmup, total = cfg.warmup_steps, cfg.max_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total - warmup)
        if cfg.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if cfg.lr_schedule == "linear" else 1.0

    return LambdaLR(optimizer, factor)
