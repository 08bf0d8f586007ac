import json
import pickle

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from conf.errors import ConfigError
from runners.data import build_data
from runners.data.loader import train_batches
from runners.errors import DataError
from runners.prepare import prepare
from tests.runners.conftest import data_config

TEXT = {
    "kind": "text",
    "text_field": "text",
    "domain_field": "domain",
    "id_field": "id",
    "domain": None,
    "tokenizer": "gpt2",
    "keep": None,
    "drop": None,
    "test_samples": 0,
}
TOKENS = {
    "kind": "tokens",
    "task": "language",
    "seq_len": 8,
    "train_samples": None,
    "val_samples": 3,
    "dtype": None,
    "vocab_size": None,
}


def build(folder, seed=0, **changes):
    return build_data(data_config(seed, **{**TOKENS, "path": str(folder), **changes}))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"id": f"n{i}", "domain": ("news", "mail")[i % 2], "text": f"Text {i}:{' word' * (5 + 3 * i)}."}
        for i in range(12)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def folder(rows_file, tmp_path):
    out = tmp_path / "tokens"
    data = {**TEXT, "path": str(rows_file)}
    prepare(OmegaConf.create({"data": data, "prepare": {"out": str(out)}}))
    return out


def contents(samples):
    return {
        sample_id: (samples.domains[i], samples[i][0]["input_ids"].tolist())
        for i, sample_id in enumerate(samples.sample_ids)
    }


def test_prepared_tokens_give_the_samples_of_the_text(folder, rows_file):
    tokens = build(folder)
    text = build_data(data_config(**{**TOKENS, **TEXT, "path": str(rows_file)}))
    assert contents(tokens.train) == contents(text.train)
    assert contents(tokens.val) == contents(text.val)
    assert tokens.vocab_size == 50_257


def test_items_have_running_indices_and_labels(folder):
    bundle = build(folder)
    inputs, labels, index = bundle.val[1]
    assert index == len(bundle.train) + 1
    assert inputs["input_ids"].dtype == torch.int64
    torch.testing.assert_close(inputs["input_ids"], labels)
    assert "word" in bundle.train.preview(0)


def test_the_seed_picks_training_samples_only(folder):
    first, other = build(folder, 0, train_samples=6), build(folder, 1, train_samples=6)
    assert list(first.train.sample_ids) != list(other.train.sample_ids)
    assert list(first.val.sample_ids) == list(other.val.sample_ids)
    assert first.fingerprint == build(folder, 0, train_samples=6).fingerprint != other.fingerprint


def test_workers_read_the_same_and_carry_no_tokens(folder):
    bundle = build(folder)
    bundle.train[0]
    copy = pickle.loads(pickle.dumps(bundle.train))
    assert "_map" not in copy.store.domains[0].file.__dict__
    assert contents(copy) == contents(bundle.train)
    batch = next(train_batches(bundle.train, 4, 0, True, 2))
    for row, i in enumerate(batch.index.tolist()):
        ids = bundle.train[i][0]["input_ids"]
        torch.testing.assert_close(batch.inputs["input_ids"][row, : len(ids)], ids)


def edit_meta(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damage_is_named(folder):
    (folder / "mail.bin").write_bytes((folder / "mail.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"domain 'mail' in .* is damaged"):
        build(folder)
    (folder / "mail.bin").write_bytes((folder / "mail.bin").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"mail.bin has \d+ bytes"):
        build(folder)
    (folder / "mail.idx.npy").unlink()
    with pytest.raises(DataError, match=r"mail.idx.npy is missing"):
        build(folder)


def test_a_foreign_meta_file_is_named(folder):
    edit_meta(folder, schema_version=2)
    with pytest.raises(DataError, match="schema_version 2"):
        build(folder)
    edit_meta(folder, schema_version=1, dtype="int8")
    with pytest.raises(DataError, match="dtype 'int8'"):
        build(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta.json is damaged"):
        build(folder)


def test_a_token_beyond_the_vocabulary_is_found_when_it_is_read(folder):
    edit_meta(folder, vocab_size=20)
    bundle = build(folder)
    with pytest.raises(DataError, match=r"holds the token \d+ between .* vocabulary has 20"):
        bundle.train[0]


def bare(tmp_path, **files):
    for name, tokens in files.items():
        np.asarray(tokens, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    return tmp_path


def test_bare_files_are_cut_into_numbered_windows(tmp_path):
    bare(tmp_path, a=np.arange(20), b=np.arange(100, 117))
    bundle = build(tmp_path, dtype="uint16", vocab_size=200)
    windows = contents(bundle.train) | contents(bundle.val)
    assert windows == {
        "a#0": ("a", list(range(8))),
        "a#1": ("a", list(range(8, 16))),
        "a#2": ("a", list(range(16, 20))),
        "b#0": ("b", list(range(100, 108))),
        "b#1": ("b", list(range(108, 116))),  # the token after it is a single one, and dropped
    }
    assert len(bundle.val) == 3
    assert bundle.train.preview(0, 1000).split() == [str(t) for t in bundle.train[0][0]["input_ids"].tolist()]


def test_a_bare_val_file_is_the_validation_side(tmp_path):
    bare(tmp_path, train=np.arange(80), val=np.arange(40))
    bundle = build(tmp_path, dtype="uint16", vocab_size=200)
    assert set(bundle.val.domains) == {"val"}
    assert list(bundle.train.sample_ids) == [f"train#{i}" for i in range(10)]


def test_the_fingerprint_of_bare_files_follows_their_content(tmp_path):
    bare(tmp_path, a=np.arange(80))
    first = build(tmp_path, dtype="uint16", vocab_size=200).fingerprint
    bare(tmp_path, a=np.arange(80)[::-1])
    assert build(tmp_path, dtype="uint16", vocab_size=200).fingerprint != first


def test_keys_that_do_not_fit_the_folder_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data.dtype=uint16 has no effect"):
        build(folder, dtype="uint16")
    bare(tmp_path, a=np.arange(80))
    with pytest.raises(ConfigError, match=r"data.dtype \(now None; uint16 or uint32\)"):
        build(tmp_path, vocab_size=200)
    with pytest.raises(ConfigError, match=r"data.vocab_size \(now None"):
        build(tmp_path, dtype="uint16")
    with pytest.raises(DataError, match=r"neither meta.json nor a .bin file"):
        build(tmp_path / "nowhere", dtype="uint16", vocab_size=200)
