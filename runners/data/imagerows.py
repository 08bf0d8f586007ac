"""Images of a Hugging Face data set as samples: decoded one at a time, from memory-mapped files."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from conf.errors import ConfigError
from runners.data.base import Item, SampleSet
from runners.data.hfrows import Side
from runners.data.hub import Source
from runners.data.images import Normalisation, image_tensor


class ImageColumn:
    """The images of a column, of one size and normalised."""

    def __init__(
        self, source: Source, field: str, channels: int, size: int, normalise: Normalisation
    ) -> None:
        """Raises ConfigError if the column holds something else."""
        from datasets import Image  # an extra, which the source has found

        if not isinstance(source.table.features[field], Image):
            raise ConfigError(
                f"data.image_field={field} of {source.label} holds {source.table.features[field]} and no "
                "images; name a column of images."
            )
        self._images = source.table.select_columns([field])
        self._encoded = self._images.cast_column(field, Image(decode=False))
        self._field, self._label = field, source.label
        self._channels, self._size, self._normalise = channels, size, normalise

    def tensor(self, row: int) -> torch.Tensor:
        """`[channels, size, size]` float32."""
        name = f"in row {row} of {self._label}"
        return self._normalise(image_tensor(self._images[row][self._field], self._channels, self._size, name))

    def encoded(self, row: int) -> bytes:
        """The image's file as it stands."""
        stored = self._encoded[row][self._field]
        return Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]

    @property
    def preparation(self) -> str:
        """All that decides a tensor beside the file."""
        return f"{self._channels} {self._size} {self._normalise}"


class ImageRows(SampleSet):
    """Images and their classes."""

    def __init__(
        self,
        column: ImageColumn,
        side: Side,
        classes: NDArray[np.int64],
        class_names: Sequence[str],
        offset: int,
    ) -> None:
        """`classes` `[rows of the data set]`."""
        self.column = column
        self.rows = side.rows
        self.labels = torch.from_numpy(classes[side.rows])
        self.sample_ids = side.ids
        self.domains = side.domains
        self.offset = offset
        self._class_names = class_names

    def __getitem__(self, i: int) -> Item:
        return self.column.tensor(self.rows[i]), self.labels[i], self.offset + i

    def preview(self, i: int, width: int = 80) -> str:
        return f"an image of the class {self._class_names[int(self.labels[i])]}"[:width]


def fingerprint_images(sets: Iterable[ImageRows]) -> str:
    """SHA-256 (hex) over ids, labels, the images' files and how they are prepared."""
    digest = hashlib.sha256()
    for samples in sets:
        digest.update(f"{samples.column.preparation}\0".encode())
        digest.update("\0".join(samples.sample_ids).encode())
        digest.update(samples.labels.numpy().astype("<i8").tobytes())
        for row in samples.rows:
            digest.update(samples.column.encoded(row))
    return digest.hexdigest()
