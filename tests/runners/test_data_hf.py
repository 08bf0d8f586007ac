import csv
import json
import logging
import sys
import time
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from conf.errors import ConfigError
from runners.data import build_data
from runners.data.loader import eval_batches, train_batches, val_batch
from runners.errors import DataError
from runners.tokenizer import encode, load_tokenizer
from tests.runners.conftest import data_config

FIELDS = ("text", "source", "target", "image", "label", "domain", "id")
BASE = {
    "kind": "hf", "task": "language", "name": None, "subset": None, "path": None, "split": "train",
    "val_split": None, "train_samples": None, "val_samples": 3, "tokenizer": "gpt2", "seq_len": 8,
    "target_len": None, "image_size": 6, "channels": 3, "mean": None, "std": None,
    **{f"{name}_field": None for name in FIELDS},
}  # fmt: skip
WORDS = ("good", "bad", "plain")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def build(path, seed=0, **changes):
    return build_data(data_config(seed, **{**BASE, "path": str(path), **changes}))


def reviews(count=12):
    return [
        {"key": f"r{i}", "text": f"Review {i} is {WORDS[i % 3]}", "label": WORDS[i % 3]} for i in range(count)
    ]


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_text_labels_become_classes_in_sorted_order_and_domains(tmp_path):
    bundle = build(write_csv(tmp_path / "reviews.csv", reviews()), task="text_classes")
    assert (bundle.task, bundle.num_classes, bundle.vocab_size) == ("text_classes", 3, 50_257)
    assert (len(bundle.train), len(bundle.val)) == (9, 3)
    tokenizer = load_tokenizer("gpt2")
    for samples, offset in ((bundle.train, 0), (bundle.val, 9)):
        for i, sample_id in enumerate(samples.sample_ids):
            row = reviews()[int(sample_id.removeprefix("train/"))]
            inputs, label, index = samples[i]
            assert inputs["input_ids"].tolist() == encode(tokenizer, row["text"]).tolist()
            assert samples.domains[i] == row["label"]
            assert int(label) == sorted(WORDS).index(row["label"])
            assert index == offset + i
    batch = val_batch(bundle.val)
    assert batch.inputs["input_ids"].shape == batch.inputs["attention_mask"].shape == (3, 8)
    assert batch.labels.shape == (3,)
    assert batch.labels.dtype == torch.int64
    assert "Review" in bundle.train.preview(0)


def test_all_kinds_of_files_give_the_same_samples(tmp_path):
    expected = build(write_csv(tmp_path / "reviews.csv", reviews()), task="text_classes").fingerprint
    table = datasets.Dataset.from_list(reviews())
    table.to_parquet(tmp_path / "reviews.parquet")
    write_jsonl(tmp_path / "reviews.jsonl", reviews())
    (tmp_path / "folder").mkdir()
    write_csv(tmp_path / "folder" / "train.csv", reviews())
    table.save_to_disk(tmp_path / "saved")
    for name in ("reviews.parquet", "reviews.jsonl", "folder", "saved"):
        assert build(tmp_path / name, task="text_classes").fingerprint == expected, name


def test_the_seed_picks_training_rows_and_nothing_else(tmp_path):
    path = write_csv(tmp_path / "reviews.csv", reviews(30))
    first, other = (build(path, seed, task="text_classes", train_samples=6) for seed in (0, 1))
    assert first.val.sample_ids == other.val.sample_ids
    assert first.train.sample_ids != other.train.sample_ids
    assert set(first.train.sample_ids).isdisjoint(first.val.sample_ids)
    assert first.fingerprint != other.fingerprint


def test_ids_and_domains_come_from_the_fields_that_are_named(tmp_path):
    path = write_csv(tmp_path / "reviews.csv", reviews())
    bundle = build(path, task="text_classes", id_field="key", domain_field="key")
    assert bundle.train.sample_ids == bundle.train.domains
    assert set(bundle.train.sample_ids) | set(bundle.val.sample_ids) == {f"r{i}" for i in range(12)}
    doubled = write_csv(tmp_path / "doubled.csv", reviews() + reviews(1))
    with pytest.raises(DataError, match=r"has the id 'r0' twice, the second time in row 12"):
        build(doubled, task="text_classes", id_field="key")


def test_texts_that_are_too_long_are_cut_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        bundle = build(write_csv(tmp_path / "reviews.csv", reviews()), task="text_classes", seq_len=3)
    assert "12 of 12 texts in 'text' are cut to 3 tokens" in caplog.text
    assert all(len(bundle.train[i][0]["input_ids"]) == 3 for i in range(9))


def test_sources_and_targets_have_widths_of_their_own(tmp_path):
    rows = [{"source": "one two", "target": " a b c"[: 2 * (1 + i % 3)]} for i in range(8)]
    bundle = build(write_jsonl(tmp_path / "pairs.jsonl", rows), task="seq2seq", seq_len=5, target_len=4)
    assert bundle.task == "seq2seq"
    assert set(bundle.train.domains) == {"train"}
    batch = next(iter(eval_batches(bundle.train, 5)))
    assert batch.inputs["input_ids"].shape == (5, 5)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0, 0, 0]] * 5
    assert batch.labels.shape == (5, 4)
    for row, index in enumerate(batch.index.tolist()):
        length = 1 + int(bundle.train.sample_ids[index].removeprefix("train/")) % 3
        assert (batch.labels[row] != -100).tolist() == [True] * length + [False] * (4 - length)


def test_language_rows_are_documents_and_blank_ones_are_counted(tmp_path, caplog):
    rows = [{"body": " word" * (4 + 2 * i), "kind": ("news", "mail")[i % 2]} for i in range(10)]
    rows[3]["body"] = "  "
    with caplog.at_level(logging.WARNING):
        bundle = build(write_jsonl(tmp_path / "rows.jsonl", rows), text_field="body", domain_field="kind")
    assert "1 rows without text are left out" in caplog.text
    ids = [*bundle.train.sample_ids, *bundle.val.sample_ids]
    assert {name.split("#")[0] for name in ids} <= {
        f"{row['kind']}/train:{i}" for i, row in enumerate(rows) if i != 3
    }
    documents = {name.split("#")[0] for name in bundle.train.sample_ids}
    assert documents.isdisjoint(name.split("#")[0] for name in bundle.val.sample_ids)
    assert sum(len(bundle.train[i][0]["input_ids"]) for i in range(len(bundle.train))) == sum(
        4 + 2 * int(name.rpartition(":")[2]) for name in documents
    )
    plain = build(write_jsonl(tmp_path / "rows.jsonl", rows), text_field="body")
    assert all(name.startswith("train/") and name[6:7].isdigit() for name in plain.train.sample_ids)


@pytest.fixture
def saved(tmp_path):
    """A train and a test split with named classes."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos", "rare"])}
    )
    splits = {
        name: datasets.Dataset.from_dict(
            {"text": [f"{name} text {i}" for i in range(size)], "label": [i % 2 for i in range(size)]},
            features,
        )
        for name, size in (("train", 6), ("test", 5))
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_validation_split_is_kept_apart_and_classes_keep_their_names(saved):
    bundle = build(saved, task="text_classes", val_split="test")
    assert list(bundle.train.sample_ids) == [f"train/{i}" for i in range(6)]
    assert len(bundle.val) == 3
    assert all(name.startswith("test/") for name in bundle.val.sample_ids)
    assert bundle.num_classes == 3  # one that no row has
    assert bundle.train.domains == ["neg", "pos"] * 3
    with pytest.raises(DataError, match=r"data.val_samples=9 exceeds the 5 rows"):
        build(saved, task="text_classes", val_split="test", val_samples=9)


def test_a_validation_split_of_documents_is_kept_apart(saved):
    bundle = build(saved, val_split="test", val_samples=4)
    assert set(bundle.train.domains) == {"train"}
    assert set(bundle.val.domains) == {"test"}
    assert "train/5#0" in bundle.train.sample_ids


def test_unknown_splits_and_fields_list_those_there_are(saved):
    with pytest.raises(DataError, match=r"data.val_split=dev is not in .*; its splits are train, test"):
        build(saved, val_split="dev")
    with pytest.raises(ConfigError, match=r"data.text_field=body is no column of .*; it has text, label"):
        build(saved, text_field="body")
    with pytest.raises(ConfigError, match=r"data.id_field=key is no column of .*; it has text, label"):
        build(saved, id_field="key")
    with pytest.raises(ConfigError, match=r"data.image_field=text of .* and no images"):
        build(saved, task="image_classes", image_field="text")


def test_rows_without_a_label_are_refused(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    table = datasets.Dataset.from_dict({"text": ["x"] * 6, "label": [0, 1, -1, 0, 1, 0]}, features)
    table.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"the label -1 in row 2 of 'label'.* none of its 2 classes"):
        build(tmp_path / "saved", task="text_classes")
    for labels, message in (
        (["a", None, "b"], r"no value in row 1 of 'label'"),
        ([0.5, 1.5, 2.5], r"the float 0.5 in row 0"),
        (["a", "a", "a"], r"1 different labels"),
    ):
        rows = [{"text": "x", "label": label} for label in labels]
        with pytest.raises(DataError, match=message):
            build(write_jsonl(tmp_path / f"rows{labels[0]}{labels[1]}.jsonl", rows), task="text_classes")


def test_texts_that_are_none_or_empty_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "numbers.jsonl", [{"text": i} for i in range(5)])
    with pytest.raises(DataError, match=r"has a int and no text in row 0 of 'text'"):
        build(path)
    rows = [{"text": "", "label": i % 2} for i in range(5)]
    with pytest.raises(DataError, match=r"an empty text in row \d of 'text'"):
        build(write_jsonl(tmp_path / "empty.jsonl", rows), task="text_classes")


@pytest.fixture
def folder(tmp_path):
    """Six images of two classes, the first in grey."""
    generator = np.random.default_rng(0)
    for number in range(6):
        place = tmp_path / "pictures" / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        shape = (6, 6) if number == 0 else (6, 6, 3)
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path / "pictures"


def test_images_are_what_the_files_hold(folder):
    bundle = build(folder, task="image_classes", val_samples=2)
    assert (bundle.task, bundle.input_shape, bundle.num_classes) == ("image_classes", (3, 6, 6), 2)
    assert Counter([*bundle.train.domains, *bundle.val.domains]) == {"cat": 3, "dog": 3}
    files = [*sorted((folder / "cat").iterdir()), *sorted((folder / "dog").iterdir())]
    for samples in (bundle.train, bundle.val):
        for i, sample_id in enumerate(samples.sample_ids):
            file = files[int(sample_id.removeprefix("train/"))]
            expected = np.array(Image.open(file).convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255
            image, label, _ = samples[i]
            assert image.dtype == torch.float32
            np.testing.assert_array_equal(image.numpy(), expected)
            assert ("cat", "dog")[int(label)] == file.parent.name == samples.domains[i]


def test_images_are_resized_made_grey_and_normalised(folder):
    plain = build(folder, task="image_classes", val_samples=2)
    grey = build(folder, task="image_classes", val_samples=2, channels=1, image_size=3)
    assert grey.train[0][0].shape == grey.input_shape == (1, 3, 3)
    scaled = build(
        folder, task="image_classes", val_samples=2, mean=[0.5, 0.25, 0.0], std=[2.0, 1.0, 0.5]
    ).train
    for i in range(len(scaled)):
        back = scaled[i][0] * torch.tensor([2.0, 1.0, 0.5])[:, None, None]
        back += torch.tensor([0.5, 0.25, 0.0])[:, None, None]
        torch.testing.assert_close(back, plain.train[i][0])
    with pytest.raises(ConfigError, match=r"data.mean has 2 numbers, and data.channels=3"):
        build(folder, task="image_classes", val_samples=2, mean=[0.5, 0.5])
    with pytest.raises(ConfigError, match=r"data.std=\[1.0, 0.0, 1.0\] must be greater"):
        build(folder, task="image_classes", val_samples=2, std=[1.0, 0.0, 1.0])


def test_workers_read_the_same_images(folder):
    bundle = build(folder, task="image_classes", val_samples=2)
    for batch in (next(train_batches(bundle.train, 4, 0, True, workers)) for workers in (0, 2)):
        for row, i in enumerate(batch.index.tolist()):
            torch.testing.assert_close(batch.inputs[row], bundle.train[i][0], rtol=0, atol=0)


def test_the_fingerprint_follows_the_images_and_their_preparation(folder):
    first = build(folder, task="image_classes", val_samples=2).fingerprint
    assert build(folder, task="image_classes", val_samples=2).fingerprint == first
    assert build(folder, task="image_classes", val_samples=2, image_size=4).fingerprint != first
    Image.fromarray(np.zeros((6, 6), np.uint8)).save(folder / "cat" / "0.png")
    assert build(folder, task="image_classes", val_samples=2).fingerprint != first


def test_images_of_sixteen_bits_are_refused(folder):
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(folder / "cat" / "0.png")
    bundle = build(folder, task="image_classes", val_samples=1)
    with pytest.raises(DataError, match=r"in row 0 of .* has the mode I;16"):
        [
            sample
            for samples in (bundle.train, bundle.val)
            for sample in (samples[i] for i in range(len(samples)))
        ]


def test_paths_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"must be a folder, or a .parquet, .jsonl, .json, .csv file"):
        build(tmp_path / "nothing.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"The data set .*empty cannot be opened"):
        build(tmp_path / "empty")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n1,2,3,4\n")
    with pytest.raises(DataError, match=r"bad.csv is damaged"):
        build(tmp_path / "bad.csv")
    with pytest.raises(ConfigError, match=r"data.val_split=test is not in .*, a single file"):
        build(write_csv(tmp_path / "reviews.csv", reviews()), val_split="test")


def test_without_a_network_the_hub_is_asked_once_and_quickly(monkeypatch, caplog):
    asked = []

    def unreachable(self, name, timeout):
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"The data set nobody/nothing cannot be opened \(Couldn't reach"):
        build_data(data_config(**{**BASE, "name": "nobody/nothing"}))
    assert time.perf_counter() - began < 5
    assert asked == ["nobody/nothing"]
    assert "The hub does not give nobody/nothing (Name or service not known)" in caplog.text
    assert not datasets.config.HF_HUB_OFFLINE


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"data=hf needs a package .*: pip install 'ghostrunner\[hf\]'"):
        build(tmp_path)
