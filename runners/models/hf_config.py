"""Hugging Face configurations from `model.config`: what only the data tells is filled in, dropouts are 0."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from omegaconf import DictConfig
from transformers import PreTrainedConfig

from conf.errors import ConfigError
from conf.help_text import typed
from runners.choices import Architecture, TaskName
from runners.models.keys import CLASS_TASKS, Keys, is_dropout, read_keys
from runners.tasks import model_task


@dataclass(frozen=True)
class DataFacts:
    """What the data tells a model; None where it does not, or is not read yet.

    Attributes:
        vocab_size: Number of different tokens.
        input_shape: Shape of one row of a table, or of one image `(c, h, w)`.
        num_classes: Number of labels.
        seq_len: Tokens of the longest row.
    """

    vocab_size: int | None = None
    input_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    seq_len: int | None = None


def check_model(model: DictConfig, facts: DataFacts) -> None:
    """Raises `ConfigError` for what no data and no saved model could make possible in a `model` node."""
    if model.architecture == Architecture.resnet and model.attn_implementation is not None:
        raise ConfigError(
            f"model.attn_implementation={model.attn_implementation} has no effect with "
            "model.architecture=resnet, which has no attention: type model.attn_implementation=null"
        )
    if model.path is None:
        make_config(model, facts)
    else:
        read_keys(model, {})


def make_config(
    model: DictConfig, facts: DataFacts, saved: Mapping[str, Any] | None = None
) -> tuple[PreTrainedConfig, list[str]]:
    """The configuration that the config's `model` node describes, and the dropouts that it sets to 0.

    Args:
        saved: A saved model's own, of which `model.config` may change nothing but dropout and the number of
            labels.

    Raises:
        ConfigError: A key is unknown, has no possible value, or does not fit the data or the saved model.
    """
    keys, task = read_keys(model, saved or {}), model_task(model)
    if saved is not None:
        _refuse_other_shape(model, keys)
    zeroed = []
    for part in keys.all:
        _fill_from_data(part, task, facts)
        zeroed += _stop_dropout(part)
        _settle_tokens(part)
        if "use_cache" in inspect.signature(part.kind.__init__).parameters:
            part.given["use_cache"] = False
    if task == TaskName.seq2seq:
        # The token before the first, which T5's class leaves out and its saved configurations all have.
        keys.given["decoder_start_token_id"] = keys.saved.get(
            "decoder_start_token_id", keys.value("pad_token_id")
        )
    config = _construct(keys)
    _refuse_uneven(config, keys)
    _refuse_unfit(config, keys, task, facts)
    return config, zeroed


def _refuse_other_shape(model: DictConfig, keys: Keys) -> None:
    differing: list[tuple[str, Any, Any]] = []
    for part in keys.all:
        own = _made(part.kind, part.saved, f"model.path={model.path}").to_dict()
        differing += [
            (part.prefix + name, value, own.get(name))
            for name, value in part.given.items()
            if value is not None and not is_dropout(name) and name not in ("num_labels", "model_type")
            and not _equal(value, own.get(name))
        ]  # fmt: skip
    if differing:
        given = " ".join(f"{name}={typed(value)}" for name, value, _ in differing)
        right = " ".join(f"{name}={typed(value)}" for name, _, value in differing)
        raise ConfigError(f"model.path={model.path} is a model of another shape than {given}: type {right}")


def _equal(one: Any, other: Any) -> bool:
    """Floats up to single precision, in which some formats keep them; of dictionaries, the keys in `one`."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 * abs(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_equal(value, other.get(name)) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)


def _fill_from_data(keys: Keys, task: TaskName, facts: DataFacts) -> None:
    """Null, or a number of labels not given, means the data's; while that is unknown, the class's default."""
    sizes: dict[str, int | None] = {"vocab_size": facts.vocab_size}
    if task in CLASS_TASKS:
        sizes["num_labels"] = facts.num_classes
        keys.given.setdefault("num_labels", None)
    if task == TaskName.image_classes:
        channels, side = facts.input_shape[:2] if facts.input_shape else (None, None)
        sizes |= {"num_channels": channels, "image_size": side}
    for name, size in sizes.items():
        if name in keys.given and keys.given[name] is None:
            del keys.given[name]
            if size is not None and (name in keys.known or name == "num_labels"):
                keys.given[name] = size


def _stop_dropout(keys: Keys) -> list[str]:
    """Every dropout not given becomes 0; returns those that were not."""
    left = [name for name in keys.known if is_dropout(name) and name not in keys.given and keys.value(name)]
    keys.given |= dict.fromkeys(left, 0.0)
    return [keys.prefix + name for name in left]


def _settle_tokens(keys: Keys) -> None:
    """A smaller vocabulary does not have all special tokens of the class's usual one."""
    for name in keys.known:
        value = keys.value(name)
        if name.endswith("_token_id") and isinstance(value, int) and value >= keys.value("vocab_size"):
            keys.given[name] = None


def _construct(keys: Keys) -> PreTrainedConfig:
    merged = {**keys.saved, **keys.given}
    if "num_labels" in keys.given:
        # The saved names are of the saved labels.
        merged = {name: value for name, value in merged.items() if name not in ("id2label", "label2id")}
    merged |= {name: {**part.saved, **part.given} for name, part in keys.parts.items()}
    return _made(keys.kind, merged, "model.config")


def _made(kind: type[PreTrainedConfig], values: Mapping[str, Any], source: str) -> PreTrainedConfig:
    try:
        return kind.from_dict(dict(values))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"{source} makes no {kind.__name__}: {reason}") from error


def _refuse_uneven(config: PreTrainedConfig, keys: Keys) -> None:
    """Quotients that some classes round down without a word."""
    for part, own in ((config, keys), *((getattr(config, name), each) for name, each in keys.parts.items())):
        size, heads = getattr(part, "hidden_size", None), getattr(part, "num_attention_heads", None)
        pairs = [("num_attention_heads", "num_key_value_heads"), ("image_size", "patch_size")]
        if size and heads and getattr(part, "head_dim", None) is None:
            pairs.append(("hidden_size", "num_attention_heads"))
        for whole, unit in pairs:
            dividend, divisor = getattr(part, whole, None), getattr(part, unit, None)
            if dividend and divisor and dividend % divisor:
                raise ConfigError(
                    f"{own.path(whole)}={dividend} must be a multiple of {own.path(unit)}={divisor}"
                )


def _refuse_unfit(config: PreTrainedConfig, keys: Keys, task: TaskName, facts: DataFacts) -> None:
    text, text_keys = config.get_text_config(), keys.parts.get("text_config", keys)
    longest, vocabulary = getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None)
    if longest is not None and facts.seq_len is not None and facts.seq_len > longest:
        raise ConfigError(
            f"data.seq_len={facts.seq_len} is more than "
            f"{text_keys.path('max_position_embeddings')}={longest}: type that or less"
        )
    if vocabulary is not None and facts.vocab_size is not None and facts.vocab_size > vocabulary:
        raise ConfigError(
            f"{text_keys.path('vocab_size')}={vocabulary} is below the {facts.vocab_size} tokens of the "
            f"data's vocabulary: use at least {facts.vocab_size}."
        )
    if task in CLASS_TASKS and facts.num_classes is not None and facts.num_classes > (config.num_labels or 0):
        raise ConfigError(
            f"model.config.num_labels={config.num_labels} is below the data's {facts.num_classes} classes: "
            f"type {facts.num_classes}, or null"
        )
    if facts.input_shape is not None and len(facts.input_shape) == 3:
        vision = getattr(config, "vision_config", config)
        _refuse_other_images(vision, keys.parts.get("vision_config", keys), facts.input_shape)


def _refuse_other_images(config: PreTrainedConfig, keys: Keys, shape: tuple[int, ...]) -> None:
    channels, height, width = shape
    for name, size in (("num_channels", channels), ("image_size", height), ("image_size", width)):
        told = getattr(config, name, size)
        if told != size:
            raise ConfigError(
                f"{keys.path(name)}={told} does not fit the data's images {list(shape)}: type {size} there"
            )
