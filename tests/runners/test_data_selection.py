import numpy as np
import pytest

from runners.data.selection import VAL_SEED, choose, draw, hold_out, in_stable_order
from runners.errors import DataError

DOCUMENTS = [f"d/{i}" for i in range(40)]


def counts(n):
    return lambda i: n


def test_the_order_is_a_permutation_that_the_seed_picks():
    first, other = in_stable_order(DOCUMENTS, 0), in_stable_order(DOCUMENTS, 1)
    assert sorted(first) == sorted(other) == list(range(40))
    assert first != other
    assert in_stable_order(DOCUMENTS, 0) == first


def test_two_ids_keep_their_order_when_others_go():
    kept = [DOCUMENTS[i] for i in in_stable_order(DOCUMENTS, 5) if i % 2]
    assert [DOCUMENTS[1::2][i] for i in in_stable_order(DOCUMENTS[1::2], 5)] == kept


def test_a_draw_spreads_over_documents_before_it_takes_more_of_one():
    keys = draw(DOCUMENTS, counts(100), 20, seed=0)
    assert len(set(keys)) == 20
    assert len({document for document, _ in keys}) == 5
    few = draw(DOCUMENTS[:3], counts(100), 50, seed=0)
    assert len(set(few)) == 50
    assert len(draw(DOCUMENTS[:3], counts(2), 50, seed=0)) == 6


def test_a_draw_asks_only_for_the_documents_it_needs():
    asked = []

    def count(i):
        asked.append(i)
        return 10

    draw(DOCUMENTS, count, 8, seed=0)
    assert len(set(asked)) == 2


@pytest.mark.parametrize(("windows", "expected"), [(1, 12), (4, 3), (100, 3), (3, 4)])
def test_validation_takes_as_many_documents_as_it_needs(windows, expected):
    assert len(hold_out(DOCUMENTS, counts(windows), 12)) == expected


def test_one_long_document_serves_validation_where_there_are_few():
    assert len(hold_out(DOCUMENTS[:3], counts(100), 32)) == 1


@pytest.mark.parametrize(("documents", "needed"), [(1, 1), (3, 100), (0, 1)])
def test_no_document_left_to_train_on_is_an_error(documents, needed):
    with pytest.raises(DataError, match=f"data.val_samples={needed}"):
        hold_out(DOCUMENTS[:documents], counts(2), needed)


def test_all_windows_of_the_other_documents_are_for_training():
    lengths = [i % 4 for i in range(40)]
    train, val = choose(DOCUMENTS, lengths.__getitem__, None, 5, seed=0)
    held = hold_out(DOCUMENTS, lengths.__getitem__, 5)
    expected = [(i, k) for i in range(40) if i not in held for k in range(lengths[i])]
    assert train.tolist() == [list(key) for key in expected]
    assert train.dtype == np.int64
    assert len(val) == 5
    assert set(val[:, 0].tolist()) <= set(held)


def test_the_seed_moves_training_and_not_validation():
    first, other = (choose(DOCUMENTS, counts(9), 30, 6, seed) for seed in (VAL_SEED, 7))
    assert first[0].tolist() != other[0].tolist()
    assert first[1].tolist() == other[1].tolist()
    assert set(first[0][:, 0].tolist()).isdisjoint(first[1][:, 0].tolist())


def test_marked_documents_are_validation():
    train, val = choose(DOCUMENTS, counts(1), None, 2, seed=0, held=[0, 1, 2])
    assert set(val[:, 0].tolist()) < {0, 1, 2}
    assert train[:, 0].tolist() == list(range(3, 40))
    with pytest.raises(DataError, match="exceeds the 3 windows marked"):
        choose(DOCUMENTS, counts(1), None, 4, seed=0, held=[0, 1, 2])


def test_too_many_training_samples_say_how_many_there_are():
    with pytest.raises(DataError, match=r"data.train_samples=100 exceeds the 38"):
        choose(DOCUMENTS, counts(1), 100, 2, seed=0)
