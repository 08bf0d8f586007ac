"""Hugging Face models with weights from a folder that `save_pretrained` made, a GGUF file, or the hub."""

import logging
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from omegaconf import DictConfig
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as logging_of_transformers

from conf.errors import ConfigError, first_line
from runners.models.keys import CLASS_TASKS
from runners.tasks import model_task

log = logging.getLogger(__name__)

GGUF_PACKAGES = ("gguf", "accelerate")
HUB_TIMEOUT = 10.0  # seconds


def find(cfg: DictConfig) -> dict[str, Any]:
    """Where `from_pretrained` finds the model at `model.path`, as its arguments.

    Raises:
        ConfigError: There is no such file or folder, and it cannot be the name of a model on the hub.
    """
    path = Path(cfg.path).expanduser()
    if path.suffix == ".gguf":
        return _gguf_file(cfg.path, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model.path={cfg.path} holds no config.json: give a folder made by save_pretrained"
            )
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if path.is_absolute() or cfg.path.startswith(".") or cfg.path.count("/") > 1:
        raise ConfigError(
            f"model.path={cfg.path} is no folder: give one made by save_pretrained, a .gguf file, the id of "
            "a model on the hub, or null for a random start."
        )
    return {"pretrained_model_name_or_path": cfg.path, "local_files_only": not _hub_has(cfg.path)}


def saved_config(cfg: DictConfig, location: dict[str, Any]) -> dict[str, Any]:
    """The saved model's configuration, as it was saved.

    Raises:
        ConfigError: There is none, or it is of another architecture than the config's.
    """
    try:
        saved, _ = PreTrainedConfig.get_config_dict(**location)
    except (OSError, ValueError, LookupError, struct.error) as error:  # the last two: damaged GGUF files
        raise ConfigError(
            f"model.path={cfg.path} is no folder with a {cfg.architecture}, nor a model that the hub gives "
            f"({first_line(error)}): give a folder made by save_pretrained, or null for a random start."
        ) from error
    found = saved.get("model_type")
    if found != cfg.architecture:
        raise ConfigError(
            f"model.path={cfg.path} holds a model of type {found}: give a {cfg.architecture}, type "
            f"model=hf model.architecture={found}, or null for a random start."
        )
    return saved


def load(
    cfg: DictConfig, auto_class: Any, location: dict[str, Any], config: PreTrainedConfig
) -> PreTrainedModel:
    """The model with its saved weights; a classifier's head may be a new one.

    Raises:
        ConfigError: The weights cannot be read, or some are missing or of another shape.
    """
    try:
        with _without_report():
            # With output_loading_info a pair comes back.
            model, found = auto_class.from_pretrained(
                **location, config=config, trust_remote_code=False, output_loading_info=True,
                attn_implementation=cfg.attn_implementation, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.path={cfg.path} has no weights that fit: {first_line(error)}") from error
    new = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    _refuse_missing(cfg, model, new)
    if new:
        log.info("Not in %s, and so from a random start: %s", cfg.path, ", ".join(sorted(new)))
    if unused := found["unexpected_keys"]:
        log.info("%d weights of %s have no place here, such as %s", len(unused), cfg.path, min(unused))
    loaded: PreTrainedModel = model
    return loaded


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps the table of missing and unused weights off the console: `load` says it."""
    verbosity = logging_of_transformers.get_verbosity()
    logging_of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        logging_of_transformers.set_verbosity(verbosity)


def _refuse_missing(cfg: DictConfig, model: PreTrainedModel, new: Iterable[str]) -> None:
    body = f"{model.base_model_prefix}."
    head = model_task(cfg) in CLASS_TASKS
    lacking = [
        name for name in new if not head or (name.startswith(body) and not name.startswith(f"{body}pooler."))
    ]
    if lacking:
        raise ConfigError(
            f"model.path={cfg.path} lacks {len(lacking)} weights of a {type(model).__name__}, such as "
            f"{min(lacking)}: give a folder made by {type(model).__name__}.save_pretrained."
        )


def _gguf_file(path: str, file: Path) -> dict[str, Any]:
    if missing := [name for name in GGUF_PACKAGES if find_spec(name) is None]:
        raise ConfigError(
            f"model.path={path} needs {' and '.join(missing)}: run pip install 'ghostrunner[gguf]'."
        )
    if not file.is_file():
        raise ConfigError(f"model.path={path}: there is no such file.")
    return {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
    }


def _hub_has(model_id: str) -> bool:
    """Asks the hub once: transformers would ask six times over, for up to minutes."""
    try:
        HfApi().model_info(model_id, timeout=HUB_TIMEOUT)
    except (HTTPError, OSError, ValueError) as error:
        log.warning(
            "The hub does not give %s (%s): looking for an earlier download.", model_id, first_line(error)
        )
        return False
    return True
