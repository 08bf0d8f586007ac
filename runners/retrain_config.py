"""The keys of `python -m runners.retrain`, what is refused before any work, and the configs of its runs.

Torch is not imported.
"""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

from dataclasses import dataclass
from math import floor, isfinite
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from analysis.select.rules import Method, RuleConfig, check_rule
from conf.errors import ConfigError
from conf.help_text import typed
from conf.refuse import refuse
from conf.schema import key, schema_node
from runners.choices import RetrainEngine
from runners.cli import CheckBeforeRun
from runners.config import LayersConfig, RegularEngine, RunConfig
from runners.launch import launched
from runners.validate import check, refuse_unknown_keys
from runners.validate_world import check_one_process

LEAST_SIGN_SEEDS = 2

# Keys of a run that this command does not take: what they must be, and why.
IDLE: dict[str, tuple[object, str]] = {
    "seed": (0, "is no run's seed here: retrain.score_seeds and retrain.seeds are"),
    "preview": (False, "has no use in runners.retrain"),
    "report_text": (False, "has no use in runners.retrain"),
    "verify": (False, "has no use in runners.retrain"),
    "resume": (None, "has no use in runners.retrain, which goes on in its hydra.run.dir"),
    "sweep.skip_finished": (True, "has no use in runners.retrain, which goes on where it ended"),
    "trainer.eval_only": (False, "has no use in runners.retrain"),
    "policy.name": ("none", "has no use in runners.retrain, whose runs differ in their samples alone"),
    "data.keep": (None, "does not go with runners.retrain, which drops samples itself"),
    "data.drop": (None, "does not go with runners.retrain, which drops samples itself"),
}


@dataclass
class RetrainConfig:
    """What is scored, dropped and compared."""

    score_seeds: list[int] = key("seeds of the runs that give values: their mean counts")
    seeds: list[int] = key(
        "seeds to train again with: for each one run on all samples, one without the dropped"
    )
    controls: int = key("random controls a seed: runs without as many samples, drawn at random")
    controls_per_domain: bool = key("random controls lack as many samples of each domain as the rule drops")
    engine: RetrainEngine = key("engine of the runs that train again; scored: the one that gave the values")
    test_share: float = key(
        "share of data.val_samples to compare on, never scored with, where data.test_samples=0; 0: none"
    )
    evaluations: int = key("evaluations of each run that trains again: steps to the target lie between them")
    target_loss: float | None = key("loss to reach; null: the largest of the best losses on all samples")
    select: RuleConfig = MISSING


@dataclass
class RetrainRun(RunConfig):
    """The whole tree of this command: a run's, and what is done with runs."""

    retrain: RetrainConfig = MISSING


ConfigStore.instance().store(name="schema_retrain_run", node=schema_node(RetrainRun), provider="ghostrunner")


class CheckBeforeRetraining(CheckBeforeRun):
    """Refuses an impossible config before the run directory is made."""

    def check(self, config: DictConfig) -> None:
        check_one_process(config, launched())
        check_retrain(config)


def check_retrain(cfg: DictConfig) -> None:
    """Raises `ConfigError` for a composed config (Hydra's own node removed) that cannot run as it stands."""
    refuse_unknown_keys(cfg.retrain, "retrain.")
    if cfg.engine.name != "graddotprod":
        raise ConfigError(f"engine={cfg.engine.name} gives no values to choose by: type engine=graddotprod")
    for name, (neutral, why) in IDLE.items():
        if OmegaConf.select(cfg, name) != neutral:
            refuse(cfg, name, f"{why}: type {name}={typed(neutral)}")
    _numbers(cfg)
    _rule(cfg)
    check(score_config(cfg, 0))
    check(again_config(cfg, 0, None))


def _numbers(cfg: DictConfig) -> None:
    retrain = cfg.retrain
    for name in ("score_seeds", "seeds"):
        seeds = list(retrain[name])
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            refuse(
                cfg, f"retrain.{name}", "must list one or more seeds from 0 up, each once, such as [0,1,2]"
            )
    for name in ("controls", "evaluations"):
        if retrain[name] < 1:
            refuse(cfg, f"retrain.{name}", f"is too small: type retrain.{name}=1 or more")
    if not 0 <= retrain.test_share < 1:
        refuse(
            cfg,
            "retrain.test_share",
            "is no share from 0 to below 1: type retrain.test_share=0.5, or another",
        )
    if retrain.test_share and not test_samples(cfg):
        refuse(
            cfg, "retrain.test_share", f"is no sample of data.val_samples={cfg.data.val_samples}: type more"
        )
    if retrain.target_loss is not None and not isfinite(retrain.target_loss):
        refuse(cfg, "retrain.target_loss", "is no number that a loss can reach: type a finite one, or null")


def _rule(cfg: DictConfig) -> None:
    check_rule(cfg, "retrain.select.")
    rule, seeds = cfg.retrain.select, cfg.retrain.score_seeds
    if rule.method == Method.sign and len(seeds) < LEAST_SIGN_SEEDS:
        refuse(cfg, "retrain.score_seeds", "is one run, and method=sign needs two or more: type [0,1,2]")


# ---------------------------------------------------------------- the configs of its runs


def test_samples(cfg: DictConfig) -> int:
    """How many held-out samples are compared on and never scored with."""
    return int(cfg.data.test_samples or floor(cfg.retrain.test_share * cfg.data.val_samples))


def score_config(cfg: DictConfig, seed: int) -> DictConfig:
    """The config of a run that gives values."""
    own = cfg.copy()
    OmegaConf.set_struct(own, False)
    del own["retrain"]
    own.seed = seed
    own.data.test_samples = test_samples(cfg)
    own.tracking.run_name = None  # the command's own run has it
    return own


def again_config(cfg: DictConfig, seed: int, dropped: Path | None) -> DictConfig:
    """The config of a run that trains again, without the samples of a list."""
    own = score_config(cfg, seed)
    if cfg.retrain.engine == RetrainEngine.regular:
        idle = {name: value for name, value in own.engine.items() if name != "name"}
        own.engine = OmegaConf.structured(RegularEngine(**idle))
        own.layers = OmegaConf.structured(LayersConfig(["*"], [], [], []))  # nothing is scored
    own.trainer.eval_every = max(1, own.trainer.max_steps // cfg.retrain.evaluations)
    own.data.drop = None if dropped is None else str(dropped)
    return own


def number_of_runs(cfg: DictConfig) -> int:
    """All runs of the command."""
    return len(cfg.retrain.score_seeds) + len(cfg.retrain.seeds) * (2 + cfg.retrain.controls)
