"""Images as tensors: channels first, float32, of one size."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from conf.errors import ConfigError
from runners.errors import DataError

# How PIL converts to so many channels: grey is repeated, colour weighed to its brightness.
MODES = {1: "L", 3: "RGB"}

# 8 bits a channel; the others (16 bits, floats) have no fixed brightest value.
READABLE_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def image_tensor(image: Image.Image, channels: int, size: int, name: str) -> torch.Tensor:
    """`[channels, size, size]` float32 in [0, 1]; `name` stands for the image in errors.

    Raises DataError for an image of more than 8 bits a channel.
    """
    if image.mode not in READABLE_MODES:
        raise DataError(
            f"The image {name} has the mode {image.mode}, whose brightest value is not fixed; convert it to "
            "8 bits a channel."
        )
    pixels = torch.from_numpy(np.array(image.convert(MODES[channels]), dtype=np.float32) / 255)
    pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1)  # [channels, H, W]
    return resized(pixels[None], size)[0].contiguous()


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images `[n, c, H, W]` as `[n, c, size, size]`, bilinear and without aliases; sides are scaled each by
    their own factor.
    """
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


class Normalisation:
    """Subtracts a mean and divides by a standard deviation, channel by channel."""

    def __init__(self, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
        """None: 0 for all means, 1 for all deviations. Raises ConfigError for numbers that do not fit."""
        self.mean = torch.tensor(mean if mean is not None else [0.0] * channels)[:, None, None]
        self.std = torch.tensor(std if std is not None else [1.0] * channels)[:, None, None]
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ConfigError(
                    f"data.{key} has {len(values)} numbers, and data.channels={channels}: give one a channel."
                )
        if bool((self.std <= 0).any()):
            raise ConfigError(f"data.std={self.std.flatten().tolist()} must be greater than 0 everywhere.")

    def __str__(self) -> str:
        return f"mean {self.mean.flatten().tolist()} std {self.std.flatten().tolist()}"

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """An image `[c, H, W]`."""
        return (image - self.mean) / self.std
