import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from conf.errors import ConfigError
from runners.data.tokenfiles import smallest_dtype
from runners.errors import DataError
from runners.prepare import main, prepare
from runners.tokenizer import encode, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"id": f"n{i}", "domain": "ab"[i % 2], "text": f"Text number {i}{'!' * i}"} for i in range(7)]


def config(path, out, **changes):
    data = {
        "kind": "text",
        "path": str(path),
        "text_field": "text",
        "domain_field": "domain",
        "id_field": "id",
        "domain": None,
        "tokenizer": "gpt2",
        "keep": None,
        "drop": None,
        "test_samples": 0,
        **changes,
    }
    return OmegaConf.create({"data": data, "prepare": {"out": str(out)}})


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def others(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "rows.jsonl")


def test_the_files_hold_the_documents_one_after_the_other(rows_file, tmp_path, caplog):
    out = tmp_path / "deep" / "tokens"
    with caplog.at_level(logging.INFO):
        meta = prepare(config(rows_file, out))
    tokenizer = load_tokenizer("gpt2")
    for domain in "ab":
        rows = [row for row in ROWS if row["domain"] == domain]
        tokens = [encode(tokenizer, row["text"]) for row in rows]
        np.testing.assert_array_equal(np.fromfile(out / f"{domain}.bin", np.uint16), np.concatenate(tokens))
        boundaries = np.load(out / f"{domain}.idx.npy", allow_pickle=False)
        np.testing.assert_array_equal(boundaries, np.cumsum([0, *map(len, tokens)]))
        ids = pq.read_table(out / f"{domain}.ids.parquet")["id"].to_pylist()
        assert ids == [row["id"] for row in rows]
        assert meta.domains[domain].documents == len(rows)
        assert f"{domain}: {len(rows)} documents, {boundaries[-1]} tokens" in caplog.text
    saved = json.loads((out / "meta.json").read_text())
    assert {key: saved[key] for key in ("schema_version", "tokenizer", "vocab_size", "dtype")} == {
        "schema_version": 1,
        "tokenizer": "gpt2",
        "vocab_size": 50_257,
        "dtype": "uint16",
    }
    assert others(out.parent) == ["tokens"]


def test_batches_and_id_chunks_do_not_show(rows_file, tmp_path, monkeypatch):
    whole = prepare(config(rows_file, tmp_path / "whole"))
    monkeypatch.setattr("runners.prepare.DOCUMENTS_PER_BATCH", 2)
    monkeypatch.setattr("runners.prepare.IDS_PER_WRITE", 3)
    assert prepare(config(rows_file, tmp_path / "parts")) == whole
    for path in (tmp_path / "whole").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


def test_an_empty_folder_is_filled_and_a_full_one_refused(rows_file, tmp_path):
    out = tmp_path / "tokens"
    out.mkdir()
    prepare(config(rows_file, out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match=r"prepare.out=.* is not an empty folder"):
        prepare(config(rows_file, out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_bad_row_leaves_nothing_behind(rows_file, tmp_path):
    with rows_file.open("a") as file:
        file.write("{oops\n")
    with pytest.raises(DataError, match=r"rows.jsonl:8"):
        prepare(config(rows_file, tmp_path / "tokens"))
    assert others(tmp_path) == []


def test_a_domain_that_is_no_file_name_is_refused(rows_file, tmp_path):
    with pytest.raises(DataError, match=r"'a/b' cannot be the name of a file"):
        prepare(config(rows_file, tmp_path / "tokens", domain="a/b"))
    assert others(tmp_path) == []


def test_other_sources_and_missing_keys_are_refused(rows_file, tmp_path):
    with pytest.raises(ConfigError, match="use data=text"):
        prepare(config(rows_file, tmp_path / "tokens", kind="digits"))
    with pytest.raises(ConfigError, match=r"prepare.out is not set"):
        prepare(config(rows_file, "???"))
    with pytest.raises(ConfigError, match=r"data.drop=bad.txt has no effect here"):
        prepare(config(rows_file, tmp_path / "tokens", drop="bad.txt"))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(50_257, "uint16"), (65_535, "uint16"), (70_000, "uint32")]
)
def test_large_vocabularies_take_four_bytes(vocab_size, dtype):
    assert smallest_dtype(vocab_size) == dtype


def test_help_says_what_every_key_means(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["runners.prepare", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    out = capsys.readouterr().out
    assert "field that holds the text" in out
    assert "folder to write, new or empty" in out


def run_command(*arguments, folder):
    command = [sys.executable, "-m", "runners.prepare", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_the_command_writes_only_its_folder(rows_file, tmp_path):
    process = run_command("data=text", f"data.path={rows_file}", "prepare.out=tokens", folder=tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Wrote tokens" in errors
    assert output == ""
    assert others(tmp_path) == ["tokens"]
    process = run_command("data=text", "data.path=nowhere.txt", "prepare.out=more", folder=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "nowhere.txt" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_killed_command_leaves_no_folder(tmp_path):
    corpus = tmp_path / "long.jsonl"
    with corpus.open("w") as file:
        for i in range(60_000):
            file.write(json.dumps({"id": i, "domain": "d", "text": f"{i} " * 300}) + "\n")
    process = run_command(f"data.path={corpus}", "prepare.out=tokens", folder=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".tokens.*.partial/tokens/long.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "tokens").exists()
