"""The keys of `python -m runners.fidelity`, and what is refused before any work."""

from collections import Counter
from dataclasses import dataclass

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from conf.errors import ConfigError
from conf.refuse import refuse
from conf.schema import key, schema_node
from runners.choices import Strategy
from runners.cli import CheckBeforeRun
from runners.config import HardwareConfig, TrackingConfig
from runners.fidelity.experiment import Experiment, Point
from runners.fidelity.registry import EXPERIMENTS
from runners.fidelity.settings import ExperimentConfig, check_seeds
from runners.validate import refuse_unknown_keys

# Keys of `hardware` that are about processes which train one model together.
_TOGETHER = {"strategy": Strategy.none, "processes": None, "reduce_dtype": None, "offload": False}


@dataclass
class FidelityRun:
    """The whole tree of this command."""

    jobs: int = key("points measured at the same time, each in a process of its own")
    output_dir: str | None = key("where the points' files go; set by hydra.run.dir")
    fidelity: ExperimentConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracking: TrackingConfig = MISSING


ConfigStore.instance().store(
    name="schema_fidelity_run", node=schema_node(FidelityRun), provider="ghostrunner"
)


class CheckBeforeMeasuring(CheckBeforeRun):
    """Refuses an impossible config before the directory is made."""

    def check(self, config: DictConfig) -> None:
        check_fidelity(config)


def check_fidelity(cfg: DictConfig) -> list[Point]:
    """The points of a composed config (Hydra's own node removed).

    Raises:
        ConfigError: It cannot run as it stands.
    """
    refuse_unknown_keys(cfg, "")
    # Hydra sets output_dir when the job starts.
    if missing := sorted(OmegaConf.missing_keys(OmegaConf.masked_copy(cfg, ["fidelity", "jobs"]))):
        raise ConfigError(f"{missing[0]} has no value: type {missing[0]}=VALUE, see --help")
    if cfg.jobs < 1:
        refuse(cfg, "jobs", "is too small: type jobs=1 or more")
    for name, neutral in _TOGETHER.items():
        if cfg.hardware[name] != neutral:
            refuse(cfg, f"hardware.{name}", "has no use here, where every point is one process: leave it out")
    settings = settings_of(cfg)
    if settings.name != (kind := _name_of(settings)):
        refuse(cfg, "fidelity.name", f"is what tells experiments apart: type fidelity={kind}")
    check_seeds(settings)
    points = experiment_of(settings, torch.device("cpu")).points()
    if twice := [name for name, times in Counter(point.name for point in points).items() if times > 1]:
        raise ConfigError(f"fidelity.{settings.name} has the point {twice[0]} twice: name every value once")
    return points


def settings_of(cfg: DictConfig) -> ExperimentConfig:
    """The experiment's settings as an instance of their class."""
    settings = OmegaConf.to_object(cfg.fidelity)
    assert isinstance(settings, ExperimentConfig)
    return settings


def experiment_of(settings: ExperimentConfig, device: torch.device) -> Experiment:
    """The experiment with these settings, on a device."""
    return EXPERIMENTS[_name_of(settings)].make(settings, device)


def _name_of(settings: ExperimentConfig) -> str:
    return next(name for name, kind in EXPERIMENTS.items() if kind.settings is type(settings))
