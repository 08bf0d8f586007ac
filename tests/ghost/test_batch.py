"""Batches of any keys are joined, or refused in one sentence."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from ghost import BatchError, LossReduction
from ghost.batch import (
    Items,
    item_rows,
    join_inputs,
    join_labels,
    plain,
    row_count,
    sample_indices,
    take_rows,
    to_device,
    token_count,
)
from ghost.loss import count, infer_reduction
from tests.ghost.harness import MODES, OWN_LOSS, assert_exact
from tests.ghost.huggingface import CASES, IMAGE_TOKEN
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


# --- containers in containers ------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["left", "right"])


def nested(rows: int, first: int = 0) -> dict[str, Any]:
    """Rows counted from `first`, in every container that Hugging Face models take."""
    values = torch.arange(first, first + rows)[:, None].expand(rows, 3)
    return {
        "text": BatchEncoding({"input_ids": values, "attention_mask": torch.ones_like(values)}),
        "encoder_outputs": BaseModelOutput(last_hidden_state=values.double(), hidden_states=(values, values)),
        "layers": [values, (values, None), Pair(values, "word")],
        "options": {"use_cache": False, "names": ["a", "b"]},
        "nothing": None,
    }


def assert_nested(inputs: Any, first: list[int]) -> None:
    """The containers of `nested`, with the rows of these numbers."""
    expected = torch.tensor(first)[:, None].expand(len(first), 3)
    encoded, layers = inputs["encoder_outputs"], inputs["layers"]
    assert isinstance(encoded, BaseModelOutput)
    assert isinstance(layers, list)
    assert isinstance(layers[1], tuple)
    assert isinstance(layers[2], Pair)
    assert encoded.attentions is None
    for tensor in (inputs["text"]["input_ids"], encoded[0], *encoded.hidden_states, layers[0], layers[1][0]):
        assert torch.equal(tensor.long(), expected)
    assert torch.equal(layers[2].left, expected)
    assert (layers[1][1], layers[2].right, inputs["nothing"]) == (None, "word", None)
    assert inputs["options"] == {"use_cache": False, "names": ["a", "b"]}


def test_nested_containers_keep_their_kinds() -> None:
    assert row_count(nested(4), "it") == 4
    assert token_count(nested(4)) == 3
    assert_nested(take_rows(nested(4), torch.tensor([3, 0])), [3, 0])
    assert_nested(take_rows(nested(4), slice(1, 3)), [1, 2])
    assert_nested(to_device(nested(2), torch.device("cpu")), [0, 1])
    assert_nested(plain(nested(2)), [0, 1])
    joined = join_inputs(nested(2), nested(3, first=7), right_padding_is_safe=False)
    assert_nested(joined, [0, 1, 7, 8, 9])


def test_a_processors_output_is_a_batch() -> None:
    batch = BatchEncoding({"input_ids": tokens(3, 4), "attention_mask": torch.ones(3, 4).long()})
    assert row_count(batch, "it") == 3
    assert take_rows(batch, slice(2))["input_ids"].shape == (2, 4)
    joined = join_inputs(batch, dict(batch), right_padding_is_safe=False)
    assert joined["input_ids"].shape == (6, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": {"input_ids": torch.zeros(2, 4).long()}}, r"'text.input_ids' has rows of shape \(3,\)"),
        ({"text": [torch.zeros(2, 3)]}, r"'text' is a BatchEncoding in training and a list in validation"),
        ({"layers": [torch.zeros(2, 3)]}, r"keys \['layers.1', 'layers.2'\] are on one side only"),
        ({"layers": torch.zeros(2, 3)}, r"'layers' is a list in training and a Tensor in validation"),
        ({"options": {"use_cache": True, "names": ()}}, r"'options.use_cache' is False in training and True"),
    ],
)
def test_errors_name_the_path(change: dict[str, Any], message: str) -> None:
    train = nested(2) | {"text": BatchEncoding({"input_ids": torch.zeros(2, 3).long()})}
    with pytest.raises(BatchError, match=message):
        join_inputs(train, {**train, **change}, right_padding_is_safe=False)
    uneven = {"a": torch.zeros(2, 3), "b": {"c": [torch.zeros(3)]}}
    with pytest.raises(BatchError, match=r"different numbers of rows: {'a': 2, 'b.c.0': 3}"):
        row_count(uneven, "it")


# --- items -------------------------------------------------------------------------------------------------


def pictures(*rows: int) -> Items:
    """One picture for each of `rows`, told apart by its number."""
    number = torch.arange(len(rows)).double()
    return Items(number[:, None, None].expand(-1, 2, 2), torch.tensor(rows, dtype=torch.int64))


def with_pictures(count: int, *rows: int) -> dict[str, Any]:
    return {"input_ids": tokens(count, 3), "images": {"pixel_values": pictures(*rows)}}


def numbers(items: Items) -> list[int]:
    return items.values[:, 0, 0].long().tolist()


@pytest.mark.parametrize(
    ("rows", "row", "number"),
    [
        (torch.tensor([3, 4, 0]), [0, 0, 2], [3, 4, 0]),
        (torch.tensor([0, 1]), [0, 1, 1], [0, 1, 2]),
        (torch.tensor([2]), [], []),
        (torch.tensor([1, 1]), [0, 0, 1, 1], [1, 2, 1, 2]),
        (slice(1, 4), [0, 0, 2, 2], [1, 2, 3, 4]),
        (slice(3, 9), [0, 0], [3, 4]),
    ],
)
def test_items_follow_their_rows(rows: Any, row: list[int], number: list[int]) -> None:
    inputs = with_pictures(5, 0, 1, 1, 3, 3)
    taken: Any = take_rows(inputs, rows)
    assert torch.equal(taken["input_ids"], inputs["input_ids"][rows])
    items = taken["images"]["pixel_values"]
    assert items.row.tolist() == row
    assert numbers(items) == number
    assert row_count(taken, "it") == len(inputs["input_ids"][rows])


def test_training_items_come_before_validation_items() -> None:
    joined: Any = join_inputs(with_pictures(3, 0, 2, 2), with_pictures(2, 1), right_padding_is_safe=False)
    (row,) = item_rows(joined)
    assert row.tolist() == [0, 2, 2, 4]
    assert numbers(joined["images"]["pixel_values"]) == [0, 1, 2, 0]
    model_inputs = plain(joined)
    assert model_inputs["images"]["pixel_values"].shape == (4, 2, 2)
    moved: Any = to_device(joined, torch.device("meta"))
    assert moved["images"]["pixel_values"].row.is_meta


@pytest.mark.parametrize("none", ["missing", "None", "empty", "empty of another shape"])
def test_a_side_without_items(none: str) -> None:
    text = {"input_ids": tokens(2, 3)}
    without: dict[str, Any] = {
        "missing": text,
        "None": text | {"pixel_values": None},
        "empty": text | {"pixel_values": pictures()},
        "empty of another shape": text | {"pixel_values": Items(torch.zeros(0), torch.zeros(0).long())},
    }[none]
    some = {"input_ids": tokens(2, 3), "pixel_values": pictures(0, 1, 1)}
    for train, val, rows in ((some, without, [0, 1, 1]), (without, some, [2, 3, 3])):
        joined: Any = join_inputs(train, val, right_padding_is_safe=False)
        assert joined["pixel_values"].row.tolist() == rows
        assert numbers(joined["pixel_values"]) == [0, 1, 2]
    neither: Any = join_inputs(without, without, right_padding_is_safe=False)
    assert plain(neither).get("pixel_values") is None
    assert "pixel_values" not in plain(text | {"pixel_values": pictures()})
    taken: Any = take_rows(some, slice(1))
    assert len(join_inputs(taken, without, right_padding_is_safe=False)["pixel_values"].row) == 1


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (pictures(0, 2), r"it has items 'x.y' of rows 0 to 2, but the batch has 2 rows"),
        (pictures(-1, 0), r"of rows -1 to 0"),
        (pictures(1, 0), r"whose row is not ascending"),
        (Items(torch.zeros(3, 2), torch.zeros(2).long()), r"with 3 values, but row of shape \(2,\)"),
        (Items(torch.zeros(2, 2), torch.zeros(2)), r"row of shape \(2,\) and torch.float32"),
        (Items(torch.zeros(2, 2), torch.zeros(2, 1).long()), r"row of shape \(2, 1\)"),
        (Items(torch.tensor(1.0), torch.zeros(1).long()), r"that are not tensors"),
        (Items([1, 2], torch.zeros(2).long()), r"that are not tensors"),  # type: ignore[arg-type]
    ],
)
def test_items_of_no_row(items: Items, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        row_count({"input_ids": INTS, "x": {"y": items}}, "it")


def test_items_that_do_not_fit() -> None:
    text = {"input_ids": INTS}
    for other, message in (
        (torch.zeros(2, 2, 2), r"'pixels' is Items on one side and a Tensor on the other"),
        (Items(torch.zeros(1, 3, 3).double(), torch.zeros(1).long()), r"'pixels' has rows of shape \(2, 2\)"),
        (Items(torch.zeros(1, 2, 2), torch.zeros(1).long()), r"'pixels' is torch.float64 in training and"),
    ):
        with pytest.raises(BatchError, match=message):
            join_inputs(text | {"pixels": pictures(0)}, text | {"pixels": other}, right_padding_is_safe=True)
    with pytest.raises(BatchError, match=r"holds no tensor with a row per sample"):
        row_count({"pixels": pictures(0)}, "it")


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 4, 0]])
@pytest.mark.parametrize("images", [([0, 2], [0, 0, 1, 3, 3]), ([], [1, 1, 4]), ([0, 1, 2], [])])
def test_images_meet_their_own_texts(images: tuple[list[int], list[int]], order: list[int]) -> None:
    """The loss of a joint batch is that of its rows one by one, each with its own images."""
    model = CASES["llava"].build()
    (X, Y), (V, W) = illustrated(3, images[0]), illustrated(5, images[1])
    window = torch.tensor(order)
    joined, labels = join_inputs(X, take_rows(V, window), True), join_labels(Y, W[window])
    counts, losses = [], []
    for inputs, labels_of, rows in ((X, Y, range(3)), (V, W, order)):
        for row in rows:
            one = labels_of[row : row + 1]
            counts.append(count(one, LossReduction.CAUSAL_TOKEN_MEAN))
            losses.append(own_loss(model, plain(take_rows(inputs, torch.tensor([row]))), one).detach())
    expected = (torch.stack(counts) * torch.stack(losses)).sum() / sum(counts)
    torch.testing.assert_close(own_loss(model, plain(joined), labels).detach(), expected, rtol=1e-5, atol=0)


def illustrated(rows: int, row: list[int]) -> tuple[dict[str, Any], Tensor]:
    """Texts of nine ids with four more in front for each image; images belong to the rows in `row`."""
    ids = torch.randint(3, IMAGE_TOKEN, (rows, 9))
    longest = max((row.count(r) for r in range(rows)), default=0)
    texts = torch.zeros(rows, 9 + 4 * longest).long()
    mask = torch.zeros_like(texts)
    for r in range(rows):
        text = torch.cat([torch.full((4 * row.count(r),), IMAGE_TOKEN), ids[r]])
        texts[r, : len(text)], mask[r, : len(text)] = text, 1
    pixels = torch.randn(len(row), 3, 8, 8).double()
    labels = torch.where((mask == 1) & (texts != IMAGE_TOKEN), texts, -100)
    items = Items(pixels, torch.tensor(row, dtype=torch.int64))
    return {"input_ids": texts, "attention_mask": mask, "pixel_values": items}, labels


# --- keys on one side, lengths and kinds -------------------------------------------------------------------


def test_a_key_of_none_is_no_key() -> None:
    ids = {"input_ids": INTS}
    for train, val in ((ids | {"a": None}, ids), (ids, ids | {"a": None}), (ids | {"a": None},) * 2):
        joined = join_inputs(train, val, right_padding_is_safe=False)
        assert isinstance(joined, dict)
        assert joined.get("a") is None
        assert joined["input_ids"].shape == (4, 3)
    masked = ids | {"attention_mask": torch.ones(2, 3)}
    joined = join_inputs(ids | {"attention_mask": None}, masked, right_padding_is_safe=False)
    assert torch.equal(joined["attention_mask"], torch.ones(4, 3))  # type: ignore[index]
    with pytest.raises(BatchError, match=r"keys \['a'\] are on one side only"):
        join_inputs(ids | {"a": None}, ids | {"a": INTS}, right_padding_is_safe=False)


@pytest.mark.parametrize("key", ["token_type_ids", "position_ids"])
def test_keys_whose_absence_means_something_else_to_each_model_are_on_both_sides(key: str) -> None:
    ids = {"input_ids": INTS}
    with pytest.raises(BatchError, match=rf"keys \['{key}'\] are on one side only"):
        join_inputs(ids, ids | {key: torch.zeros_like(INTS)}, right_padding_is_safe=True)


def test_missing_segment_ids_are_not_zeros_to_every_model() -> None:
    model, ids = tiny_gpt2(), tokens(1, 4)
    difference = model(ids).logits - model(ids, token_type_ids=torch.zeros_like(ids)).logits
    assert float(difference.detach().abs().max()) > 1e-3


def test_a_mask_of_every_pair_of_positions_is_on_both_sides() -> None:
    ids = {"input_ids": INTS}
    with pytest.raises(BatchError, match=r"keys \['attention_mask'\] are on one side only"):
        join_inputs(ids, ids | {"attention_mask": torch.ones(2, 1, 3, 3).bool()}, right_padding_is_safe=True)


def test_masks_of_embeddings_and_of_decoders() -> None:
    embedded = {"inputs_embeds": torch.zeros(2, 3, 4), "decoder_input_ids": INTS[:, :2]}
    masks = {"attention_mask": torch.zeros(2, 3), "decoder_attention_mask": torch.zeros(2, 2).bool()}
    joined: Any = join_inputs(embedded, embedded | masks, right_padding_is_safe=False)
    assert joined["attention_mask"].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    assert joined["decoder_attention_mask"].tolist() == [[True] * 2] * 2 + [[False] * 2] * 2


def test_a_decoders_inputs_are_padded_whatever_the_encoder_sees() -> None:
    def batch(length: int) -> dict[str, Any]:
        ids = torch.ones(2, length).long()
        return {"input_ids": INTS, "decoder_input_ids": ids, "decoder_attention_mask": ids, "labels": ids}

    joined: Any = join_inputs(batch(2), batch(3), right_padding_is_safe=False, pad_id=9)
    assert joined["decoder_input_ids"][0].tolist() == [1, 1, 9]
    assert joined["decoder_attention_mask"][0].tolist() == [1, 1, 0]
    assert joined["labels"][0].tolist() == [1, 1, -100]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_dtype_are_padded_with_zeros(dtype: torch.dtype) -> None:
    def batch(length: int) -> dict[str, Any]:
        ids = torch.ones(1, length).long()
        return {"input_ids": ids, "attention_mask": ids.to(dtype)}

    joined: Any = join_inputs(batch(2), batch(3), right_padding_is_safe=False)
    assert joined["attention_mask"].dtype == dtype
    assert joined["attention_mask"].long().tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ({"a": INTS}, {"a": INTS.to("meta")}, r"'a' is cpu in training and meta in validation"),
        ({"a": INTS}, {"a": INTS.double()}, r"'a' is torch.int64 in training and torch.float64"),
        ({"a": INTS, "n": 3}, {"a": INTS, "n": 4}, r"'n' is 3 in training and 4 in validation"),
        (
            {"a": INTS, "n": torch.tensor(3)}, {"a": INTS, "n": "x"},
            r"'n' is 3 in training and 'x' in validation",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 8, 8)}, {"pixel_values": torch.zeros(2, 3, 4, 4)},
            r"'pixel_values' has rows of shape \(3, 8, 8\) .*: give rows of one shape\.$",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 3, 3)}, {"attention_mask": torch.ones(2, 1, 4, 4)},
            r"'attention_mask' has rows of shape \(1, 3, 3\)",
        ),
    ],
)  # fmt: skip
def test_more_sides_that_do_not_fit(train: Any, val: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        join_inputs(train, val, right_padding_is_safe=True)


def test_labels_that_cannot_hold_minus_100() -> None:
    for dtype in (torch.uint8, torch.bool, torch.float32):
        with pytest.raises(BatchError, match=r"'labels' has rows of shape \(3,\)"):
            join_labels(torch.zeros(2, 3).to(dtype), torch.zeros(2, 4).to(dtype))


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_padded_on_either_side_meet_longer_ones(mode: dict[str, Any], side: str) -> None:
    """A left-padded row keeps its positions, since joining adds to the right alone."""

    def batch(rows: int, length: int) -> tuple[dict[str, Tensor], Tensor]:
        ids = tokens(rows, length)
        mask = torch.ones_like(ids)
        mask[0, slice(0, 2) if side == "left" else slice(-2, None)] = 0
        return {"input_ids": ids, "attention_mask": mask}, torch.where(mask.bool(), ids, -100)

    reduction = LossReduction.CAUSAL_TOKEN_MEAN
    assert_exact(tiny_gpt2(), mode, batch(3, 6), batch(2, 9), own_loss, reduction, rtol=OWN_LOSS)


def test_a_models_own_batches_are_scored_exactly() -> None:
    """Sequences of different lengths, an optional mask on one side, ignored classes."""
    case = CASES["bert-classes"]
    model = case.build()
    (X, Y), (V, W) = case.batches(3, 9), case.batches(2, 7)
    del V["attention_mask"]
    assert_exact(model, {}, (X, Y), (V, W), own_loss, infer_reduction(model))
