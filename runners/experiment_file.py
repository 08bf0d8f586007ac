"""`experiment=<path>`: experiments from JSON or YAML files that lie anywhere."""

import json
from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from runners.errors import ConfigError

SUFFIXES = (".json", ".yaml", ".yml")


def register_experiment_files(arguments: list[str], shipped: Path) -> None:
    """Makes every `experiment=<path ending in .json, .yaml or .yml>` known to Hydra under the name as typed.

    A path is looked up from the working directory, then in `shipped`. The content is composed at the top of
    the config, as from a file with `# @package _global_`. Hydra's store travels with the jobs of a sweep, so
    the file may change once the command has started. Raises `ConfigError` for a missing or malformed file.
    """
    for argument in arguments:
        name, _, value = argument.partition("=")
        paths = [path.strip("'\"") for path in value.split(",")] if name == "experiment" else []
        for path in paths:
            if path.endswith(SUFFIXES):
                _register(path, _load(_find(path, shipped)))


def _register(path: str, node: DictConfig) -> None:
    # Hydra looks the choice up as experiment/<path>.yaml, and its store as a tree without empty names.
    *groups, name = ["experiment", *path.split("/")]
    group = "/".join(part for part in groups if part)
    ConfigStore.instance().store(group=group, name=name, node=node, package="_global_", provider="experiment")


def _find(path: str, shipped: Path) -> Path:
    for candidate in (Path(path), shipped / path):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"experiment={path}: there is no such file in {Path.cwd()} or {shipped}")


def _load(file: Path) -> DictConfig:
    text = file.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if file.suffix == ".json" else OmegaConf.create(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"experiment={file}: not JSON at line {error.lineno}: {error.msg}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"experiment={file}: not YAML at line {line}: {error.problem}") from error
    if not isinstance(content, dict | DictConfig):
        raise ConfigError(f"experiment={file}: the file must hold a mapping of keys to values")
    return OmegaConf.create(content)
