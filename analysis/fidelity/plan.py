"""What an experiment's own YAML file plans, whatever was typed."""

from omegaconf import OmegaConf

from conf.command import CONF_DIR


def planned_seeds(experiment: str) -> list[int]:
    """The seeds in `conf/fidelity/<experiment>.yaml`; empty where there is no such file."""
    path = CONF_DIR / "fidelity" / f"{experiment}.yaml"
    return [int(seed) for seed in OmegaConf.load(path).seeds] if path.exists() else []
