"""One corpus for several tasks: what becomes of its windows."""

import json

import pytest
import torch

from runners.data import build_data
from runners.data.loader import eval_batches, val_batch
from runners.errors import DataError
from tests.runners.conftest import data_config

BASE = {
    "kind": "text", "text_field": "text", "domain_field": "domain", "id_field": "id", "domain": None,
    "seq_len": 7, "train_samples": None, "val_samples": 2, "tokenizer": "gpt2",
}  # fmt: skip
DOMAINS = ("news", "mail", "law")


@pytest.fixture
def path(tmp_path):
    rows = [
        {"id": f"n{i}", "domain": DOMAINS[i % 3], "text": f"Document {i} says{' word' * (4 + 2 * i)}."}
        for i in range(9)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def build(path, task, **changes):
    return build_data(data_config(0, **{**BASE, "path": str(path), "task": task, **changes}))


@pytest.mark.parametrize("task", ["seq2seq", "text_classes"])
def test_samples_are_those_of_the_language_task(path, task):
    language, other = build(path, "language"), build(path, task)
    assert (other.task, other.vocab_size) == (task, language.vocab_size)
    assert other.fingerprint != language.fingerprint
    for mine, theirs in ((other.train, language.train), (other.val, language.val)):
        assert list(mine.sample_ids) == list(theirs.sample_ids)
        assert list(mine.domains) == list(theirs.domains)
        assert mine.preview(0) == theirs.preview(0)
        assert [mine[i][2] for i in range(len(mine))] == [theirs[i][2] for i in range(len(theirs))]


def test_a_continuation_is_the_second_half_of_its_window(path):
    language, bundle = build(path, "language").train, build(path, "seq2seq").train
    lengths = set()
    for i in range(len(bundle)):
        inputs, target, _ = bundle[i]
        window = language[i][0]["input_ids"]
        torch.testing.assert_close(torch.cat([inputs["input_ids"], target]), window)
        assert len(inputs["input_ids"]) == len(window) // 2 > 0
        lengths.add(len(window))
    assert len(lengths) > 1  # short windows were among them
    for batch in eval_batches(bundle, 4):
        assert batch.inputs["input_ids"].shape[1] == batch.inputs["attention_mask"].shape[1] == 3
        assert batch.labels.shape[1] == 4
        assert ((batch.labels != -100).sum(1) - batch.inputs["attention_mask"].sum(1)).unique().max() <= 1


def test_the_class_of_a_window_is_its_domain(path):
    bundle = build(path, "text_classes")
    assert bundle.num_classes == 3
    for i in range(len(bundle.train)):
        assert int(bundle.train[i][1]) == sorted(DOMAINS).index(bundle.train.domains[i])
    batch = val_batch(bundle.val)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.labels.shape == (2,)


def test_a_single_domain_is_nothing_to_tell_apart(path):
    with pytest.raises(DataError, match=r"data.task=text_classes .* all samples are of law"):
        build(path, "text_classes", domain="law")


def test_the_interpreter_gives_all_three_tasks():
    cfg = {
        "kind": "interpreter", "seq_len": 16, "train_samples": 12, "val_samples": 3, "tokenizer": "gpt2",
        "domains": ["code", "docs", "legal"], "shuffled_domain": None,
    }  # fmt: skip
    classes = build_data(data_config(**{**cfg, "task": "text_classes"}))
    assert classes.num_classes == 3
    assert sorted({int(classes.train[i][1]) for i in range(12)}) == [0, 1, 2]
    pairs = build_data(data_config(**{**cfg, "task": "seq2seq"}))
    assert all(len(pairs.train[i][1]) == 8 for i in range(12))
