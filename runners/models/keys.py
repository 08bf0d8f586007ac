"""The keys of `model.config`, held against the Hugging Face configuration class that is to take them."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conf.errors import ConfigError
from conf.help_text import typed
from conf.hydra_errors import suggestion
from runners.choices import TaskName
from runners.tasks import model_task

# Of every configuration class; none of these is the shape of a model.
COMMON_KEYS = frozenset(inspect.signature(PreTrainedConfig.__init__).parameters) | {"use_cache"}
CLASS_TASKS = (TaskName.text_classes, TaskName.image_classes)

# Sizes by their common names, into which transformers translates some classes' own.
SIZES = frozenset(
    {
        *("vocab_size", "max_position_embeddings", "type_vocab_size", "num_labels", "image_size"),
        *("num_hidden_layers", "num_decoder_layers", "num_attention_heads", "num_key_value_heads"),
        *("hidden_size", "intermediate_size", "embedding_size", "head_dim", "ffn_dim", "d_ff"),
        *("patch_size", "num_channels"),
    }
)


@dataclass
class Keys:
    """The keys of one configuration, or of one within it.

    Attributes:
        kind: The class that takes them.
        prefix: How they are typed, up to the last dot.
        given: As the config gives them.
        saved: As the saved model has them; empty for a random start.
        parts: The keys of the configurations within this one.
    """

    kind: type[PreTrainedConfig]
    prefix: str
    given: dict[str, Any]
    saved: Mapping[str, Any]
    parts: dict[str, "Keys"] = field(default_factory=dict)

    @property
    def all(self) -> list["Keys"]:
        """These keys and those of the parts."""
        return [self, *self.parts.values()]

    @property
    def known(self) -> list[str]:
        """Every key that has a meaning for this class alone."""
        return sorted(set(inspect.signature(self.kind.__init__).parameters) - COMMON_KEYS)

    def value(self, name: str) -> Any:
        """A known key's value, were the configuration made now."""
        default = inspect.signature(self.kind.__init__).parameters[name].default
        return self.given.get(name, self.saved.get(name, default))

    def path(self, common: str) -> str:
        """The key by this common name, as it is typed."""
        return self.prefix + self.kind.attribute_map.get(common, common)


def read_keys(model: DictConfig, saved: Mapping[str, Any]) -> Keys:
    """The keys of the config's `model` node.

    Args:
        saved: The saved model's configuration; empty for a random start.

    Raises:
        ConfigError: A key is unknown to its class, or has a value that no model can have.
    """
    given: dict[str, Any] = OmegaConf.to_container(model.config, resolve=True)  # type: ignore[assignment]
    keys = Keys(CONFIG_MAPPING[model.architecture], "model.config.", given, saved)
    extra = ["num_labels"] if model_task(model) in CLASS_TASKS else []
    _refuse_unknown(keys, extra, elsewhere=list(map(str, model)))
    for name in keys.kind.sub_configs:
        part, own = given.pop(name, None) or {}, saved.get(name) or {}
        keys.parts[name] = Keys(_part_class(keys, name, part, own), f"{keys.prefix}{name}.", part, own)
        _refuse_unknown(keys.parts[name], ["model_type"], elsewhere=[])
    for each in keys.all:
        _refuse_values(each)
    return keys


def is_dropout(name: str) -> bool:
    """Whether a key is a probability of dropping something."""
    return "drop" in name


def _part_class(
    keys: Keys, name: str, part: dict[str, Any], saved: Mapping[str, Any]
) -> type[PreTrainedConfig]:
    usual = getattr(keys.kind(), name).model_type
    model_type = part.setdefault("model_type", saved.get("model_type", usual))
    if model_type not in CONFIG_MAPPING:
        hint = suggestion(str(model_type), CONFIG_MAPPING)
        raise ConfigError(f"{keys.prefix}{name}.model_type={model_type} is no type of model{hint}")
    return CONFIG_MAPPING[model_type]


def _refuse_unknown(keys: Keys, extra: Iterable[str], elsewhere: list[str]) -> None:
    """`elsewhere`: keys of the model beside `config`, in case one is looked for there."""
    known = [*keys.known, *extra]
    for name in keys.given:
        if name in known:
            continue
        if name in keys.kind.attribute_map:
            hint = f": did you mean {keys.path(name)}?"
        elif name in elsewhere:
            hint = f": did you mean model.{name}?"
        else:
            hint = suggestion(name, known, keys.prefix)
        raise ConfigError(
            f"{keys.prefix}{name} is no key of {keys.kind.__name__}{hint} (keys: {', '.join(known)})"
        )


def _refuse_values(keys: Keys) -> None:
    common_names = {own: common for common, own in keys.kind.attribute_map.items()}
    for name, value in keys.given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        told = f"{keys.prefix}{name}={typed(value)}"
        if is_dropout(name) and not 0 <= value < 1:
            raise ConfigError(f"{told} must be at least 0 and less than 1")
        if common_names.get(name, name) in SIZES and value < 1:
            raise ConfigError(f"{told} must be at least 1")
        if name.endswith("_token_id") and "vocab_size" in keys.known:
            vocabulary = keys.value("vocab_size")
            if vocabulary is not None and not 0 <= value < vocabulary:
                raise ConfigError(f"{told} is no token: type a number from 0 to {vocabulary - 1}, or null")
