"""`experiment=<path>`: experiments from JSON or YAML files anywhere, or the config that a run saved.

`experiment=runs:/<MLflow run id>` is the saved config of a tracked run.
"""

import json
import tempfile
from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from conf.errors import ConfigError
from runners.config import GROUPS

SUFFIXES = (".json", ".yaml", ".yml")
TRACKED = "runs:/"  # MLflow's own way to name what belongs to a run

# Groups whose choices differ in their keys, and the key that names the choice.
NAMED_BY = {"model": "kind", "data": "kind", "engine": "name", "optimizer": "name"}


def register_experiment_files(arguments: list[str], shipped: Path) -> None:
    """Makes every `experiment=<path ending in .json, .yaml or .yml>` and `experiment=runs:/<run id>` known
    to Hydra under the name as typed.

    A path is looked up from the working directory, then in `shipped`. The content is composed at the top of
    the config, as from a file with `# @package _global_`. The `config.yaml` of a finished run gives all keys,
    so that run is started again; keys on the command line still win, groups are refused. Hydra's store
    travels with the jobs of a sweep, so the file may change once the command has started.

    Raises `ConfigError` for a missing or malformed file.
    """
    for argument in arguments:
        name, _, value = argument.partition("=")
        paths = [path.strip("'\"") for path in value.split(",")] if name == "experiment" else []
        for path in paths:
            if path.endswith(SUFFIXES) or path.startswith(TRACKED):
                tracked = path.startswith(TRACKED)
                content = _tracked_config(path, arguments) if tracked else _load(_find(path, shipped))
                if "output_dir" in content:  # as in every saved config, and nowhere else
                    content = _from_saved(content, path, arguments)
                _register(path, content)


def _register(path: str, node: DictConfig) -> None:
    # Hydra looks the choice up as experiment/<path>.yaml, and its store as a tree without empty names.
    *groups, name = ["experiment", *path.split("/")]
    group = "/".join(part for part in groups if part)
    ConfigStore.instance().store(group=group, name=name, node=node, package="_global_", provider="experiment")


def _from_saved(config: DictConfig, path: str, arguments: list[str]) -> DictConfig:
    """A whole config as an experiment: the choices that have its keys, and then its values."""
    for argument in arguments:
        group = argument.partition("=")[0].lstrip("+~")
        if group in GROUPS and group != "experiment":
            raise ConfigError(
                f"{argument} has no effect with experiment={path}, a run's config that gives every key: type "
                f"single keys, as in {group}.KEY=VALUE"
            )
    missing = [f"{group}.{key}" for group, key in NAMED_BY.items() if key not in config.get(group, {})]
    if missing:
        raise ConfigError(f"experiment={path}: no whole config of a run, since {missing[0]} is missing")
    choices = [{f"override /{group}": str(config[group][key])} for group, key in NAMED_BY.items()]
    return OmegaConf.create(
        {"defaults": choices} | {key: value for key, value in config.items() if key != "output_dir"}
    )


def _tracked_config(path: str, arguments: list[str]) -> DictConfig:
    """The `config.yaml` among a tracked run's artifacts, from the store that `tracking.uri` names."""
    # Of all command lines only one that names a tracked run pays for this import.
    from analysis.tracking_store import download, resolve_uri

    given = [a.partition("=")[2] for a in arguments if a.startswith("tracking.uri=")]
    uri = resolve_uri(given[-1] if given else None, Path.cwd())
    with tempfile.TemporaryDirectory() as folder:
        return _load(download(uri, f"{path.rstrip('/')}/config.yaml", Path(folder)))


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
