"""Small networks for tables and images."""

from itertools import pairwise

from torch import nn


def mlp(hidden: list[int], inputs: int, classes: int) -> nn.Module:
    """Linear layers with ReLU between them: tables `[b, inputs]` to logits `[b, classes]`."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def cnn(channels: list[int], input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """3 × 3 convolutions with ReLU and pooling, then a linear head: images `[b, *input_shape]` to logits
    `[b, classes]`.
    """
    layers: list[nn.Module] = []
    width, height, breadth = input_shape
    for out in channels:
        layers += [nn.Conv2d(width, out, kernel_size=3, padding=1), nn.ReLU()]
        if min(height, breadth) >= 2:
            layers.append(nn.MaxPool2d(2))
            height, breadth = height // 2, breadth // 2
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * breadth, classes))
