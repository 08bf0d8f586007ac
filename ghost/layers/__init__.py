"""One file a kind of layer; importing this package registers them all."""

from ghost.layers import conv, embedding, linear, norm
from ghost.layers.base import Layer, LayerRule, register_layer, registered_types, rule_for

__all__ = [
    "Layer",
    "LayerRule",
    "conv",
    "embedding",
    "linear",
    "norm",
    "register_layer",
    "registered_types",
    "rule_for",
]
