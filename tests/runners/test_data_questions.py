from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits

from conf.errors import ConfigError
from ghost.batch import Items
from runners.data import build_data
from runners.data.loader import collate, train_batches, val_batch
from runners.data.questions import IMAGE_TOKEN, build_processor, make_questions
from runners.tokenizer import load_tokenizer
from tests.runners.conftest import data_config

IMAGE_TOKEN_ID = 50_257
BASE = {
    "kind": "digit_questions", "train_samples": 30, "val_samples": 9, "seq_len": 64, "tokenizer": "gpt2",
    "image_size": 32, "patch_size": 8, "image_token_id": IMAGE_TOKEN_ID,
}  # fmt: skip


def config(seed=0, **changes):
    return data_config(seed, **{**BASE, **changes})


@pytest.fixture(scope="module")
def bundle():
    return build_data(config())


def test_rows_are_mixed_and_answers_are_right():
    _, classes = load_digits(return_X_y=True)
    questions = make_questions(classes)
    assert Counter(question.domain for question in questions) == {"text": 599, "image": 599, "pair": 599}
    shown = [row for question in questions for row in question.images]
    assert len(shown) == len(set(shown)) == 3 * 599
    for question in questions:
        if question.domain == "text":
            words = question.prompt.replace("?", "").split()
            assert int(question.answer) == int(words[3]) + int(words[5])
        else:
            assert int(question.answer) == sum(classes[row] for row in question.images)
        assert question.prompt.count(IMAGE_TOKEN) == len(question.images)


def test_only_the_answer_counts(bundle):
    tokenizer = load_tokenizer("gpt2")
    for samples in (bundle.train, bundle.val):
        for i, row in enumerate(samples.rows):
            inputs, labels, index = samples[i]
            counted = labels != -100
            torch.testing.assert_close(labels[counted], inputs["input_ids"][counted])
            assert tokenizer.decode(labels[counted].tolist()) == f" {row.question.answer}<|endoftext|>"
            assert index == samples.offset + i


def test_an_image_has_as_many_tokens_as_patches(bundle):
    for i in range(len(bundle.train)):
        inputs, _, _ = bundle.train[i]
        images = inputs["pixel_values"]
        assert images.shape[1:] == bundle.input_shape == (3, 32, 32)
        assert int((inputs["input_ids"] == IMAGE_TOKEN_ID).sum()) == 16 * len(images)
    assert {len(bundle.train[i][0]["pixel_values"]) for i in range(len(bundle.train))} == {0, 1, 2}
    assert (bundle.task, bundle.vocab_size) == ("image_text", IMAGE_TOKEN_ID + 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_has_the_images_of_its_rows_in_their_order(bundle, num_workers):
    batch = next(train_batches(bundle.train, 12, 0, True, num_workers))
    images = batch.inputs["pixel_values"]
    assert isinstance(images, Items)
    assert (
        batch.inputs["input_ids"].shape
        == batch.inputs["attention_mask"].shape
        == batch.labels.shape
        == (12, 64)
    )
    assert (images.row.diff() >= 0).all()
    for row, i in enumerate(batch.index.tolist()):
        inputs, _, _ = bundle.train[i]
        torch.testing.assert_close(images.values[images.row == row], inputs["pixel_values"])
        length = len(inputs["input_ids"])
        assert batch.inputs["attention_mask"][row].tolist() == [1] * length + [0] * (64 - length)


def test_a_batch_without_images_has_items_of_length_zero(bundle):
    text_only = [i for i, domain in enumerate(bundle.train.domains) if domain == "text"][:2]
    images = collate([bundle.train[i] for i in text_only], bundle.train.layout).inputs["pixel_values"]
    assert images.values.shape == (0, 3, 32, 32)
    assert images.row.shape == (0,)


def test_validation_domains_take_turns_and_the_split_follows_no_seed(bundle):
    other = build_data(config(seed=1))
    assert other.val.sample_ids == bundle.val.sample_ids
    assert other.train.sample_ids != bundle.train.sample_ids
    assert bundle.fingerprint == build_data(config()).fingerprint != other.fingerprint
    assert val_batch(bundle.val).labels.shape == (9, 64)


def test_the_sizes_can_be_those_of_a_real_model():
    processor = build_processor(config(image_size=336, patch_size=14))
    tokens = processor(text=IMAGE_TOKEN, images=[torch.zeros(3, 8, 8)])["input_ids"][0]
    assert tokens == [IMAGE_TOKEN_ID] * 576


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, r"data.image_size=30 must be a multiple of data.patch_size=8"),
        ({"image_token_id": 7}, r"is not the id of <image> .*: type data.image_token_id=50257"),
        ({"seq_len": 40}, r"data.seq_len=40 would cut a question of 49 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_data(config(**changes))
