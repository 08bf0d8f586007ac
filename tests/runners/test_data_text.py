import gzip
import json
import logging
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conf.errors import ConfigError
from runners.data import build_data
from runners.data.loader import eval_batches
from runners.errors import DataError
from runners.tokenizer import encode, load_tokenizer
from tests.runners.conftest import data_config

BASE = {
    "kind": "text",
    "task": "language",
    "text_field": "text",
    "domain_field": "domain",
    "id_field": "id",
    "domain": None,
    "seq_len": 8,
    "train_samples": None,
    "val_samples": 2,
    "tokenizer": "gpt2",
}
ROWS = [
    {"id": f"n{i}", "domain": ("news", "mail")[i % 2], "text": f"Document {i} says{' word' * (4 + 2 * i)}."}
    for i in range(8)
]


def build(path, seed=0, **changes):
    return build_data(data_config(seed, **{**BASE, "path": str(path), **changes}))


def write_jsonl(path, rows=ROWS):
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def rebuilt(*sets):
    """The token ids of each document, its windows put together again in the order of their numbers."""
    pieces = {}
    for samples in sets:
        for i, sample_id in enumerate(samples.sample_ids):
            document, _, number = sample_id.rpartition("#")
            pieces.setdefault(document, {})[int(number)] = samples[i][0]["input_ids"].tolist()
    return {name: [t for _, part in sorted(parts.items()) for t in part] for name, parts in pieces.items()}


def test_training_windows_are_the_documents_without_loss(tmp_path):
    bundle = build(write_jsonl(tmp_path / "rows.jsonl"))
    tokenizer = load_tokenizer("gpt2")
    texts = {f"{row['domain']}/{row['id']}": row["text"] for row in ROWS}
    documents = rebuilt(bundle.train)
    assert documents == {name: encode(tokenizer, texts[name]).tolist() for name in documents}
    held = {sample_id.split("#")[0] for sample_id in bundle.val.sample_ids}
    assert documents.keys() | held == texts.keys()
    assert documents.keys().isdisjoint(held)
    assert len(bundle.val) == 2
    assert bundle.val[0][2] == len(bundle.train)


def test_the_last_window_is_short_padded_and_masked(tmp_path):
    bundle = build(write_jsonl(tmp_path / "rows.jsonl"))
    batches = list(eval_batches(bundle.train, 4))
    assert any("attention_mask" in batch.inputs for batch in batches)
    for batch in batches:
        assert batch.inputs["input_ids"].shape == (len(batch.index), 8)
        for row, index in enumerate(batch.index.tolist()):
            ids = bundle.train[index][0]["input_ids"]
            torch.testing.assert_close(batch.labels[row, : len(ids)], ids)
            assert (batch.labels[row, len(ids) :] == -100).all()


def test_a_single_token_at_the_end_is_dropped_and_counted(tmp_path, caplog):
    rows = [{"id": str(i), "domain": "d", "text": " the" * 9} for i in range(3)]
    with caplog.at_level(logging.INFO):
        bundle = build(write_jsonl(tmp_path / "rows.jsonl", rows), val_samples=1)
    assert [len(bundle.train[i][0]["input_ids"]) for i in range(len(bundle.train))] == [8, 8]
    assert "3 ends of documents dropped" in caplog.text


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet"])
def test_all_kinds_of_files_give_the_same_samples(tmp_path, ending):
    expected = build(write_jsonl(tmp_path / "expected.jsonl"))
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        write_jsonl(path)
    assert build(path).fingerprint == expected.fingerprint


def test_text_files_are_documents_named_by_path_and_stem(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("one.txt", "two.txt", "deep/three.txt"):
        (tmp_path / name).write_text(f"The text of {name} is here, long enough for two windows of it.")
    bundle = build(tmp_path)
    assert rebuilt(bundle.train, bundle.val).keys() == {"one/one.txt", "two/two.txt", "three/deep/three.txt"}
    globbed = build(tmp_path / "**/*.txt")
    assert globbed.fingerprint == bundle.fingerprint


def test_domain_and_id_have_defaults_and_a_fixed_domain_wins(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl")
    fixed = build(path, domain="all")
    assert set(fixed.train.domains) == {"all"}
    default = build(path, domain_field=None, id_field=None)
    assert rebuilt(default.train, default.val).keys() == {f"rows/rows.jsonl:{i}" for i in range(1, 9)}


def test_the_seed_picks_training_windows_and_not_validation(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl")
    first, again, other = (build(path, seed, train_samples=5) for seed in (0, 0, 1))
    assert first.train.sample_ids == again.train.sample_ids != other.train.sample_ids
    assert first.val.sample_ids == other.val.sample_ids
    assert len(first.train) == 5


def test_a_preview_is_one_line_of_the_text(tmp_path):
    bundle = build(write_jsonl(tmp_path / "rows.jsonl"))
    preview = bundle.train.preview(0, 12)
    assert len(preview) <= 12
    assert preview.startswith("Document")


def test_files_of_other_kinds_in_a_folder_are_named_in_the_log(tmp_path, caplog):
    write_jsonl(tmp_path / "rows.jsonl")
    (tmp_path / "README.md").write_text("about")
    build(tmp_path)
    assert "1 files" in caplog.text
    assert ".md" in caplog.text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a", "domain": "d", "text": "one two"}', "{oops"], r"rows.jsonl:2 is not JSON"),
        (["[1, 2]"], r"rows.jsonl:1 is not a JSON object but a list"),
        (['{"id": "a", "domain": "d"}'], r"rows.jsonl:1 has no value for 'text' .data.text_field."),
        (['{"id": "a", "domain": "d", "text": " \\n"}'], r"rows.jsonl:1: .* is empty"),
        (['{"id": "a", "domain": "d", "text": 3}'], r"rows.jsonl:1: .* is not text but int"),
        (['{"id": null, "domain": "d", "text": "one"}'], r"'id' .data.id_field.*data.id_field=null"),
        (['{"id": "a", "text": "one two"}'], r"'domain' .data.domain_field.*data.domain_field=null"),
        (['{"id": "a", "domain": "d", "text": "\\ud800"}'], r"rows.jsonl:1 holds half of a surrogate"),
        (['{"id": "a", "domain": "d", "text": "one two"}'] * 2, r"id 'a' comes twice in the domain 'd'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, lines, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        build(path)


def test_damaged_files_are_named(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8"):
        build(latin)
    for ending in (".jsonl.gz", ".jsonl.xz"):
        whole = write_jsonl(tmp_path / f"rows{ending}")
        whole.write_bytes(whole.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"damaged"):
            build(whole)
    parquet = tmp_path / "rows.parquet"
    parquet.write_bytes(b"no table")
    with pytest.raises(DataError, match=r"rows.parquet is not a Parquet file"):
        build(parquet)


def test_a_missing_parquet_column_lists_those_there_are(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"body": "one", "id": "a"}]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"'text' .data.text_field.; its fields are body, id"):
        build(tmp_path / "rows.parquet")


def test_paths_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        build(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="holds no"):
        build(tmp_path)
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"table.csv is of an unknown kind"):
        build(tmp_path / "table.csv")
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(DataError, match=r"empty.txt is empty"):
        build(tmp_path / "empty.txt")


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "book.txt").write_text("A long text in a single file. " * 50)
    with pytest.raises(DataError, match="leaves no document to train on"):
        build(tmp_path / "book.txt")


@pytest.mark.parametrize("changes", [{"seq_len": 1}, {"val_samples": 0}, {"train_samples": 0}])
def test_impossible_settings_are_refused(tmp_path, changes):
    key, value = next(iter(changes.items()))
    with pytest.raises(ConfigError, match=f"data.{key}={value}"):
        build(write_jsonl(tmp_path / "rows.jsonl"), **changes)
