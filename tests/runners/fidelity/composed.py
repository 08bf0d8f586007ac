"""Settings of experiments as their YAML files and a few overrides make them."""

from typing import TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from conf.command import CONF_DIR
from conf.schema import schema_node
from runners.fidelity.settings import ExperimentConfig

Settings = TypeVar("Settings", bound=ExperimentConfig)

# A one-block GPT-2 that reads bytes, and 48 windows to train on.
TINY_LANGUAGE = [
    "data.tokenizer=bytes", "model.config.vocab_size=null", "model.config.n_embd=16",
    "model.config.n_layer=1", "data.train_samples=48", "data.seq_len=16", "batch_size=8",
]  # fmt: skip


def placed(override: str) -> str:
    """As the command line has it, where a group is named by its own name: `model@fidelity.model=cnn`."""
    key = override.partition("=")[0]
    return f"{key}@fidelity.{override}" if key in ("data", "model") else f"fidelity.{override}"


def composed(kind: type[Settings], name: str, *overrides: str) -> Settings:
    """The settings of `conf/fidelity/<name>.yaml`; overrides go without `fidelity.`."""
    schema = f"schema_fidelity_{name}"
    ConfigStore.instance().store(name=schema, node=schema_node(kind), provider="ghostrunner")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose(f"fidelity/{name}", [placed(text) for text in overrides])
    found = OmegaConf.to_object(cfg.fidelity)
    assert isinstance(found, kind)
    return found
