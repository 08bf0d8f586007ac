"""Hugging Face's models as they are: the class that fits the task, from a random start or saved weights."""

import logging

from omegaconf import DictConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from conf.errors import ConfigError, first_line
from runners.choices import TaskName
from runners.models.hf_config import DataFacts, make_config
from runners.models.pretrained import find, load, saved_config
from runners.tasks import model_task

log = logging.getLogger(__name__)

CLASSES = {
    TaskName.language: AutoModelForCausalLM,
    TaskName.seq2seq: AutoModelForSeq2SeqLM,
    TaskName.text_classes: AutoModelForSequenceClassification,
    TaskName.image_classes: AutoModelForImageClassification,
    TaskName.image_text: AutoModelForImageTextToText,
}


def build(cfg: DictConfig, facts: DataFacts) -> PreTrainedModel:
    """The model of the config's `model` node.

    Raises:
        ConfigError: Its configuration is impossible, or `model.path` has no weights for it.
    """
    if cfg.path is None:
        config, zeroed = make_config(cfg, facts)
        model = _random_start(cfg, config)
    else:
        location = find(cfg)
        config, zeroed = make_config(cfg, facts, saved_config(cfg, location))
        model = load(cfg, CLASSES[model_task(cfg)], location, config)
    if zeroed:
        log.info("Dropout is off where none is configured: %s", ", ".join(f"{name}=0" for name in zeroed))
    if model.loss_type is None:
        # GPT-2's class leaves it open, and transformers then warns inside every forward that has labels.
        model.loss_type = "ForCausalLM"
    model.train()
    _freeze_batch_statistics(model)
    return model


def build_empty(cfg: DictConfig, facts: DataFacts) -> PreTrainedModel:
    """The model without its weights, for PyTorch's meta device.

    Raises:
        ConfigError: As for `build`, but for the weights.
    """
    saved = None if cfg.path is None else saved_config(cfg, find(cfg))
    return _random_start(cfg, make_config(cfg, facts, saved)[0])


def _random_start(cfg: DictConfig, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        model: PreTrainedModel = CLASSES[model_task(cfg)].from_config(
            config, trust_remote_code=False, attn_implementation=cfg.attn_implementation
        )
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(f"model.config makes no {cfg.architecture}: {first_line(error)}") from error
    return model


def _freeze_batch_statistics(model: nn.Module) -> None:
    """BatchNorm by running statistics: by the batch's own, a sample's gradient would depend on the others."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.eval()
    if layers:
        log.info("%d BatchNorm layers keep their running statistics (evaluation mode)", len(layers))
