"""Checks of what a policy can do in a run, before anything is built. Torch is not imported."""

from math import isfinite

from omegaconf import DictConfig

from conf.refuse import refuse


def check_policy(cfg: DictConfig) -> None:
    """Raises `ConfigError` for a policy that cannot work, or that nothing would ask."""
    policy = cfg.policy
    if policy.name == "none":
        return
    if cfg.engine.name != "graddotprod":
        refuse(
            cfg, "policy.name",
            f"weighs samples by scores, which engine={cfg.engine.name} has none of: type policy=none, or "
            "engine=graddotprod",
        )  # fmt: skip
    if cfg.trainer.eval_only:
        refuse(cfg, "policy.name", "has no effect with trainer.eval_only=true: type policy=none")
    if cfg.engine.bitwise:
        refuse(
            cfg, "engine.bitwise",
            f"leaves the layers' backward alone, which policy={policy.name} takes into its own hands: type "
            "engine.bitwise=false",
        )  # fmt: skip
    if cfg.engine.preconditioner != "none":
        refuse(
            cfg, "engine.preconditioner",
            f"is about the optimizer's step on the whole batch, which policy={policy.name} does not take: "
            "type engine.preconditioner=none",
        )  # fmt: skip
    if cfg.engine.algebra == "fused":
        refuse(cfg, "engine.algebra", f"has no effect with policy={policy.name}: type engine.algebra=auto")
    if cfg.hardware.strategy == "fsdp":
        refuse(
            cfg, "hardware.strategy",
            f"splits the gradients that policy={policy.name} forms at the end of a step: type "
            "hardware.strategy=ddp, or policy=none",
        )  # fmt: skip
    _numbers(cfg)


def _numbers(cfg: DictConfig) -> None:
    policy = cfg.policy
    if policy.name in ("top_k", "bottom_k", "greedy"):
        is_fraction = isinstance(policy.k, float) and 0 < policy.k <= 1
        if not is_fraction and not (isinstance(policy.k, int) and policy.k >= 1):
            refuse(
                cfg, "policy.k",
                "is neither a whole number of samples nor a fraction of them: type policy.k=4, or 0.5",
            )  # fmt: skip
    if policy.name == "greedy":
        _greedy(cfg)
    if policy.name == "threshold" and not isfinite(policy.above):
        refuse(cfg, "policy.above", "must be a finite number")
    if policy.name == "softmax" and not (policy.temperature > 0 and isfinite(policy.temperature)):
        refuse(cfg, "policy.temperature", "must be a number greater than 0")
    if policy.name == "curriculum":
        for key in ("start", "end"):
            window = list(policy[key])
            if len(window) != 2 or not 0 <= window[0] < window[1] <= 1:
                refuse(cfg, f"policy.{key}", "must be two quantiles, the lower one first, such as [0.5,1]")


def _greedy(cfg: DictConfig) -> None:
    if cfg.policy.order not in (1, 2):
        refuse(cfg, "policy.order", "is not an order of the gains: type policy.order=1, or 2")
    if cfg.policy.order == 2 and cfg.hardware.strategy != "none":
        refuse(
            cfg, "policy.order",
            "needs the inner products of samples on different processes: type policy.order=1, or "
            "hardware.strategy=none",
        )  # fmt: skip
