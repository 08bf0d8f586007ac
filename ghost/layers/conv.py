"""Convolutions as linear maps of unfolded patches: `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with one group."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ghost.errors import UnsupportedModelError
from ghost.gradients import Materialised, OuterProducts, SampleGradients
from ghost.layers.base import LayerRule, register_layer


def unfold(x: Tensor, module: _ConvNd) -> Tensor:
    """The patches that each output position sees: `[b, L, c·k]`, L output positions, c channels, k kernel
    points.
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    patches = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)  # [b, c, *padded]
    spatial = len(module.kernel_size)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        patches = patches.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    # [b, c, *out, *kernel] -> [b, *out, c, *kernel]
    patches = patches.movedim(1, 1 + spatial)
    return patches.flatten(1 + spatial).flatten(1, spatial)


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(LayerRule):
    """Weight `[p, c, *kernel]`, bias `[p]`; the input is `[b, c, *spatial]`."""

    def check(self, name: str, module: nn.Module) -> None:
        assert isinstance(module, _ConvNd)
        if module.groups != 1:
            raise UnsupportedModelError(
                f"layer {name!r} is a convolution with groups={module.groups}: only groups=1 is supported."
            )

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return module._conv_forward(x, params["weight"], params.get("bias"))

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        assert isinstance(module, _ConvNd)
        grad = grad.flatten(2).transpose(1, 2)  # [b, L, p]
        return {
            "weight": OuterProducts(grad, unfold(x, module), module.weight.shape),
            "bias": Materialised(grad.sum(1)),
        }
