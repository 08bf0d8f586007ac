"""Convolutions `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: linear maps of the windows that the kernel sees."""

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ghost.gradients import Materialised, OuterProducts, SampleGradients
from ghost.layers.base import LayerRule, register_layer


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """What the kernel sees at each of its places in the padded `x`, without a copy.

    Args:
        x: `[b, c, *spatial]`.

    Returns:
        `[b, c, *places, *kernel]`.
    """
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def kernel_gradients(left: Tensor, seen: Tensor, groups: int) -> SampleGradients:
    """Per-sample gradients `Σ_l left_l ⊗ seen_l` of a kernel `[m, n / groups, *kernel]`.

    Args:
        left: `[b, m, *places]`.
        seen: Windows `[b, n, *places, *kernel]` of the other side.

    With one group as factors, which copies the windows: `b·n·L·k` numbers for L places and k kernel points.
    With several every sample's kernel is formed, `b·m·(n / groups)·k` numbers, one kernel point after the
    other, so that the windows' copy is `b·n·L` at a time.
    """
    spatial = left.dim() - 2
    kernel = seen.shape[2 + spatial :]
    if groups == 1:
        patches = seen.movedim(1, 1 + spatial)  # [b, *places, n, *kernel]
        patches = patches.flatten(1 + spatial).flatten(1, spatial)  # [b, L, n·k]
        shape = torch.Size((left.shape[1], seen.shape[1], *kernel))
        return OuterProducts(left.flatten(2).transpose(1, 2), patches, shape)
    left = left.flatten(2).unflatten(1, (groups, -1))  # [b, G, m/G, L]
    by_point = seen.movedim(tuple(range(-spatial, 0)), tuple(range(spatial)))  # [*kernel, b, n, *places]
    points = []
    for point in itertools.product(*(range(size) for size in kernel)):
        right = by_point[point].flatten(2).unflatten(1, (groups, -1))  # [b, G, n/G, L]
        points.append(left @ right.transpose(2, 3))  # [b, G, m/G, n/G]
    return Materialised(torch.stack(points, -1).flatten(1, 2).unflatten(-1, kernel))


@register_layer(
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d",
)  # fmt: skip
class ConvRule(LayerRule):
    """Weight `[p, c / groups, *kernel]`, bias `[p]`; the input is `[b, c, *spatial]`."""

    def smallest_rank(self, module: nn.Module) -> int:
        assert isinstance(module, _ConvNd)
        return 2 + len(module.kernel_size)

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return module._conv_forward(x, params["weight"], params.get("bias"))

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        assert isinstance(module, _ConvNd)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        seen = windows(padded, module.kernel_size, module.stride, module.dilation)
        return {
            "weight": kernel_gradients(grad, seen, module.groups),
            "bias": Materialised(grad.flatten(2).sum(2)),
        }
