import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import DictConfig, OmegaConf

from runners.identity import fingerprint

Trained = list[DictConfig]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tables are not folded."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def ends() -> dict[int, Callable[[], None]]:
    """What a seed's run does at its end; a test may add to it."""
    return {}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, ends: dict[int, Callable[[], None]]) -> Trained:
    """Stands in for training: records the configs, leaves `config.yaml`, and gives the seed as the loss."""
    configs: Trained = []

    def run(cfg: DictConfig, *_: object) -> float:
        fingerprint(cfg)
        OmegaConf.resolve(cfg)  # output_dir is known only while the job runs
        configs.append(cfg)
        ends.get(cfg.seed, lambda: None)()
        OmegaConf.save(cfg, Path(cfg.output_dir) / "config.yaml")
        return float(cfg.seed)

    module = ModuleType("runners.train")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "runners.train", module)
    return configs
