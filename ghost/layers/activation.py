"""Activations with a parameter: `nn.PReLU`."""

from torch import Tensor, nn

from ghost.gradients import Materialised, SampleGradients
from ghost.layers.base import LayerRule, register_layer, sum_rows_to


@register_layer(nn.PReLU)
class PReLURule(LayerRule):
    """Weight `[1]`, or `[c]` for inputs `[b, c, …]`: the slope of what is negative."""

    def smallest_rank(self, module: nn.Module) -> int:
        assert isinstance(module, nn.PReLU)
        return 1 if module.num_parameters == 1 else 2

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        assert isinstance(module, nn.PReLU)
        values = grad * x.clamp(max=0)  # [b, …], or [b, c, …]
        trailing = max(0, x.dim() - 2) if module.num_parameters > 1 else 0
        summed = sum_rows_to(values, (module.num_parameters, *(1,) * trailing))
        return {"weight": Materialised(summed.flatten(1))}
