"""One file an engine; importing this package registers them all."""

from ghost.engines.base import Engine, LayerScores, LossFn, engine_class, register_engine
from ghost.engines.graddotprod import GradDotProdEngine
from ghost.engines.gradprojlora import GradProjLoRAEngine
from ghost.engines.regular import RegularEngine

__all__ = [
    "Engine",
    "GradDotProdEngine",
    "GradProjLoRAEngine",
    "LayerScores",
    "LossFn",
    "RegularEngine",
    "engine_class",
    "register_engine",
]
