"""Linear maps: `nn.Linear` (`y = x Wᵀ + b`) and Hugging Face's `Conv1D` (`y = x W + b`), on inputs of any
rank.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ghost.gradients import Materialised, OuterProducts, SampleGradients
from ghost.layers.base import LayerRule, register_layer


def as_tokens(x: Tensor) -> Tensor:
    """`[b, …, d]` as `[b, T, d]`, T being 1 for a matrix."""
    return x.flatten(1, -2) if x.dim() > 2 else x[:, None]


@register_layer(nn.Linear, NonDynamicallyQuantizableLinear)
class LinearRule(LayerRule):
    """Weight `[p, d]`, bias `[p]`."""

    any_rank = True

    def smallest_rank(self, module: nn.Module) -> int:
        return 2

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, params["weight"], params.get("bias"))

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        x, grad = as_tokens(x), as_tokens(grad)  # [b, T, d], [b, T, p]
        return {"weight": OuterProducts(grad, x), "bias": Materialised(grad.sum(1))}


@register_layer("transformers.pytorch_utils.Conv1D")
class Conv1DRule(LayerRule):
    """Weight `[d, p]`, bias `[p]`."""

    inputs_first = True
    any_rank = True

    def smallest_rank(self, module: nn.Module) -> int:
        return 2

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, params["weight"].T, params["bias"])

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        x, grad = as_tokens(x), as_tokens(grad)  # [b, T, d], [b, T, p]
        return {"weight": OuterProducts(x, grad), "bias": Materialised(grad.sum(1))}
