"""The experiments by name: an experiment is a module with a settings class and a class that measures, a line
here, and `conf/fidelity/<name>.yaml`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hydra.core.config_store import ConfigStore

from conf.schema import schema_node
from runners.fidelity.domains import Domains, DomainsConfig
from runners.fidelity.experiment import Experiment
from runners.fidelity.lds import LDS, LDSConfig
from runners.fidelity.mislabel import Mislabel, MislabelConfig
from runners.fidelity.one_step import OneStep, OneStepConfig
from runners.fidelity.selection import Selection, SelectionConfig
from runners.fidelity.settings import ExperimentConfig
from runners.fidelity.text import DroppingConfig, Text, TextConfig


@dataclass(frozen=True)
class Kind:
    """What an experiment is made of.

    Attributes:
        settings: Its settings' class; `schema_fidelity_<name>` for its YAML file.
        make: The experiment from its settings and the device that it computes on.
    """

    settings: type[ExperimentConfig]
    make: Callable[[Any, torch.device], Experiment]


EXPERIMENTS: dict[str, Kind] = {
    "one_step": Kind(OneStepConfig, OneStep),
    "mislabel": Kind(MislabelConfig, Mislabel),
    "text": Kind(TextConfig, Text),
    "dropping": Kind(DroppingConfig, Text),
    "domains": Kind(DomainsConfig, Domains),
    "lds": Kind(LDSConfig, LDS),
    "selection": Kind(SelectionConfig, Selection),
}

for _name, _kind in EXPERIMENTS.items():
    ConfigStore.instance().store(
        name=f"schema_fidelity_{_name}", node=schema_node(_kind.settings), provider="ghostrunner"
    )
