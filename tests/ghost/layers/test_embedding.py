"""Look-up tables: padding, refused options, and positions that are shared by all samples."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import BatchError, GhostEngineManager, LossReduction, UnsupportedModelError
from tests.ghost.harness import MODES, assert_exact, scored_step
from tests.ghost.models import classes
from tests.ghost.reference import class_loss, token_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


def ids(rows: int, *shape: int) -> Tensor:
    return torch.randint(0, 9, (rows, *shape))


class Bag(nn.Module):
    """A bag of words with a table of positions: `positions` makes the positions' ids from the words'."""

    def __init__(self, positions: str = "none", padding_idx: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6, padding_idx=padding_idx)
        if positions != "none":
            self.places = nn.Embedding(16, 6)
        self.out = nn.Linear(6, 4)
        self.positions = positions
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        if self.positions == "vector":
            h = h + self.places(torch.arange(x.shape[1]))
        elif self.positions == "row":
            h = h + self.places(torch.arange(x.shape[1])[None])
        elif self.positions == "matrix":
            h = h + self.places(torch.arange(x.shape[1]).expand(len(x), -1))
        return self.out(torch.tanh(h))


@each_mode
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3)])
def test_ids_of_any_rank(mode: dict[str, Any], shape: tuple[int, ...]) -> None:
    train, val = (ids(5, *shape), classes(5)), (ids(3, *shape), classes(3))
    assert_exact(Bag(), mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@each_mode
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_width(mode: dict[str, Any], dtype: torch.dtype) -> None:
    train, val = (ids(5, 7).to(dtype), classes(5)), (ids(3, 7).to(dtype), classes(3))
    assert_exact(Bag(padding_idx=-1), mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


class Shifted(nn.Module):
    """Rows without a word have places: a table that is not looked up has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(9, 6), nn.Linear(6, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x).sum(1))


@each_mode
def test_rows_without_ids(mode: dict[str, Any]) -> None:
    train, val = (ids(5, 0), classes(5)), (ids(3, 0), classes(3))
    found = assert_exact(Shifted(), mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)
    assert found.by_layer["words"].eq(0).all()


@each_mode
def test_padded_ids_are_neither_scored_nor_updated(mode: dict[str, Any]) -> None:
    model = Bag(padding_idx=0)
    nn.init.normal_(model.words.weight)  # the padded row as well: nothing may hang on its being zero
    X, V = ids(5, 7), ids(3, 7)
    X[:, 4:], V[:, 5:] = 0, 0
    X[4] = 0
    found = assert_exact(model, mode, (X, classes(5)), (V, classes(3)), class_loss, LossReduction.SAMPLE_MEAN)
    assert found.grads["words.weight"][0].eq(0).all()
    assert found.by_layer["words"][4] == 0
    assert found.by_layer["words"][:4].ne(0).all()


class TiedTagger(nn.Module):
    """A padded table whose matrix is the head's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.words.weight
        nn.init.normal_(self.words.weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.words(x))))


@each_mode
@pytest.mark.parametrize("form", ["short", "protocol"])
def test_padding_of_a_tied_table(mode: dict[str, Any], form: str) -> None:
    """The padded row is no input's, but the head still learns it."""
    X, V = ids(5, 7), ids(3, 7)
    X[:, 4:], V[:, 5:] = 0, 0
    train, val = (X, ids(5, 7)), (V, ids(3, 7))
    found = assert_exact(TiedTagger(), mode, train, val, token_loss, LossReduction.TOKEN_MEAN, form)
    assert found.grads["words.weight"][0].ne(0).all()


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_options_that_cannot_be_exact_are_refused_by_name(option: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(9, 6, **option), nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModelError, match=rf"'0'.*{next(iter(option))}"):
        GhostEngineManager(
            {"loss_reduction": "sample_mean"}, model, optimizer, val_data=(ids(2, 7), classes(2))
        )


@each_mode
@pytest.mark.parametrize("positions", ["vector", "row", "matrix"])
@pytest.mark.parametrize("form", ["short", "protocol"])
def test_positions_shared_by_all_samples(mode: dict[str, Any], positions: str, form: str) -> None:
    train, val = (ids(5, 7), classes(5)), (ids(3, 7), classes(3))
    assert_exact(Bag(positions), mode, train, val, class_loss, LossReduction.SAMPLE_MEAN, form)


@each_mode
def test_one_sample_beside_shared_positions(mode: dict[str, Any]) -> None:
    train, val = (ids(1, 7), classes(1)), (ids(3, 7), classes(3))
    assert_exact(Bag("row"), mode, train, val, class_loss, LossReduction.SAMPLE_MEAN)


@pytest.mark.parametrize(("mode", "rows"), [(MODES["concat"], 4), (MODES["separate"], 7)])
def test_a_vector_that_may_be_rows_or_positions_is_refused(mode: dict[str, Any], rows: int) -> None:
    config = mode | {"loss_reduction": "sample_mean"}
    with pytest.raises(BatchError, match=r"'places'.*as many rows as positions"):
        scored_step(Bag("vector"), config, (ids(rows, 7), classes(rows)), (ids(3, 7), classes(3)), class_loss)


def test_as_many_rows_as_positions_is_fine_where_the_rank_tells() -> None:
    train, val = (ids(4, 7), classes(4)), (ids(3, 7), classes(3))
    assert_exact(Bag("row"), {}, train, val, class_loss, LossReduction.SAMPLE_MEAN)
