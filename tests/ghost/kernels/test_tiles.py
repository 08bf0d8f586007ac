"""How work is cut, for GPUs that are not here."""

import pytest
import torch

from ghost.errors import GhostError
from ghost.kernels import tiles, tuning
from ghost.kernels.tiles import SHORT, Tiles

H100 = 132
"""Multiprocessors."""

BIG = SHORT[0]


@pytest.mark.parametrize(
    ("samples", "m", "n", "splits"),
    [
        (16, 768, 768, 3),  # 36 tiles would leave most processors idle
        (16, 3072, 768, 4),  # 144 tiles: a second wave for twelve of them
        (16, 50257, 768, 1),
        (1, 64, 64, 16),
    ],
)
def test_splits_of_gpt2_layers(samples: int, m: int, n: int, splits: int) -> None:
    assert BIG.splits(samples, 1024, m, n, H100) == splits


def test_there_is_a_step_for_every_split() -> None:
    assert BIG.splits(1, 64, 768, 768, H100) == 1
    assert BIG.splits(0, 64, 768, 768, H100) == 1
    assert BIG.splits(2, 70, 64, 64, H100) <= 4


def test_chunks_cover_all_rows() -> None:
    assert list(tiles.chunks(300, 3, 1000)) == [slice(0, 256), slice(256, 300)]
    assert list(tiles.chunks(300, 1 << 20, 1000)) == [slice(0, 128), slice(128, 256), slice(256, 300)]
    assert list(tiles.chunks(300, 0, 1000)) == [slice(0, 300)]
    assert list(tiles.chunks(0, 3, 1000)) == []


def test_chunks_have_a_largest_size() -> None:
    rows, row_bytes = 1 << 20, 1 << 10
    largest = next(tiles.chunks(rows, row_bytes))
    assert largest.stop * row_bytes == tiles.CHUNK_BYTES
    assert next(tiles.chunks(rows, row_bytes, 4 * tiles.CHUNK_BYTES)) == largest


SECONDS = {SHORT[0]: 3.0, SHORT[1]: 1.0, SHORT[2]: 2.0}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Tiles]:
    """Tiles in the order in which they are run, with `SECONDS` as their times and an empty memory."""
    monkeypatch.setattr(tuning, "_fastest", {})
    found: list[Tiles] = []

    def bench(run: "tuning.partial[object]", **settings: object) -> float:
        return SECONDS[run.args[0]]

    monkeypatch.setattr(tuning, "do_bench", bench)
    return found


def test_the_fastest_tiles_are_found_once(tried: list[Tiles]) -> None:
    for _ in range(2):
        assert tuning.choose("a", SECONDS, tried.append) == SHORT[1]
    assert tried == list(SECONDS)  # compiled; the times are `bench`'s
    tuning.choose("b", SECONDS, tried.append)
    assert len(tried) == 2 * len(SECONDS)


def test_tiles_that_do_not_fit_are_left_out(tried: list[Tiles]) -> None:
    def run(candidate: Tiles) -> None:
        if candidate == SHORT[1]:
            raise tuning.OutOfResources(300_000, 200_000, "shared memory")

    assert tuning.choose("a", SECONDS, run) == SHORT[2]
    with pytest.raises(GhostError, match="too little shared memory"):
        tuning.choose("b", [SHORT[1]], run)


def test_deterministic_algorithms_take_the_first_that_fits(tried: list[Tiles]) -> None:
    assert tuning.choose("a", SECONDS, tried.append) == SHORT[1]
    torch.use_deterministic_algorithms(True)
    try:
        assert tuning.choose("a", SECONDS, tried.append) == SHORT[0]
    finally:
        torch.use_deterministic_algorithms(False)
