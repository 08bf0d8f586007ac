"""One file a kind of layer; importing this package registers them all."""

from ghost.layers import (
    activation,
    channel_norm,
    conv,
    conv_transpose,
    elementwise,
    embedding,
    linear,
    norm,
    whole,
)
from ghost.layers.base import Layer, LayerRule, Rule, register_layer, rule_for
from ghost.layers.elementwise import ElementwiseAffineRule
from ghost.layers.whole import WholeRule

__all__ = [
    "ElementwiseAffineRule",
    "Layer",
    "LayerRule",
    "Rule",
    "WholeRule",
    "activation",
    "channel_norm",
    "conv",
    "conv_transpose",
    "elementwise",
    "embedding",
    "linear",
    "norm",
    "register_layer",
    "rule_for",
    "whole",
]
