"""What the settings of all experiments share, and what is refused of them."""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from omegaconf import MISSING, OmegaConf

from conf.errors import ConfigError
from conf.help_text import typed
from conf.refuse import refuse
from conf.schema import key
from runners.choices import ExperimentName, TaskName
from runners.data import build_data
from runners.data.base import DataBundle
from runners.errors import DataError
from runners.tracking import flatten
from runners.validate import check_numbers
from runners.validate_data import check_data, data_task

REPETITIONS = "seeds"

ADDING = (REPETITIONS, "ratings")
"""Keys that add points and change the numbers of none: seeds, and where data lie that others have."""

# Keys of `fidelity.data` that every point sets by itself, or has no use for.
_IDLE = {"seed": 0, "shuffle": True, "num_workers": 0, "test_samples": 0}


@dataclass
class ExperimentConfig:
    """What all experiments share; an experiment's own class fixes `name`."""

    name: ExperimentName = MISSING
    seeds: list[int] = key("repetitions of every point: each draws weights, samples and their order anew")


def deciding(settings: ExperimentConfig) -> dict[str, Any]:
    """The settings that decide what a point gives, as plain values by dotted name."""
    tree = OmegaConf.to_container(OmegaConf.structured(settings), enum_to_str=True)
    assert isinstance(tree, dict)
    tree = {name: value for name, value in tree.items() if name not in ADDING}
    return flatten(tree)  # type: ignore[arg-type]


def fingerprint(settings: ExperimentConfig) -> str:
    """Twelve hexadecimal digits: equal where the same points give the same numbers."""
    return hashlib.sha256(json.dumps(deciding(settings), sort_keys=True).encode()).hexdigest()[:12]


def refuse_setting(settings: ExperimentConfig, name: str, why: str) -> NoReturn:
    """Raises `ConfigError`; `why` goes on from `fidelity.NAME=value`."""
    raise ConfigError(f"fidelity.{name}={typed(getattr(settings, name))} {why}")


def check_seeds(settings: ExperimentConfig) -> None:
    """Raises `ConfigError` unless every repetition has a seed of its own."""
    seeds = settings.seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        refuse_setting(settings, REPETITIONS, "must list one or more seeds from 0 up, each once: [0,1,2]")


def check_at_least(settings: ExperimentConfig, **least: int) -> None:
    """Raises `ConfigError` for a setting below its least value."""
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            refuse_setting(settings, name, f"is too small: type fidelity.{name}={bound} or more")


def check_samples(settings: ExperimentConfig, task: TaskName, instead: str) -> None:
    """Raises `ConfigError` unless `settings.data` gives samples of the task and every key in it counts.

    Args:
        instead: A choice of the group `data` that does.
    """
    tree = OmegaConf.create({"fidelity": OmegaConf.structured(settings)})
    data = tree.fidelity.data
    if data_task(data) != task:
        raise ConfigError(
            f"data@fidelity.data={data.kind} gives {data_task(data)} samples, and fidelity={settings.name} "
            f"takes {task} samples: type data@fidelity.data={instead}"
        )
    for name, neutral in _IDLE.items():
        if data[name] != neutral:
            why = f"has no use here, where every point draws by its own seed: type {typed(neutral)}"
            refuse(tree, f"fidelity.data.{name}", why)
    check_within(settings)
    try:
        check_data(tree.fidelity)
    except ConfigError as error:
        raise ConfigError(f"In fidelity: {error}") from error


def samples_of(settings: Any, seed: int) -> DataBundle:
    """The samples of `settings.data` that a seed draws. Raises as `build_data`."""
    try:
        return build_data(OmegaConf.structured(replace(settings.data, seed=seed)))
    except (ConfigError, DataError) as error:
        raise type(error)(f"In fidelity: {error}") from error


def check_within(settings: ExperimentConfig) -> None:
    """Raises `ConfigError` for numbers out of range in `settings.data` and `settings.model`."""
    try:
        check_numbers(OmegaConf.structured(settings))
    except ConfigError as error:
        raise ConfigError(f"In fidelity: {error}") from error
