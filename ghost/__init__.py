"""Ghost gradients: how much every sample of a training run helped or hurt a validation objective."""

from ghost.attention import HeadLayout, register_attention
from ghost.batch import Items
from ghost.choice import Algebra
from ghost.config import GhostConfig, Resolution, ValMode
from ghost.engines import GradDotProdEngine, GradProjLoRAEngine, RegularEngine, register_engine
from ghost.errors import (
    BatchError,
    GhostConfigError,
    GhostError,
    ProtocolError,
    StoreError,
    UnsupportedModelError,
)
from ghost.layers import LayerRule, register_layer
from ghost.loss import LossReduction
from ghost.manager import GhostEngineManager
from ghost.policies import Policy, StepSamples, register_policy
from ghost.selection import Selection
from ghost.store import ProjectionStore
from ghost.verification import Verification
from ghost.verify import verify

__all__ = [
    "Algebra",
    "BatchError",
    "GhostConfig",
    "GhostConfigError",
    "GhostEngineManager",
    "GhostError",
    "GradDotProdEngine",
    "GradProjLoRAEngine",
    "HeadLayout",
    "Items",
    "LayerRule",
    "LossReduction",
    "Policy",
    "ProjectionStore",
    "ProtocolError",
    "RegularEngine",
    "Resolution",
    "Selection",
    "StepSamples",
    "StoreError",
    "UnsupportedModelError",
    "ValMode",
    "Verification",
    "register_attention",
    "register_engine",
    "register_layer",
    "register_policy",
    "verify",
]
