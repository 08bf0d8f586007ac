"""The form of a refusal: the key, its value, and what to type instead."""

from omegaconf import DictConfig, OmegaConf

from conf.errors import ConfigError
from conf.help_text import typed


def refuse(cfg: DictConfig, key: str, why: str) -> None:
    """Raises `ConfigError`; `why` goes on from `key=value`."""
    raise ConfigError(f"{key}={typed(OmegaConf.select(cfg, key))} {why}")
