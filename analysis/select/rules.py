"""The keys of a rule that parts samples by their values, and what of them cannot work."""
# ruff: noqa: RUF009 -- `key` returns dataclass fields, not shared values

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

from omegaconf import DictConfig, OmegaConf

from conf.refuse import refuse
from conf.schema import key

Method = StrEnum("Method", ["threshold", "quantile", "top_k", "sign"])
By = StrEnum("By", ["value", "run_rank", "step_rank"])
Side = StrEnum("Side", ["keep", "drop"])

# The number that each method takes, and what it is; the other methods' numbers must be null.
NUMBERS = {
    Method.threshold: ("threshold", "the least value that is kept: type {}=0"),
    Method.quantile: ("quantile", "the share of samples that is dropped: type {}=0.1"),
    Method.top_k: ("k", "how many samples are kept: type {}=100"),
    Method.sign: ("negative_share", "the share of runs in which a dropped sample is negative: type {}=1.0"),
}


@dataclass
class RuleConfig:
    """Which samples are kept."""

    method: Method = key("what tells kept samples from dropped ones")
    by: By = key("column that is compared; ranks run from 0, lowest, to 1 (an aggregate has them)")
    threshold: float | None = key("threshold: samples of at least this are kept")
    quantile: float | None = key("quantile: this share of the samples, the lowest, is dropped")
    k: int | None = key("top_k: so many of the highest are kept")
    negative_share: float | None = key("sign: dropped if negative in at least this share of the runs")
    per_domain: bool = key("quantile, top_k: within each domain on its own")
    unscored: Side = key("where samples without a finite value go, and those that were never scored")


def check_rule(cfg: DictConfig, prefix: str = "") -> None:
    """Raises `ConfigError` for a rule that cannot work, before anything is read.

    Args:
        cfg: The whole config.
        prefix: Where the rule is in it: empty, or the name of its node and a dot.
    """
    rule = OmegaConf.select(cfg, prefix.rstrip(".")) if prefix else cfg
    own, meaning = NUMBERS[Method(rule.method)]
    for name, _ in NUMBERS.values():
        if name != own and rule[name] is not None:
            refuse(cfg, prefix + name, f"has no effect with method={rule.method}: type {prefix}{name}=null")
    if rule[own] is None or not isfinite(rule[own]):
        refuse(cfg, prefix + own, f"does not say {meaning.format(prefix + own)}, or another")
    if rule.quantile is not None and not 0 < rule.quantile < 1:
        refuse(
            cfg, f"{prefix}quantile", f"is no share between 0 and 1: type {prefix}quantile=0.1, or another"
        )
    if rule.k is not None and rule.k < 1:
        refuse(cfg, f"{prefix}k", f"keeps nothing: type {prefix}k=1 or more")
    if rule.negative_share is not None and not 0.5 < rule.negative_share <= 1:
        # Up to one half, the majority's share alone does not tell how many runs are negative.
        refuse(
            cfg, f"{prefix}negative_share", f"is not above 0.5: type {prefix}negative_share=1.0, or another"
        )
    if rule.per_domain and rule.method not in (Method.quantile, Method.top_k):
        refuse(cfg, f"{prefix}per_domain", f"has no effect with method={rule.method}: type false")
    if rule.by != By.value and rule.method == Method.sign:
        refuse(cfg, f"{prefix}by", "has no effect with method=sign: type value")


def described(rule: DictConfig) -> str:
    """The rule as one types it, without keys at rest."""
    name, _ = NUMBERS[Method(rule.method)]
    parts = [f"method={rule.method}", f"{name}={rule[name]}"]
    if rule.method != Method.sign:
        parts.append(f"by={rule.by}")
    if rule.per_domain:
        parts.append("per_domain=true")
    return " ".join([*parts, f"unscored={rule.unscored}"])
