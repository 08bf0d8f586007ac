"""Ghost gradients: how much every sample of a training run helped or hurt a validation objective."""

from ghost.config import GhostConfig, ValMode
from ghost.engines import GradDotProdEngine, RegularEngine, register_engine
from ghost.errors import BatchError, GhostConfigError, GhostError, ProtocolError, UnsupportedModelError
from ghost.gradients import Algebra
from ghost.layers import LayerRule, register_layer
from ghost.loss import LossReduction
from ghost.manager import GhostEngineManager
from ghost.selection import Selection

__all__ = [
    "Algebra",
    "BatchError",
    "GhostConfig",
    "GhostConfigError",
    "GhostEngineManager",
    "GhostError",
    "GradDotProdEngine",
    "LayerRule",
    "LossReduction",
    "ProtocolError",
    "RegularEngine",
    "Selection",
    "UnsupportedModelError",
    "ValMode",
    "register_engine",
    "register_layer",
]
