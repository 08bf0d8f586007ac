"""What is planted in a corpus, and where."""

import pytest
import torch

from runners.errors import DataError
from runners.fidelity.planting import KINDS, PIECE, plant
from runners.tokenizer import load_tokenizer

T = 12


def corpus(samples: int) -> list[torch.Tensor]:
    """Samples of ascending tokens below 100, none like another."""
    return [torch.arange(T) + i for i in range(samples)]


def test_bad_samples_and_copies_stand_in_places_of_their_own() -> None:
    tokens = corpus(60)
    planted = plant(tokens, load_tokenizer("bytes"), bad=4, originals=3, copies=2, seed=0)
    assert {kind: len(places) for kind, places in planted.bad.items()} == dict.fromkeys(KINDS, 4)
    assert [len(group) for group in planted.groups] == [3, 3, 3]
    places = planted.all_bad + [i for group in planted.groups for i in group]
    assert len(set(places)) == len(places)
    for i in set(range(60)) - set(places):
        assert torch.equal(planted.tokens[i], tokens[i])
        assert torch.equal(planted.without_copies[i], tokens[i])
    for original, *copies in planted.groups:
        for i in copies:
            assert torch.equal(planted.tokens[i], tokens[original])
            assert torch.equal(planted.without_copies[i], tokens[i])


def test_each_kind_is_what_its_name_says() -> None:
    tokens = corpus(60)
    planted = plant(tokens, load_tokenizer("bytes"), bad=4, originals=2, copies=1, seed=0)
    for i in planted.bad["shuffled"]:
        assert sorted(planted.tokens[i].tolist()) == tokens[i].tolist()
        assert not torch.equal(planted.tokens[i], tokens[i])
    for i in planted.bad["repeated"]:
        assert planted.tokens[i].tolist() == tokens[i][:PIECE].tolist() * (T // PIECE)
    drawn = torch.cat([planted.tokens[i] for i in planted.bad["bytes"]])
    assert drawn.max() > 127  # the corpus has none above 70
    assert {len(sample) for sample in planted.tokens} == {T}
    assert {sample.dtype for sample in planted.tokens} == {torch.int64}


def test_random_bytes_are_encoded_by_any_tokenizer() -> None:
    planted = plant(corpus(10), load_tokenizer("gpt2"), bad=1, originals=2, copies=1, seed=0)
    (place,) = planted.bad["bytes"]
    assert len(planted.tokens[place]) == T
    assert int(planted.tokens[place].max()) < 50_257


def test_the_seed_alone_decides() -> None:
    first, again, other = (
        plant(corpus(60), load_tokenizer("bytes"), bad=4, originals=2, copies=1, seed=seed)
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.tokens, again.tokens, strict=True))
    assert first.bad != other.bad


def test_too_small_a_corpus_is_refused() -> None:
    with pytest.raises(DataError, match="17 samples are to be planted and the corpus has 16"):
        plant(corpus(16), load_tokenizer("bytes"), bad=3, originals=2, copies=3, seed=0)
