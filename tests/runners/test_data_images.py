import numpy as np
import pytest
import torch
from PIL import Image

from conf.errors import ConfigError
from runners.data.images import Normalisation, image_tensor, resized
from runners.errors import DataError


def test_resizing_keeps_what_is_even():
    torch.testing.assert_close(resized(torch.full((2, 3, 8, 8), 0.7), 32), torch.full((2, 3, 32, 32), 0.7))
    images = torch.rand(2, 1, 5, 5)
    assert resized(images, 5) is images


@pytest.mark.parametrize(("old", "new"), [(8, 32), (32, 8), (10, 15)])
def test_a_slope_stays_a_slope(old, new):
    slope = (torch.arange(old) + 0.5) / old  # at the centres of the pixels
    result = resized(slope.expand(1, 1, old, old), new)[0, 0, 0]
    inner = slice(new // 4, -(new // 4))  # the rim has neighbours on one side only
    torch.testing.assert_close(result[inner], ((torch.arange(new) + 0.5) / new)[inner])


def test_sides_are_scaled_each_by_its_own_factor():
    image = Image.fromarray(np.full((6, 12, 3), 51, np.uint8))
    torch.testing.assert_close(image_tensor(image, 3, 4, "it"), torch.full((3, 4, 4), 0.2))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_all_kinds_of_images_get_the_channels_asked_for(mode):
    image = Image.fromarray(np.full((4, 4, 3), 255, np.uint8)).convert(mode)
    for channels in (1, 3):
        torch.testing.assert_close(image_tensor(image, channels, 4, "it"), torch.ones(channels, 4, 4))


def test_images_without_a_brightest_value_are_refused():
    with pytest.raises(DataError, match=r"The image it has the mode F"):
        image_tensor(Image.fromarray(np.zeros((4, 4), np.float32)), 1, 4, "it")


def test_normalisation_is_by_channel():
    normalise = Normalisation([1.0, 2.0], [0.5, 4.0], channels=2)
    result = normalise(torch.full((2, 1, 1), 3.0))
    assert result.flatten().tolist() == [4.0, 0.25]
    with pytest.raises(ConfigError, match=r"data.mean has 2 numbers, and data.channels=1"):
        Normalisation([1.0, 2.0], None, channels=1)
