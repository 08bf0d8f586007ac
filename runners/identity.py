"""When two runs are the same run: what of a config decides values, weights and metrics."""

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.help_text import typed
from runners.tracking import flatten

# Where a run's files and records go, what is shown of it, and how its process is started.
WITHOUT_EFFECT = (
    *("output_dir", "resume", "dry_run", "verify", "preview", "report_text"),
    *("tracking", "sweep", "model.name", "data.num_workers"),
    *("trainer.checkpoint_every", "trainer.keep_checkpoints"),
)


def deciding_keys(cfg: DictConfig) -> dict[str, Any]:
    """The keys that decide what a run computes, by dotted name."""
    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    idle = tuple(f"{name}." for name in WITHOUT_EFFECT)
    return {key: value for key, value in flatten(resolved).items() if not f"{key}.".startswith(idle)}


def fingerprint(cfg: DictConfig) -> str:
    """SHA-256 (hex) over `deciding_keys`: equal for runs that compute the same."""
    return hashlib.sha256(json.dumps(deciding_keys(cfg), sort_keys=True).encode()).hexdigest()


def differences(ours: DictConfig, theirs: DictConfig) -> list[str]:
    """Each key that decides and differs, as `key=ours (was theirs)`."""
    new, old = deciding_keys(ours), deciding_keys(theirs)
    return [
        f"{key}={typed(new.get(key))} (was {typed(old.get(key))})"
        for key in sorted({*new, *old})
        if new.get(key) != old.get(key)
    ]
