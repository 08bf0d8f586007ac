"""Models from the `model` part of the config: Hugging Face's, and small networks for tables and images."""

import torch
from omegaconf import DictConfig
from torch import nn

from conf.errors import ConfigError
from runners.models import huggingface
from runners.models.hf_config import DataFacts
from runners.models.small import cnn, mlp


def build_model(
    cfg: DictConfig,
    vocab_size: int | None,
    input_shape: tuple[int, ...] | None,
    num_classes: int | None,
    seq_len: int | None = None,
) -> nn.Module:
    """The model with its initial weights, on PyTorch's default device, in training mode but for BatchNorm.

    Args:
        cfg: The config's `model` node.
        vocab_size: Number of different tokens in the data, for text.
        input_shape: Shape of one input, for tables and images.
        num_classes: Number of labels, for classes.
        seq_len: Tokens of the longest row, for text.

    Raises:
        ConfigError: The model does not fit the data, or its weights are not to be had.
    """
    facts = DataFacts(vocab_size, input_shape, num_classes, seq_len)
    if cfg.kind == "hf":
        return huggingface.build(cfg, facts)
    return _small(cfg, facts)


def build_on_meta(cfg: DictConfig, facts: DataFacts) -> nn.Module:
    """The same model with parameters that have shapes and no memory; of saved ones the configuration is read.

    Raises:
        ConfigError: As for `build_model`.
    """
    with torch.device("meta"):
        return huggingface.build_empty(cfg, facts) if cfg.kind == "hf" else _small(cfg, facts)


def _small(cfg: DictConfig, facts: DataFacts) -> nn.Module:
    if facts.input_shape is None or facts.num_classes is None:
        raise ConfigError(f"model={cfg.name} needs labelled tables or images: use data=digits.")
    if cfg.kind == "mlp":
        return mlp(list(cfg.hidden), facts.input_shape[0], facts.num_classes)
    return cnn(list(cfg.channels), facts.input_shape, facts.num_classes)


def place(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move the model to `device`; weights, and what is saved beside them, become `dtype`.

    Constants that a model computes for itself keep their format: rotary frequencies in bfloat16 would be off
    by whole positions at the end of a long row.
    """
    saved = model.state_dict().keys()
    constants = {
        name: value
        for name, value in model.named_buffers()
        if value.is_floating_point() and name not in saved
    }
    model.to(device=device, dtype=dtype)
    for name, value in constants.items():
        owner, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(owner), buffer, value.to(device))


def parameter_dtype(cfg: DictConfig) -> torch.dtype:
    """`model` of the config's `dtype` node as a torch dtype."""
    dtype: torch.dtype = getattr(torch, cfg.model)
    return dtype
