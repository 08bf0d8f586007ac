"""Normalisation layers whose statistics are a sample's own: `nn.LayerNorm`."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ghost.gradients import Materialised, SampleGradients
from ghost.layers.base import LayerRule, register_layer


@register_layer(nn.LayerNorm)
class LayerNormRule(LayerRule):
    """Weight and bias of the normalised shape; either may be missing."""

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(x, module.normalized_shape, params.get("weight"), params.get("bias"), module.eps)

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        assert isinstance(module, nn.LayerNorm)
        shape = module.normalized_shape
        normalised = F.layer_norm(x, shape, eps=module.eps).to(grad.dtype)
        tokens = (x.shape[0], -1, *shape)  # [b, T, *shape]
        return {
            "weight": Materialised((grad * normalised).reshape(tokens).sum(1)),
            "bias": Materialised(grad.reshape(tokens).sum(1)),
        }
