"""Normalisation with one weight and bias a channel: `nn.GroupNorm`, `nn.InstanceNorm*d`, and `nn.BatchNorm*d`
by running statistics.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ghost.gradients import Materialised, SampleGradients
from ghost.layers.base import LayerRule, register_layer


def by_running_statistics(module: _BatchNorm | _InstanceNorm, x: Tensor) -> Tensor:
    """`x` `[b, c, *spatial]` normalised by the module's running mean and variance."""
    assert module.running_mean is not None
    assert module.running_var is not None
    channels = (-1, *(1,) * (x.dim() - 2))  # [c] as [c, 1, …]
    mean, variance = module.running_mean.view(channels), module.running_var.view(channels)
    return (x - mean) * torch.rsqrt(variance + module.eps)


class ChannelNormRule(LayerRule):
    """Weight and bias `[c]`, either of which may be missing; the input is `[b, c, *spatial]`."""

    def smallest_rank(self, module: nn.Module) -> int:
        return 2

    @abstractmethod
    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the weight is multiplied with, in the shape of `x`."""

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        normalised = self.normalised(module, x).to(grad.dtype)
        return {
            "weight": Materialised((grad * normalised)[..., None].flatten(2).sum(2)),
            "bias": Materialised(grad[..., None].flatten(2).sum(2)),
        }


@register_layer(nn.GroupNorm)
class GroupNormRule(ChannelNormRule):
    """Statistics of a sample's groups of channels."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(x, module.num_groups, eps=module.eps)


@register_layer(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(ChannelNormRule):
    """Statistics of a sample's channels, or running ones in eval mode where they are tracked (tracking them
    in training mode is refused: `ghost.discovery.refuse_mixing_layers`).
    """

    def smallest_rank(self, module: nn.Module) -> int:
        assert isinstance(module, _InstanceNorm)
        return module._get_no_batch_dim() + 1

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, _InstanceNorm)
        if module.running_mean is None:
            return F.instance_norm(x, eps=module.eps)
        return by_running_statistics(module, x)


@register_layer(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
class BatchNormRule(ChannelNormRule):
    """Running statistics, in eval mode (a batch's own are refused by
    `ghost.discovery.refuse_mixing_layers`).
    """

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, _BatchNorm)
        return by_running_statistics(module, x)
