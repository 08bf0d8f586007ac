"""scikit-learn's handwritten digits: 1,797 images of 8 × 8 grey values in ten classes."""

import hashlib
import logging

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from conf.errors import ConfigError
from runners.choices import TaskName
from runners.data.base import DataBundle, Item, SampleSet, require_at_least
from runners.data.images import resized
from runners.data.selection import choose_rows

log = logging.getLogger(__name__)

CLASSES = 10
SIDE = 8  # pixels
BRIGHTEST = 16.0


class DigitSet(SampleSet):
    """Images as float32 in [0, 1], flat or with channels, and their classes."""

    def __init__(
        self,
        images: torch.Tensor,
        classes: NDArray[np.int64],
        labels: NDArray[np.int64],
        rows: NDArray[np.int64],
        offset: int,
    ) -> None:
        """`images` `[n, 64]` or `[n, c, H, W]`; `classes` (true), `labels` (trained on) and `rows` `[n]`."""
        self.images = images
        self.labels = torch.from_numpy(labels)
        self.offset = offset
        self.sample_ids = [f"digits/{row}" for row in rows]
        self.domains = [f"digit-{number}" for number in classes]
        self.noisy: NDArray[np.bool_] = labels != classes
        """`[n]`: which labels are wrong on purpose."""

    def __getitem__(self, i: int) -> Item:
        return self.images[i], self.labels[i], self.offset + i

    def preview(self, i: int, width: int = 80) -> str:
        note = " (wrong on purpose)" if self.noisy[i] else ""
        return f"{self.domains[i]}, labelled {int(self.labels[i])}{note}"[:width]


def build_digits(cfg: DictConfig) -> DataBundle:
    """All digits: `data.val_samples` of them, the same for every seed, for validation, the rest for training.

    `data.label_noise` is the share of training labels that are replaced by a wrong class, picked by
    `data.seed`. Raises ConfigError for a share or a number of samples out of range.
    """
    # scikit-learn takes a second to import, and language runs do without it.
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    classes = classes.astype(np.int64)
    _check(cfg, len(classes))
    ids = [f"digits/{row}" for row in range(len(classes))]
    train_rows, val_rows = choose_rows(ids, None, cfg.val_samples, cfg.seed)
    images = digit_images(pixels, cfg.channels, cfg.image_size) if cfg.as_image else flat_digits(pixels)
    labels = noisy_labels(classes[train_rows], cfg.label_noise, cfg.seed)
    train = DigitSet(images[train_rows], classes[train_rows], labels, train_rows, 0)
    val = DigitSet(images[val_rows], classes[val_rows], classes[val_rows], val_rows, len(train))
    log.info("Digits: %d of %d training labels are wrong on purpose.", int(train.noisy.sum()), len(train))
    return DataBundle(
        train=train,
        val=val,
        task=TaskName.image_classes if cfg.as_image else TaskName.table_classes,
        vocab_size=None,
        input_shape=digit_shape(cfg),
        num_classes=CLASSES,
        fingerprint=_fingerprint([train, val]),
        description=(
            f"scikit-learn's digits {list(images.shape[1:])}: {len(train)} training and {len(val)} "
            "validation images"
        ),
    )


def digit_shape(cfg: DictConfig) -> tuple[int, ...]:
    """The shape of one input, as the config's `data` node says it."""
    return (cfg.channels, cfg.image_size, cfg.image_size) if cfg.as_image else (SIDE * SIDE,)


def flat_digits(pixels: NDArray[np.float64]) -> torch.Tensor:
    """scikit-learn's grey values `[n, 64]` from 0 to 16, as float32 in [0, 1]."""
    return torch.from_numpy((pixels / BRIGHTEST).astype(np.float32))


def digit_images(pixels: NDArray[np.float64], channels: int, size: int) -> torch.Tensor:
    """Grey values `[n, 64]` as images `[n, channels, size, size]`, interpolated; all channels are alike."""
    images = resized(flat_digits(pixels).reshape(-1, 1, SIDE, SIDE), size)
    return images.expand(-1, channels, -1, -1).contiguous()


def noisy_labels(classes: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """A copy of `classes` `[n]` with `round(share · n)` entries, picked by the seed, changed to another."""
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(classes))[: round(share * len(classes))]
    labels = classes.copy()
    # Steps of 1 to 9 around the circle of ten classes never come back to the true one.
    labels[chosen] = (labels[chosen] + generator.integers(1, CLASSES, len(chosen))) % CLASSES
    return labels


def _check(cfg: DictConfig, total: int) -> None:
    if not 0 <= cfg.label_noise < 1:
        raise ConfigError(f"data.label_noise={cfg.label_noise} must be at least 0 and below 1.")
    require_at_least(cfg, "val_samples", 1)
    if cfg.val_samples >= total:
        raise ConfigError(
            f"data.val_samples={cfg.val_samples} leaves none of the {total} digits to train on."
        )


def _fingerprint(sets: list[DigitSet]) -> str:
    digest = hashlib.sha256()
    for samples in sets:
        digest.update("\0".join(samples.sample_ids).encode())
        digest.update(samples.images.numpy().astype("<f4").tobytes())
        digest.update(samples.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
