"""The manager's settings in loops that are not the user's own."""

from collections.abc import Mapping
from typing import Any

from ghost.config import GhostConfig, ValMode
from ghost.engines import engine_class
from ghost.errors import GhostConfigError


def scoring_settings(given: Any, taker: str, joined: str) -> GhostConfig:
    """Settings of an engine that scores, with a validation pass of its own unless something else is said.

    Args:
        taker: Who takes them, for the error.
        joined: What validation rows in the training batch would do, for the error.

    Raises:
        GhostConfigError: Another engine, or another `val_mode`.
    """
    if isinstance(given, Mapping):
        given = {"val_mode": ValMode.SEPARATE, **given}
    config = GhostConfig.read(given)
    if not engine_class(config.engine).needs_optimizer:
        raise GhostConfigError(
            f"engine={config.engine!r} scores nothing: {taker} takes one that does, 'graddotprod'."
        )
    if config.val_mode is not ValMode.SEPARATE:
        raise GhostConfigError(
            f"val_mode={config.val_mode.value!r} would {joined}: {taker} takes 'separate'."
        )
    return config
