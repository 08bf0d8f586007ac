"""Batches of any keys are joined, or refused in one sentence."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghost import BatchError, GhostEngineManager, GhostError
from ghost.batch import join_inputs, join_labels, row_count, sample_indices, take_rows, token_count
from tests.ghost.models import tiny_gpt2, tokens
from tests.ghost.reference import own_loss


def test_rows_of_every_key_are_joined_and_the_rest_passes_through() -> None:
    ids = torch.arange(12).view(4, 3)
    train = {"input_ids": ids, "pixels": torch.randn(4, 3, 2, 2), "name": "x", "scalar": torch.tensor(7)}
    val = {
        "input_ids": ids[:2] + 100,
        "pixels": torch.randn(2, 3, 2, 2),
        "name": "y",
        "scalar": torch.tensor(7),
    }
    joined = join_inputs(train, val, right_padding_is_safe=False)
    assert isinstance(joined, dict)
    assert joined.keys() == train.keys()
    assert torch.equal(joined["input_ids"], torch.cat([train["input_ids"], val["input_ids"]]))
    assert torch.equal(joined["pixels"], torch.cat([train["pixels"], val["pixels"]]))
    assert joined["name"] == "x"
    assert joined["scalar"] is train["scalar"]
    with pytest.raises(BatchError, match=r"'scalar' is 7 in training and 8 in validation"):
        join_inputs(train, val | {"scalar": torch.tensor(8)}, right_padding_is_safe=False)


def test_shorter_rows_are_padded_on_the_right() -> None:
    train = {"input_ids": torch.ones(2, 3).long()}
    val = {"input_ids": torch.ones(1, 5).long()}
    for pad_id in (0, 7):
        joined = join_inputs(train, val, right_padding_is_safe=True, pad_id=pad_id)
        assert isinstance(joined, dict)
        assert joined["input_ids"].tolist() == [[1, 1, 1, pad_id, pad_id]] * 2 + [[1] * 5]
    assert join_labels(train["input_ids"], val["input_ids"]).tolist() == [[1, 1, 1, -100, -100]] * 2 + [
        [1] * 5
    ]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_mask_is_made_for_the_side_without(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    masked = {"input_ids": torch.ones(2, 3).long(), "attention_mask": mask}
    plain = {"input_ids": torch.ones(1, 2).long()}
    for train, val in ((masked, plain), (plain, masked)):
        joined = join_inputs(train, val, right_padding_is_safe=False)
        assert isinstance(joined, dict)
        assert joined["attention_mask"].dtype == dtype
        assert joined["attention_mask"].long().sum() == 3 + 2
    assert "attention_mask" not in plain


INTS = torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (INTS, {"input_ids": INTS}, r"training inputs are a Tensor and validation inputs a dict"),
        ({"a": INTS, "b": INTS}, {"a": INTS}, r"keys \['b'\] are on one side only"),
        (INTS, torch.zeros(2, 4).long(), r"'inputs' has rows of shape \(3,\) in training and \(4,\)"),
        ({"a": INTS}, {"a": torch.zeros(2, 4).long()}, r"'a' has rows of shape \(3,\).*attention_mask"),
        ({"a": INTS}, {"a": INTS.int()}, r"'a' is torch.int64 in training and torch.int32"),
        ({"a": INTS, "b": INTS}, {"a": INTS, "b": "text"}, r"'b' has a row per sample on one side only"),
        ({"a": INTS, "b": 3}, {"a": INTS, "b": INTS}, r"'b' has a row per sample on one side only"),
        ({"a": torch.zeros(2, 3, 4)}, {"a": torch.zeros(2, 3, 5)}, r"'a' has rows of shape \(3, 4\)"),
    ],
)
def test_sides_that_do_not_fit(train: Any, val: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        join_inputs(train, val, right_padding_is_safe=False)


def test_what_cannot_be_padded_is_refused_even_where_padding_is_safe() -> None:
    for a, b in (((2, 3, 4), (2, 5, 4)), ((2, 3), (2, 5))):
        with pytest.raises(BatchError, match=r"'inputs' has rows of shape"):
            join_inputs(torch.zeros(a), torch.zeros(b), right_padding_is_safe=True)
    with pytest.raises(BatchError, match=r"'labels' has rows of shape"):
        join_labels(torch.zeros(2).long(), torch.zeros(2, 3).long())


def test_counts() -> None:
    assert row_count({"x": INTS, "n": 3, "s": torch.tensor(1)}, "it") == 2
    assert token_count({"s": torch.zeros(2), "x": INTS}) == 3
    assert token_count(torch.zeros(2)) is None
    taken = take_rows({"x": INTS, "n": 3, "s": torch.tensor(1)}, slice(0, 1))
    assert isinstance(taken, dict)
    assert taken["x"].shape == (1, 3)
    assert taken["n"] == 3
    for empty in ({}, {"n": 3}, torch.tensor(1)):
        with pytest.raises(BatchError, match="it holds no tensor with a row per sample"):
            row_count(empty, "it")
    with pytest.raises(BatchError, match="it is a NoneType: give a tensor or a dict of tensors"):
        row_count(None, "it")  # type: ignore[arg-type]


def test_indices_are_not_rounded() -> None:
    large = 2**62 + 1
    assert sample_indices([large], 1).item() == large
    with pytest.raises(BatchError, match="should be integers"):
        sample_indices([1.0], 1)
    with pytest.raises(BatchError, match="should be integers"):
        sample_indices([2**70], 1)


# --- malformed batches of every kind ------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensors = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    shapes, st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bool]),
)  # fmt: skip
values = st.one_of(
    tensors, st.none(), st.text(max_size=2), st.integers(), st.lists(st.integers(), max_size=2)
)
batches = st.one_of(
    values, st.dictionaries(st.sampled_from(["input_ids", "attention_mask", "labels", "x"]), values)
)

SHARED_MODEL = tiny_gpt2()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(X=batches, Y=values, ids=values, val=st.tuples(batches, values) | st.none(), mode=st.booleans())
def test_malformed_batches_raise_errors_of_the_library_alone(
    X: Any, Y: Any, ids: Any, val: Any, mode: bool
) -> None:
    """Everything up to the model's own forward."""
    good = {"input_ids": tokens(2, 4), "attention_mask": torch.ones(2, 4).long()}
    refused: list[str] = []
    for val_data in (val, (good, good["input_ids"]), (good["input_ids"],) * 2):
        optimizer = torch.optim.SGD(SHARED_MODEL.parameters(), lr=0.1)
        manager = None
        try:
            manager = GhostEngineManager(
                {"val_mode": "concat" if mode else "separate"}, SHARED_MODEL, optimizer, val_data=val_data,
                loss_fn=lambda m, x, y: own_loss(m, good["input_ids"], good["input_ids"]),
            )  # fmt: skip
            manager.attach_train_batch(X, Y, 0, ids)
            manager.prepare_forward_input(X, Y)
        except GhostError as error:
            refused.append(str(error))
        finally:
            if manager is not None:
                manager.cleanup()
    assert all(message.endswith(".") for message in refused)
    assert "forward" not in vars(SHARED_MODEL)
