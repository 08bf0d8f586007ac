"""GPT-2 with weights from a folder that `save_pretrained` made, or from the hub."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel

from runners.errors import ConfigError
from runners.help_text import typed

log = logging.getLogger(__name__)

SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "tie_word_embeddings")
DROPOUT_KEYS = ("attn_pdrop", "resid_pdrop", "embd_pdrop")
HUB_TIMEOUT = 10.0  # seconds


def load_gpt2(cfg: DictConfig) -> GPT2LMHeadModel:
    """The model of the config's `model` node at `model.path`; dropout and attention as configured.

    Raises:
        ConfigError: There is no GPT-2, it lacks weights, or its shape is not what `model.config` says.
    """
    location = find_gpt2(cfg)
    dropout = {key: cfg.config[key] for key in DROPOUT_KEYS}
    try:
        # With output_loading_info, which the annotations leave out, a pair comes back.
        loaded: Any = GPT2LMHeadModel.from_pretrained(
            **location, trust_remote_code=False, attn_implementation=str(cfg.config.attn_implementation),
            use_cache=False, output_loading_info=True, **dropout,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.path={cfg.path} has no weights that fit: {_first_line(error)}") from error
    model, found = loaded
    if missing := found["missing_keys"]:
        raise ConfigError(
            f"model.path={cfg.path} lacks {len(missing)} weights of a GPT-2 with LM head, such as "
            f"{min(missing)}: give a folder made by GPT2LMHeadModel.save_pretrained."
        )
    return model


def find_gpt2(cfg: DictConfig) -> dict[str, Any]:
    """Where `from_pretrained` finds the model at `model.path`, as its arguments; its config alone is read.

    Raises:
        ConfigError: As for `load_gpt2`.
    """
    location = _location(cfg.path)
    try:
        saved, _ = GPT2Config.get_config_dict(**location)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={cfg.path} is no folder with a GPT-2, nor a model that the hub gives "
            f"({_first_line(error)}): give a folder made by save_pretrained, or null for a random start."
        ) from error
    if saved.get("model_type") != "gpt2":
        raise ConfigError(
            f"model.path={cfg.path} holds a model of type {saved.get('model_type')}: give a GPT-2, or null "
            "for a random start."
        )
    _refuse_other_shape(cfg, GPT2Config.from_dict(saved))
    return location


def _location(path: str) -> dict[str, Any]:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.path={path} holds no config.json: give a folder made by save_pretrained"
            )
        return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    if folder.is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise ConfigError(
            f"model.path={path} is no folder: give one made by save_pretrained, the id of a model on the "
            "hub, or null for a random start."
        )
    return {"pretrained_model_name_or_path": path, "local_files_only": not _hub_has(path)}


def _hub_has(model_id: str) -> bool:
    """Asks the hub once: transformers would ask six times over, for up to minutes."""
    try:
        HfApi().model_info(model_id, timeout=HUB_TIMEOUT)
    except (HTTPError, OSError, ValueError) as error:
        log.warning(
            "The hub does not give %s (%s): looking for an earlier download.", model_id, _first_line(error)
        )
        return False
    return True


def _refuse_other_shape(cfg: DictConfig, saved: GPT2Config) -> None:
    """The keys of the shape decide nothing here, but dry runs, logs and checks read them."""
    told = OmegaConf.to_container(cfg.config, resolve=True)
    assert isinstance(told, dict)
    differing = [key for key in SHAPE_KEYS if told[key] != getattr(saved, key)]
    if differing:
        given = " ".join(f"model.config.{key}={typed(told[key])}" for key in differing)
        right = " ".join(f"model.config.{key}={typed(getattr(saved, key))}" for key in differing)
        raise ConfigError(f"model.path={cfg.path} is a model of another shape than {given}: type {right}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
