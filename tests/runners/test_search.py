"""The search command: queries from text and data, filters, outputs, and what is refused."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from conf.command import MISTAKE
from conf.errors import ConfigError
from ghost import ProjectionStore
from runners import search
from runners.models import build_model
from runners.neighbours import SCHEMA, save_neighbours
from tests.runners.conftest import Line
from tests.runners.test_train import saved_config

ROOT = Path(__file__).resolve().parents[2]
WORDS = [chr(97 + i) * 2 + chr(98 + i) for i in range(18)]
TEXTS = [" ".join(WORDS[(i * 5 + j * (i + 1)) % len(WORDS)] for j in range(12)) for i in range(14)]
TEXT = [
    "model=gpt2-tiny", "model.config.n_embd=8", "model.config.n_layer=1",
    "data=text", "data.path=texts.jsonl", "data.id_field=id", "data.domain_field=domain",
    "data.seq_len=16", "data.val_samples=3",
    "engine=gradprojlora", "engine.rank_total=16", "engine.rank_min=2", "engine.distortion_samples=0",
    "hardware.threads=1", "tracking=none", "hydra.run.dir=made",
]  # fmt: skip
STORE = "store=made/projections"

Find = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fourteen texts and the run that projected them, made once."""
    folder = tmp_path_factory.mktemp("built")
    with (folder / "texts.jsonl").open("w") as file:
        for i, text in enumerate(TEXTS):
            file.write(json.dumps({"id": f"t{i}", "domain": "ab"[i % 2], "text": text}) + "\n")
    command = [sys.executable, str(ROOT / "run.py"), *TEXT]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def made(built: Path, tmp_path: Path) -> Path:
    """The store's folder, of a copy."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path / "made" / "projections"


@pytest.fixture
def command(line: Line, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a search in this process and returns the exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["runners/search.py", *arguments])
        try:
            return search.main()
        except SystemExit as end:
            return int(str(end.code))

    return run


@pytest.fixture
def find(command: Callable[..., int], tmp_path: Path) -> Find:
    """Runs a search and returns the rows that it saves."""
    numbers = iter(range(100))

    def found(*arguments: str) -> list[dict]:
        out = tmp_path / f"found{next(numbers)}.json"
        assert command(STORE, f"out={out}", *arguments) == 0
        return json.loads(out.read_text())

    return found


def ids(folder: Path) -> list[str]:
    return pq.read_table(folder / "samples.parquet")["sample_id"].to_pylist()


def test_training_samples_find_themselves(made: Path, find: Find) -> None:
    found = find("query.split=train", "data=text", "data.path=texts.jsonl", "data.id_field=id",
                 "data.domain_field=domain", "data.seq_len=16", "data.val_samples=3", "k=2")  # fmt: skip
    first = [row for row in found if row["rank"] == 1]
    assert [row["sample_id"] for row in first] == [row["query"] for row in first] == ids(made)
    assert [row["score"] for row in first] == pytest.approx([1.0] * len(first), abs=1e-5)
    assert [row["rank"] for row in found] == [1, 2] * len(first)
    assert all(a["score"] >= b["score"] for a, b in zip(found[::2], found[1::2], strict=True))
    assert [row["index"] for row in first] == list(range(len(first)))


def test_the_stores_own_validation_samples_are_the_queries_by_default(made: Path, find: Find) -> None:
    queries = {row["query"] for row in find("k=1")}
    assert len(queries) == 3
    assert not queries & set(ids(made))
    assert len(find("k=1", "query.samples=2")) == 2


def test_a_text_finds_the_sample_that_it_is(made: Path, find: Find, tmp_path: Path) -> None:
    wanted = ids(made)[4]
    text = TEXTS[int(wanted.split("/t")[1].split("#")[0])]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in (text[:20], text)))
    found = find("query.text=q.jsonl", "query.text_field=body", "k=1")
    assert [row["query"] for row in found] == ["q/q.jsonl:1", "q/q.jsonl:2"]
    # The row is the sample's first window.
    assert found[1]["sample_id"] == wanted.split("#")[0] + "#0"
    assert found[1]["score"] == pytest.approx(1.0, abs=1e-5)


def test_a_text_file_is_cut_into_windows_and_long_rows_are_cut(
    made: Path, find: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.txt").write_text(" ".join(TEXTS[:3]))
    windows = [row["query"] for row in find("query.text=q.txt", "k=1")]
    assert windows == [f"q/q.txt#{k}" for k in range(len(windows))]
    assert len(windows) > 3
    (tmp_path / "q.jsonl").write_text(json.dumps({"text": " ".join(TEXTS)}) + "\n")
    capsys.readouterr()
    assert len(find("query.text=q.jsonl", "k=1")) == 1
    assert "1 of 1 texts are cut to data.seq_len=16 tokens" in capsys.readouterr().err


def test_filters_and_metric(made: Path, find: Find) -> None:
    table = pq.read_table(made / "samples.parquet").to_pylist()
    of_b = [row["sample_id"] for row in table if row["domain"] == "b"]
    found = find(f"k={len(of_b)}", "domains=[b]", "query.samples=1")
    assert sorted(row["sample_id"] for row in found) == sorted(of_b)
    one = find("k=1", f"ids=['{of_b[0]}']", "query.samples=1")
    assert [row["sample_id"] for row in one] == [of_b[0]]
    cosine = [row["score"] for row in found]
    assert max(cosine) <= 1
    plain = find(f"k={len(of_b)}", "domains=[b]", "query.samples=1", "metric=inner_product")
    assert [row["score"] for row in plain] != cosine


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_the_lowest_are_the_other_end_of_all(made: Path, find: Find, metric: str) -> None:
    everything = find("k=24", "query.samples=2", f"metric={metric}")
    found = find("k=3", "query.samples=2", "query.lowest=true", f"metric={metric}")
    assert [row["end"] for row in found] == ["highest"] * 6 + ["lowest"] * 6
    for query in dict.fromkeys(row["query"] for row in everything):
        ranked = [row for row in everything if row["query"] == query]
        lowest = [row for row in found if row["query"] == query and row["end"] == "lowest"]
        assert [row["score"] for row in lowest] == [row["score"] for row in ranked[:-4:-1]]
        assert [row["rank"] for row in lowest] == [1, 2, 3]


def test_texts_are_shown_and_saved_only_on_request(
    made: Path, find: Find, command: Callable[..., int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "q.jsonl").write_text(json.dumps({"text": TEXTS[5]}) + "\n")
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    assert command(STORE, "query.text=q.jsonl", "k=2") == 0
    assert TEXTS[5][:20] not in capsys.readouterr().out
    assert command(STORE, "query.text=q.jsonl", "k=2", "preview=true") == 0
    assert capsys.readouterr().out.count(TEXTS[5][:20]) >= 1
    found = find("query.text=q.jsonl", "k=2", "preview=true")
    assert all(TEXTS[5].startswith(row["query_text"].rstrip("…")) for row in found)
    by_name = {f"t{i}": text for i, text in enumerate(TEXTS)}
    for row in found:
        assert row["text"].rstrip("…") in by_name[row["sample_id"].split("/")[1].split("#")[0]]


def test_texts_that_may_be_others_are_refused(
    made: Path, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    # The store's config names the data where they were when it was made.
    config = made / "config.yaml"
    path = saved_config(made).data.path
    config.write_text(config.read_text().replace(path, str(texts)))
    assert command(STORE, "k=1", "preview=true") == 0
    texts.write_text(texts.read_text().replace(WORDS[0], WORDS[1]))
    assert command(STORE, "k=1") == 0
    capsys.readouterr()
    assert command(STORE, "k=1", "preview=true") == MISTAKE
    assert "have changed since" in capsys.readouterr().err.splitlines()[-1]


def test_weights_count_parameters(made: Path, find: Find) -> None:
    names = ProjectionStore.open(made).layout.parameters
    alike = find("k=1", "weights={*:2.0}")
    assert [row["score"] for row in alike] == pytest.approx([row["score"] for row in find("k=1")], abs=1e-6)
    only = find("k=1", "weights={*:0.0, transformer.wte.weight: 1.0}")
    assert "transformer.wte.weight" in names
    assert [row["score"] for row in only] != [row["score"] for row in alike]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_formats(made: Path, command: Callable[..., int], tmp_path: Path, ending: str) -> None:
    assert command(STORE, "k=2", f"out=found.{ending}") == 0
    path = tmp_path / f"found.{ending}"
    rows = pq.read_table(path).to_pylist() if ending == "parquet" else list(csv.DictReader(path.open()))
    assert len(rows) == 6
    assert list(rows[0]) == SCHEMA.names
    assert SCHEMA.names == ["query", "query_domain", "end", "rank", "sample_id", "domain", "index", "score"]
    assert not list(tmp_path.glob("*.partial"))


def test_neighbours_are_printed(
    made: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(search, "SHOWN", 2)
    capsys.readouterr()
    assert command(STORE, "k=2") == 0
    printed = capsys.readouterr()
    assert sum(row.startswith("│") for row in printed.out.splitlines()) == 4
    assert "1 more queries are not shown: out=neighbours.parquet" in printed.err


def test_moved_weights_are_named_and_others_refused(
    line: Line, command: Callable[..., int], find: Find, tmp_path: Path, made: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cfg = saved_config(made)
    for seed, name in ((5, "weights"), (6, "others")):
        torch.manual_seed(seed)
        build_model(cfg.model, 50_257, None, None).save_pretrained(tmp_path / name)  # type: ignore[operator]
    options = [word for word in TEXT if not word.startswith("hydra.run.dir")]
    assert line(*options, "model.path=weights", "hydra.run.dir=second") == 0
    store = "store=second/projections"
    assert command(store, "k=1") == 0
    (tmp_path / "weights").rename(tmp_path / "moved")
    capsys.readouterr()
    assert command(store, "k=1") == MISTAKE
    assert command(store, "k=1", "model.path=others") == MISTAKE
    last = capsys.readouterr().err.splitlines()[-1]
    for part in ("model.path=others", "other weights", str(tmp_path / "second"), "model.path=FOLDER"):
        assert part in last
    assert command(store, "k=1", "model.path=moved") == 0


REFUSED = {
    ("k=0",): ["k=0", "k=1"],
    ("k=25",): ["k=25", "k=24"],
    ("domains=[c]",): ["domains=c", "a, b"],
    ("ids=[t99]",): ["ids=t99"],
    ("metric=euclid",): ["metric=euclid", "cosine"],
    ("out=found.txt",): ["out=found.txt", ".parquet"],
    ("out=texts.jsonl.json",): ["out=texts.jsonl.json exists"],
    ("out=nowhere/found.json",): ["out=nowhere/found.json", "no folder"],
    ("query.text=nowhere.txt",): ["query.text=nowhere.txt"],
    ("query.text=texts.jsonl", "query.split=train"): ["query.split=train", "query.split=val"],
    ("query.text_field=body",): ["query.text_field=body", "no effect"],
    ("query.text=texts.jsonl", "data=interpreter"): ["query.text=texts.jsonl", "data=interpreter", "one"],
    ("query.text=short.jsonl",): ["short.jsonl:1", "fewer than 2 tokens"],
    ("query.text=empty.jsonl",): ["empty.jsonl has no rows"],
    ("query.text=texts.jsonl", "query.text_field=body"): ["'body' (query.text_field)", "set query.text"],
    ("query.text=q.txt", "query.text_field=body"): ["query.text_field=body has no effect", "q.txt"],
    ("query.samples=0",): ["query.samples=0"],
    ("query.samples=4", "k=1"): ["query.samples=4", "the 3 queries", "query.samples=3"],
    ("engine=gradprojlora",): ["engine is no group of this command"],
    ("data=digits",): ["gives table_classes"],
    ("data=tokens", "data.path=tokens"): ["data.path='tokens'"],
    ("weights={nope: 2.0}",): ["nope"],
    ("data=interpreter", "data.seq_len=512"): ["data.seq_len=512", "n_positions=256"],
    ("model.path=/nowhere",): ["model.path=/nowhere"],
    ("store=texts.jsonl",): ["texts.jsonl"],
    ("store=made",): ["store=made is the directory of its run: type store=made/projections"],
    ("query.column=mlp",): ["query.column=mlp has no effect with store=", "query.column=[]", "run=DIR"],
    ("tracking.uri=sqlite:///a.db",): ["tracking.uri=sqlite:///a.db has no effect"],
    ("run=made",): ["store=made/projections and run=made are both searched"],
}  # fmt: skip


def test_what_cannot_be_searched_is_one_sentence(
    made: Path, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.jsonl.json").write_text("{}")
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "q.txt").write_text(TEXTS[0])
    for words, parts in REFUSED.items():
        capsys.readouterr()
        store = [] if words[0].startswith("store=") else [STORE]
        assert command(*store, *words) == MISTAKE, words
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        for part in parts:
            assert part in printed.splitlines()[-1], words
    assert command() == MISTAKE
    assert "nothing is searched: type store=DIR or run=DIR" in capsys.readouterr().err


def test_labels_that_are_domains_must_be_the_stores(
    line: Line, command: Callable[..., int], made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for word in TEXT if not word.startswith(("model", "hydra"))]
    classes = ["model=bert-tiny", "data.task=text_classes", "hydra.run.dir=classes"]
    assert line(*options, *classes) == 0
    store = "store=classes/projections"
    assert command(store, "k=1") == 0
    others = Path("texts.jsonl").read_text().replace('"domain": "b"', '"domain": "c"')
    Path("others.jsonl").write_text(others)
    data = [word for word in options if word.startswith("data") and "path" not in word]
    capsys.readouterr()
    assert command(store, "k=1", *data, "data.task=text_classes", "data.path=others.jsonl") == MISTAKE
    assert "has the classes [a,c], and the store's samples have [a,b]" in capsys.readouterr().err
    assert command(store, "k=1", "query.text=texts.jsonl") == MISTAKE
    assert "a store of text_classes samples" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["config.yaml", "facts.json", "samples.parquet"])
def test_a_store_without_its_own_description_is_refused(
    made: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for content in (b"{", b"{}", b""):
        (made / name).write_bytes(content)
        assert command(STORE) == MISTAKE
        assert f"store={made} has a damaged {name}" in capsys.readouterr().err.splitlines()[-1]
    (made / name).unlink()
    assert command(STORE) == MISTAKE
    assert f"{made} has no {name}" in capsys.readouterr().err.splitlines()[-1]


def test_nothing_left_to_search_is_said(
    made: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    store = ProjectionStore.open(made)
    store.delete(store.sample_ids)
    assert command(STORE, "k=1") == MISTAKE
    assert "has none of the samples that are to be searched" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".json"])
def test_a_file_that_the_system_refuses_is_one_sentence(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"found{ending}"
    path.with_name(f".{path.name}.{os.getpid()}.partial").mkdir()  # stands where the file is written first
    table = SCHEMA.empty_table()
    with pytest.raises(ConfigError, match=rf"out={path} cannot be written \(.+\): name a file elsewhere"):
        save_neighbours(table, path)
    assert not path.exists()
