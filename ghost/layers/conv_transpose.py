"""Transposed convolutions `nn.ConvTranspose1d`, `nn.ConvTranspose2d` and `nn.ConvTranspose3d`."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ghost.gradients import Materialised, SampleGradients
from ghost.layers.base import LayerRule, register_layer
from ghost.layers.conv import kernel_gradients, windows


@register_layer(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeRule(LayerRule):
    """Weight `[c, p / groups, *kernel]`, bias `[p]`; the input is `[b, c, *spatial]`.

    A convolution with input and output gradient exchanged: each input position meets the window of the output
    that it wrote to.
    """

    inputs_first = True

    def smallest_rank(self, module: nn.Module) -> int:
        assert isinstance(module, _ConvTransposeNd)
        return 2 + len(module.kernel_size)

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        assert isinstance(module, _ConvTransposeNd)
        padded = F.pad(grad, module._reversed_padding_repeated_twice)
        seen = windows(padded, module.kernel_size, module.stride, module.dilation)
        for axis, size in enumerate(x.shape[2:], start=2):  # output_padding may leave room for more places
            seen = seen.narrow(axis, 0, size)
        return {
            "weight": kernel_gradients(x, seen, module.groups),
            "bias": Materialised(grad.flatten(2).sum(2)),
        }
