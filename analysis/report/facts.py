"""What a run is: its kind, and what its config and its other small files say about it."""

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from analysis.errors import AnalysisError
from analysis.runs import ENVIRONMENT_FILE, Run, is_second_order


class Kind(StrEnum):
    """What a run did, which decides what can be reported of it."""

    SCORED = "valued its training samples"
    PLAIN = "trained without scoring"
    EVALUATED = "evaluated a model"
    PROJECTED = "projected gradients into a store"
    DISTORTION = "measured what projections lose"


def kind_of(run: Run) -> Kind:
    """The kind of the run that its config describes.

    Raises:
        AnalysisError: The config is none of a run.
    """
    if "distortion" in run.config:
        return Kind.DISTORTION
    if setting(run.config, "engine.name") is None or setting(run.config, "optimizer.name") is None:
        raise AnalysisError(f"{run.directory}/config.yaml names no engine or no optimizer: it is no run's.")
    if setting(run.config, "trainer.eval_only"):
        return Kind.EVALUATED
    engines = {"regular": Kind.PLAIN, "gradprojlora": Kind.PROJECTED}
    return engines.get(run.config["engine"]["name"], Kind.SCORED)


def setting(config: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted key; None where the config has no such key."""
    found: Any = config
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def environment(run: Run) -> dict[str, str]:
    """What the run wrote at its start; empty where it wrote nothing.

    Raises:
        AnalysisError: The file is damaged.
    """
    found = (
        read_json(run.directory / ENVIRONMENT_FILE) if (run.directory / ENVIRONMENT_FILE).is_file() else {}
    )
    return {str(name): str(value) for name, value in found.items()}


def overrides(run: Run) -> list[str] | None:
    """What was typed to start the run; None where it is not recorded."""
    path = run.directory / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return None
    try:
        typed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AnalysisError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    return [str(item) for item in typed] if isinstance(typed, list) else []


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        AnalysisError: It is missing or damaged.
    """
    if not path.is_file():
        raise AnalysisError(f"{path} is missing: the run has not ended, or ended before it was written.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AnalysisError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise AnalysisError(f"{path} is damaged: it holds no object.")
    return found


def described(run: Run, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """What was run, name by name, without what is unknown.

    Args:
        environ: What `environment` gave.
    """
    config = run.config
    optimizer, lr = setting(config, "optimizer.name"), setting(config, "optimizer.lr")
    trained = kind_of(run) in (Kind.SCORED, Kind.PLAIN)
    facts = {
        "Model": setting(config, "model.name"),
        "Weights": setting(config, "model.path") or ("random start" if "model" in config else None),
        "Data": _data(config),
        "Engine": _engine(config),
        "Optimizer": f"{optimizer}, learning rate {lr:g}" if trained and optimizer and lr else None,
        "Batch": _batch(config) if trained else None,
        "Number format": _dtype(config),
        "Seed": setting(config, "seed"),
        "Device": environ.get("device"),
        "Started": environ.get("started"),
        "Code": _code(environ),
        "MLflow run": environ.get("mlflow.run_id"),
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def title(config: Mapping[str, Any]) -> str:
    """Model and data in a few words."""
    model, data = setting(config, "model.name"), setting(config, "data.kind")
    return f"{model} on {data}" if model and data else "A run"


def _data(config: Mapping[str, Any]) -> str | None:
    kind = setting(config, "data.kind")
    if kind is None:
        return None
    source = setting(config, "data.path") or setting(config, "data.name")
    held_out, test = setting(config, "data.val_samples"), setting(config, "data.test_samples")
    apart = f", {test} of them as a test set" if test else ""
    parts = [str(kind), *([str(source)] if source else [])]
    parts += [
        f"{key}={path}" for key in ("keep", "drop") if (path := setting(config, f"data.{key}")) is not None
    ]
    return ", ".join(parts) + (f"; {held_out} samples held out{apart}" if held_out is not None else "")


def _engine(config: Mapping[str, Any]) -> str | None:
    name = setting(config, "engine.name")
    mode = setting(config, "engine.val_mode")
    order = ", order=2" if is_second_order(config) else ""
    return f"{name}, val_mode={mode}{order}" if name == "graddotprod" and mode else name


def _batch(config: Mapping[str, Any]) -> str | None:
    rows, parts = (
        setting(config, "trainer.batch_size"),
        setting(config, "trainer.gradient_accumulation_steps"),
    )
    if rows is None:
        return None
    return f"{rows} samples × {parts} micro-batches" if parts and parts > 1 else f"{rows} samples"


def _dtype(config: Mapping[str, Any]) -> str | None:
    weights, autocast = setting(config, "dtype.model"), setting(config, "dtype.autocast")
    return f"{weights}, autocast {autocast}" if weights and autocast else weights


def _code(environ: Mapping[str, str]) -> str | None:
    commit = environ.get("git.commit")
    if commit is None:
        return None
    return f"commit {commit[:12]}" + (
        ", with changes (git.diff)" if environ.get("git.dirty") == "true" else ""
    )
