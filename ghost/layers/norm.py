"""Normalisation layers whose statistics are a sample's own: `nn.LayerNorm`."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ghost.gradients import Materialised, SampleGradients
from ghost.layers.base import LayerRule, register_layer, sum_rows_to


@register_layer(nn.LayerNorm)
class LayerNormRule(LayerRule):
    """Weight and bias of the normalised shape; either may be missing."""

    any_rank = True

    def smallest_rank(self, module: nn.Module) -> int:
        assert isinstance(module, nn.LayerNorm)
        return 1 + len(module.normalized_shape)

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(x, module.normalized_shape, params.get("weight"), params.get("bias"), module.eps)

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        assert isinstance(module, nn.LayerNorm)
        shape = module.normalized_shape
        normalised = F.layer_norm(x, shape, eps=module.eps).to(grad.dtype)  # a tensor of our own
        return {
            "weight": Materialised(sum_rows_to(normalised.mul_(grad), shape)),
            "bias": Materialised(sum_rows_to(grad, shape)),
        }
