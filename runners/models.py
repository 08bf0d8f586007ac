"""Models from the `model` part of the config: GPT-2 of any size, and small networks for tables and images."""

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from runners.errors import ConfigError

log = logging.getLogger(__name__)

END_OF_TEXT = 50256


def build_model(
    cfg: DictConfig, vocab_size: int | None, input_shape: tuple[int, ...] | None, num_classes: int | None
) -> nn.Module:
    """The model with its initial weights in float32, or of the default device's kind.

    Args:
        cfg: The config's `model` node.
        vocab_size: Number of different tokens in the data, for language models.
        input_shape, num_classes: Shape of one input and number of labels, for tables and images.

    Raises:
        ConfigError: The model does not fit the data, or its weights are not to be had.
    """
    if cfg.kind == "gpt2":
        model = _gpt2(cfg)
        if vocab_size is not None and vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"model.config.vocab_size={model.config.vocab_size} is below the {vocab_size} tokens of the "
                "data: "
                f"use at least {vocab_size}."
            )
        return model
    if input_shape is None or num_classes is None:
        raise ConfigError(f"model={cfg.name} needs labelled tables or images: use data=digits.")
    if cfg.kind == "mlp":
        return _mlp(list(cfg.hidden), input_shape[0], num_classes)
    return _cnn(list(cfg.channels), input_shape, num_classes)


def _gpt2(cfg: DictConfig) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(OmegaConf.to_container(cfg.config, resolve=True))  # type: ignore[arg-type]
    attention = shape.pop("attn_implementation")
    if cfg.path is not None:
        model = _pretrained(GPT2LMHeadModel, cfg.path, shape, attention)
    else:
        special = END_OF_TEXT if shape["vocab_size"] > END_OF_TEXT else None
        config = GPT2Config(**shape, bos_token_id=special, eos_token_id=special, use_cache=False)
        model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
    # Named by hand: GPT-2's config leaves it open, and transformers then warns inside every forward.
    model.loss_type = "ForCausalLM"
    return model


def _pretrained(model_class: Any, path: str, shape: dict[str, Any], attention: str) -> Any:
    """Weights and architecture from a folder, or from the hub; dropout and attention as configured."""
    dropout = {key: value for key, value in shape.items() if key.endswith("pdrop")}
    local = Path(path).expanduser().is_dir()
    try:
        return model_class.from_pretrained(
            path, local_files_only=local, trust_remote_code=False, attn_implementation=attention,
            use_cache=False, **dropout,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.path={path} is neither a folder with a GPT-2 nor a model that the hub gives ({reason}): "
            "give a folder "
            "made by save_pretrained, or leave it null for a random start."
        ) from error


def _mlp(hidden: list[int], inputs: int, classes: int) -> nn.Module:
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def _cnn(channels: list[int], input_shape: tuple[int, ...], classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    width, side = input_shape[0], input_shape[1]
    for out in channels:
        layers += [nn.Conv2d(width, out, kernel_size=3, padding=1), nn.ReLU()]
        if side >= 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, classes))


def parameter_dtype(cfg: DictConfig) -> torch.dtype:
    """`dtype.model` as a torch dtype."""
    dtype: torch.dtype = getattr(torch, cfg.model)
    return dtype
