"""Models from the `model` part of the config: GPT-2 of any size, and small networks for tables and images."""

from itertools import pairwise

import torch
from omegaconf import DictConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from runners.errors import ConfigError
from runners.pretrained import load_gpt2

END_OF_TEXT = 50256


def build_model(
    cfg: DictConfig, vocab_size: int | None, input_shape: tuple[int, ...] | None, num_classes: int | None
) -> nn.Module:
    """The model with its initial weights, on PyTorch's default device.

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
                f"data's vocabulary: use at least {vocab_size}."
            )
        return model
    if input_shape is None or num_classes is None:
        raise ConfigError(f"model={cfg.name} needs labelled tables or images: use data=digits.")
    if cfg.kind == "mlp":
        return _mlp(list(cfg.hidden), input_shape[0], num_classes)
    return _cnn(list(cfg.channels), input_shape, num_classes)


def _gpt2(cfg: DictConfig) -> GPT2LMHeadModel:
    if cfg.path is not None:
        model = load_gpt2(cfg)
    else:
        shape = {str(key): value for key, value in cfg.config.items()}
        attention = str(shape.pop("attn_implementation"))
        special = END_OF_TEXT if shape["vocab_size"] > END_OF_TEXT else None
        config = GPT2Config(**shape, bos_token_id=special, eos_token_id=special, use_cache=False)
        model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
    # Named by hand: GPT-2's config leaves it open, and transformers then warns inside every forward.
    model.loss_type = "ForCausalLM"
    return model


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
    """`model` of the config's `dtype` node as a torch dtype."""
    dtype: torch.dtype = getattr(torch, cfg.model)
    return dtype
