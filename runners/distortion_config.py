"""The keys of `python -m runners.distortion`, and what is refused before anything is built. Torch is not
imported.
"""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from conf.refuse import refuse
from conf.schema import key
from runners.choices import ProjectionKind
from runners.cli import CheckBeforeRun, refuse_earlier_run
from runners.config import DataConfig, DtypeConfig, HardwareConfig, LayersConfig, ModelConfig, TrackingConfig
from runners.launch import launched
from runners.validate import check_untrained
from runners.validate_projection import refuse_score_formats
from runners.validate_world import check_one_process

LEAST_SAMPLES = 3  # three pairs: fewer leave nothing to correlate


@dataclass
class DistortionConfig:
    """What is measured."""

    ranks: list[int] = key("numbers kept of a parameter's gradient, about; one measurement each")
    rank_min: int = key("fewest rows of a projection matrix")
    kinds: list[ProjectionKind] = key("how the matrices' entries are drawn; one measurement each")
    seeds: list[int] = key("seeds of the matrices: errors are over all of them")
    include_embeddings: bool = key("project embedding tables, and heads that share one")
    samples: int = key("training samples whose gradients are compared, all pairs of them")
    batch_size: int = key("samples a pass; exact inner products take two batches at once")


@dataclass
class DistortionRun:
    """The whole tree of this command."""

    seed: int = key("seed of weights and of the choice of samples")
    output_dir: str | None = key("where the files go; set by hydra.run.dir or hydra.sweep.dir")
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    layers: LayersConfig = MISSING
    dtype: DtypeConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracking: TrackingConfig = MISSING
    distortion: DistortionConfig = MISSING


ConfigStore.instance().store(name="schema_distortion_run", node=DistortionRun, provider="ghostrunner")


class CheckBeforeMeasuring(CheckBeforeRun):
    """Refuses an impossible config before the run directory is made."""

    def check(self, config: DictConfig) -> None:
        check_one_process(config, launched())
        check_distortion(config)

    def enter(self, config: DictConfig, directory: Path) -> None:
        refuse_earlier_run(directory, "hydra.run.dir")


def check_distortion(cfg: DictConfig) -> None:
    """Raises `ConfigError` for a composed config (Hydra's own node removed) that cannot run as it stands."""
    check_untrained(cfg)
    wanted = cfg.distortion
    for name, least in (("rank_min", 1), ("samples", LEAST_SAMPLES), ("batch_size", 1)):
        if wanted[name] < least:
            refuse(cfg, f"distortion.{name}", f"is too small: type distortion.{name}={least} or more")
    for name in ("ranks", "kinds", "seeds"):
        if not wanted[name] or len(set(wanted[name])) < len(wanted[name]):
            refuse(cfg, f"distortion.{name}", "must list one or more values, each once, such as [1,2]")
    least = wanted.rank_min**2
    if min(wanted.ranks) < least:
        refuse(
            cfg,
            "distortion.ranks",
            f"has {min(wanted.ranks)}, and distortion.rank_min={wanted.rank_min} keeps {least} numbers or "
            "more: lower the latter",
        )
    refuse_score_formats(cfg)
    if cfg.dtype.autocast == "float16":
        refuse(
            cfg,
            "dtype.autocast",
            "loses small gradients in a pass without loss scaling: type dtype=fp32, or dtype=bf16_mixed",
        )
