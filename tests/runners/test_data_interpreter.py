from collections import Counter

import pytest
import torch

from conf.errors import ConfigError
from runners.data import build_data
from runners.data.corpus import docs_documents
from runners.errors import DataError
from runners.tokenizer import encode
from tests.runners.conftest import data_config

BASE = {
    "kind": "interpreter",
    "task": "language",
    "seq_len": 32,
    "train_samples": 31,
    "val_samples": 7,
    "domains": ["code", "docs", "legal"],
    "shuffled_domain": None,
    "tokenizer": "gpt2",
}


def build(seed=0, **changes):
    return build_data(data_config(seed, **{**BASE, **changes}))


@pytest.fixture(scope="module")
def planted():
    return build(train_samples=40, shuffled_domain="code")


def documents(samples):
    """The document of each sample, by the file it was taken from."""
    names = {sample_id.split("#")[0] for sample_id in samples.sample_ids}
    return {name.removeprefix("docs/docstrings/").removeprefix("code/") for name in names}


def test_the_default_is_balanced_and_tokenises_few_documents(monkeypatch):
    texts = []

    def counted(tokenizer, text):
        texts.append(text)
        return encode(tokenizer, text)

    monkeypatch.setattr("runners.data.windows.encode", counted)
    bundle = build(seq_len=128, train_samples=512, val_samples=32)
    assert Counter(bundle.train.domains) == {"code": 171, "docs": 171, "legal": 170}
    assert Counter(bundle.val.domains) == {"code": 11, "docs": 11, "legal": 10}
    assert bundle.vocab_size == 50_257
    assert len(texts) < 400  # of well over a thousand


def test_items_are_whole_windows_with_running_indices():
    bundle = build()
    for samples, offset in ((bundle.train, 0), (bundle.val, 31)):
        for i in range(len(samples)):
            inputs, labels, index = samples[i]
            assert inputs["input_ids"].shape == (32,)
            assert inputs["input_ids"].dtype == torch.int64
            torch.testing.assert_close(labels, inputs["input_ids"])
            assert index == offset + i
    assert len(set(bundle.train.sample_ids) | set(bundle.val.sample_ids)) == 38


def test_an_id_names_the_same_text_in_every_run():
    short, long = build(train_samples=31), build(train_samples=60)
    texts = {sample_id: long.train.preview(i, 1000) for i, sample_id in enumerate(long.train.sample_ids)}
    shared = [i for i, sample_id in enumerate(short.train.sample_ids) if sample_id in texts]
    assert shared
    for i in shared:
        assert short.train.preview(i, 1000) == texts[short.train.sample_ids[i]]


def test_the_seed_picks_training_samples_and_nothing_else():
    first, again, other = build(seed=0), build(seed=0), build(seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.train.sample_ids == again.train.sample_ids != other.train.sample_ids
    assert first.val.sample_ids == other.val.sample_ids


def test_no_file_is_on_both_sides():
    bundles = [build(seed=seed, train_samples=150) for seed in range(3)]
    train = set().union(*(documents(bundle.train) for bundle in bundles))
    val = set().union(*(documents(bundle.val) for bundle in bundles))
    assert train.isdisjoint(val)


def test_the_planted_domain_is_as_large_as_the_others_and_not_in_validation(planted):
    assert Counter(planted.train.domains) == {"code": 10, "code-shuffled": 10, "docs": 10, "legal": 10}
    assert set(planted.val.domains) == {"code", "docs", "legal"}


def test_planted_windows_are_permuted_and_used_nowhere_else(planted):
    plain = build(train_samples=60, domains=["code"])
    originals = {sample_id: i for i, sample_id in enumerate(plain.train.sample_ids)}
    ids = planted.train.sample_ids
    marked = [i for i, domain in enumerate(planted.train.domains) if domain == "code-shuffled"]
    assert all(ids[i].endswith("~shuffled") for i in marked)
    assert {ids[i].removesuffix("~shuffled") for i in marked}.isdisjoint(ids)
    for i in marked:
        original = plain.train[originals[ids[i].removesuffix("~shuffled")]][0]["input_ids"]
        tokens = planted.train[i][0]["input_ids"]
        assert not torch.equal(tokens, original)
        torch.testing.assert_close(tokens.sort().values, original.sort().values)


def test_planting_is_reproducible_and_follows_the_seed(planted):
    same = build(train_samples=40, shuffled_domain="code")
    other = build(seed=1, train_samples=40, shuffled_domain="code")
    assert same.fingerprint == planted.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ["code", "poems"]}, "data.domains"),
        ({"domains": []}, "data.domains"),
        ({"domains": ["code", "code"]}, "each once"),
        ({"domains": ["docs"], "shuffled_domain": "code"}, "data.shuffled_domain='code'"),
        ({"seq_len": 1}, "data.seq_len=1"),
        ({"train_samples": 2}, "data.train_samples=2"),
        ({"val_samples": 0}, "data.val_samples=0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_too_many_samples_say_how_many_there_are(monkeypatch):
    monkeypatch.setattr("runners.data.corpus._licence_files", dict)
    with pytest.raises(DataError, match="no installed distribution"):
        build()
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"lower data.train_samples"):
        build(domains=["legal"], train_samples=100_000)


def test_a_stripped_installation_is_told_what_to_use(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="use data=text"):
        build(domains=["code"])
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pydoc_data"):
        docs_documents()
