"""The search of a scored run: which columns a query means, both ends, filters, texts, refusals."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from mlflow import MlflowClient

from analysis.runs import Run
from conf.command import CONF_DIR, MISTAKE
from conf.errors import ConfigError
from runners import search
from runners.data import build_data
from runners.data.loader import write_samples
from runners.search_scores import refuse_other_samples
from tests.runners.conftest import Line
from tests.runners.test_search import ROOT, TEXTS

RUN = [
    "model=gpt2-tiny", "model.config.n_embd=8", "model.config.n_layer=1",
    "data=text", "data.path=texts.jsonl", "data.id_field=id", "data.domain_field=domain",
    "data.seq_len=16", "data.val_samples=12", "engine.val_batch_size=2", "layers=all",
    "trainer.max_steps=5", "trainer.batch_size=4", "trainer.overhead_probes=0",
    "hardware.threads=1", "tracking=none",
]  # fmt: skip
WIDE = ["engine.val_sets=domain", "engine.resolution=family", "hydra.run.dir=wide"]
PAIRS = ["engine.pairwise=true", "hydra.run.dir=pairs"]

Find = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fourteen texts, a run with a column for each family and domain, and one with pairs."""
    folder = tmp_path_factory.mktemp("built")
    with (folder / "texts.jsonl").open("w") as file:
        for i, text in enumerate(TEXTS):
            file.write(json.dumps({"id": f"t{i}", "domain": "ab"[i % 2], "text": text}) + "\n")
    for own in (WIDE, PAIRS):
        command = [sys.executable, str(ROOT / "run.py"), *RUN, *own]
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


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
        assert command(f"out={out}", *arguments) == 0
        return json.loads(out.read_text())

    return found


def expected(run: Path, *columns: str) -> list[tuple[str, float]]:
    """Samples by falling sum of these columns."""
    rows = pq.read_table(run / "values_by_column.parquet").to_pylist()
    return sorted(
        ((row["sample_id"], sum(row[c] for c in columns)) for row in rows), key=lambda pair: -pair[1]
    )


def pairs(rows: list[dict]) -> list[tuple[str, float]]:
    return [(row["sample_id"], row["score"]) for row in rows]


def test_a_column_gives_its_highest_and_lowest(folder: Path, find: Find) -> None:
    ranked = expected(folder / "wide", "attn | a")
    found = find("run=wide", "query.column=attn | a", "k=3", "query.lowest=true")
    assert pairs(found[:3]) == ranked[:3]
    assert pairs(found[3:]) == ranked[:-4:-1]
    assert [row["end"] for row in found] == ["highest"] * 3 + ["lowest"] * 3
    assert [row["rank"] for row in found] == [1, 2, 3] * 2
    samples = {row["sample_id"]: row for row in pq.read_table(folder / "wide/samples.parquet").to_pylist()}
    for row in found:
        assert (row["index"], row["domain"]) == tuple(
            samples[row["sample_id"]][k] for k in ("index", "domain")
        )


def test_a_part_or_a_set_is_the_sum_of_its_columns(folder: Path, find: Find) -> None:
    columns = pq.read_schema(folder / "wide/values_by_column.parquet").names[2:]
    found = find("run=wide", "query.column=[mlp,b]", "k=4")
    assert [row["query"] for row in found] == ["mlp"] * 4 + ["b"] * 4
    assert [row["query_domain"] for row in found[::4]] == ["", "b"]
    for rows, own in ((found[:4], "mlp | "), (found[4:], " | b")):
        ranked = expected(folder / "wide", *(c for c in columns if c.startswith(own) or c.endswith(own)))[:4]
        assert [row["sample_id"] for row in rows] == [name for name, _ in ranked]
        assert [row["score"] for row in rows] == pytest.approx([value for _, value in ranked], rel=1e-12)


def test_a_validation_sample_is_a_query(folder: Path, find: Find) -> None:
    samples = pq.read_table(folder / "pairs/samples.parquet").to_pylist()
    val = next(row for row in samples if row["split"] == "val")
    found = find("run=pairs", f"query.column='{val['sample_id']}'", "k=2")
    assert pairs(found) == expected(folder / "pairs", val["sample_id"])[:2]
    assert {row["query_domain"] for row in found} == {val["domain"]}


def test_the_whole_value_is_a_query_of_any_run(folder: Path, find: Find) -> None:
    rows = pq.read_table(folder / "pairs/values.parquet").to_pylist()
    ranked = sorted(((row["sample_id"], row["value"]) for row in rows), key=lambda pair: -pair[1])
    assert pairs(find("run=pairs", "query.column=value", "k=5")) == ranked[:5]
    (folder / "pairs/values_by_column.parquet").unlink()
    assert pairs(find("run=pairs", "query.column=value", "k=5")) == ranked[:5]


def test_filters(folder: Path, find: Find) -> None:
    ranked = expected(folder / "wide", "embed | a")
    of_b = [pair for pair in ranked if pair[0].startswith("b/")]
    assert pairs(find("run=wide", "query.column=embed | a", "domains=[b]", "k=3")) == of_b[:3]
    one = find("run=wide", "query.column=embed | a", f"ids=['{ranked[4][0]}']", "k=1")
    assert pairs(one) == [ranked[4]]


def test_answers_are_printed_with_what_they_mean(
    folder: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "150")
    capsys.readouterr()
    assert command("run=wide", "query.column=[mlp,attn]", "k=2", "query.lowest=true") == 0
    printed = capsys.readouterr().out
    for part in ("highest value", "lowest value", "lowered the query's loss", "AdamW"):
        assert part in printed
    assert sum(row.startswith("│") for row in printed.splitlines()) == 8
    assert "cosine" not in printed


def test_texts_on_request(folder: Path, find: Find) -> None:
    val = [
        row["sample_id"]
        for row in pq.read_table("pairs/samples.parquet").to_pylist()
        if row["split"] == "val"
    ]
    found = find("run=pairs", f"query.column=['{val[0]}',value]", "k=2", "preview=true")
    by_name = {f"t{i}": text for i, text in enumerate(TEXTS)}
    for row in found:
        assert row["text"].rstrip("…") in by_name[row["sample_id"].split("/")[1].split("#")[0]]
    assert found[0]["query_text"].rstrip("…") in by_name[val[0].split("/")[1].split("#")[0]]
    assert found[2]["query_text"] is None


def test_samples_that_are_others_now_are_not_shown(
    folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = folder / "texts.jsonl"
    texts.write_text(texts.read_text().replace('"t3"', '"u3"'))
    capsys.readouterr()
    assert command("run=wide", "query.column=mlp", "k=1", "preview=true") == MISTAKE
    last = capsys.readouterr().err.splitlines()[-1]
    assert "have changed since" in last
    assert "preview=false" in last


def test_a_run_in_mlflow_is_read_by_its_id(folder: Path, tracked_cwd: Path, find: Find) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{tracked_cwd}/mlflow.db")
    experiment = client.create_experiment("search", artifact_location=str(tracked_cwd / "artifacts"))
    run = client.create_run(experiment).info.run_id
    client.log_artifacts(run, str(folder / "wide"))
    ranked = expected(folder / "wide", "attn | a")
    assert pairs(find(f"run={run}", "query.column=attn | a", "k=2")) == ranked[:2]
    uri = f"tracking.uri=sqlite:///{tracked_cwd}/mlflow.db"
    assert pairs(find(f"run=runs:/{run}", uri, "query.column=attn | a", "k=2")) == ranked[:2]


REFUSED = {
    ("run=wide",): ["type query.column=NAME (columns: ", "mlp | a"],
    ("run=wide", "query.column=atn"): ["query.column=atn is no column of run=wide", "did you mean attn?"],
    ("run=pairs", "query.column=nobody"): ["query.column=nobody is no column", "columns: "],
    ("run=wide", "query.column=[mlp,mlp]"): ["names a column twice"],
    ("run=wide", "query.column=mlp", "metric=inner_product"): [
        "metric=inner_product has no effect with run="
    ],
    ("run=wide", "query.column=mlp", "weights={mlp: 2.0}"): ["weights={'mlp': 2.0} has no effect"],
    ("run=wide", "query.column=mlp", "query.text=a.txt"): ["query.text=a.txt has no effect", "store=DIR"],
    ("run=wide", "query.column=mlp", "data=text", "data.path=a"): ["data=text has no effect", "data=null"],
    ("run=wide", "query.column=mlp", "hardware=cpu"): ["hardware.device=cpu has no effect"],
    ("run=wide", "query.column=mlp", "tracking.uri=sqlite:///a.db"): ["tracking.uri=", "run=wide"],
    ("run=wide", "query.column=mlp", "k=99"): ["k=99 is more than"],
    ("run=wide", "query.column=mlp", "domains=[c]"): ["domains=c is nothing that run=wide has", "a, b"],
    ("run=nowhere", "query.column=mlp"): ["nowhere is no directory"],
    ("run=.", "query.column=mlp"): ["run=. stands for 2 runs", "name one"],
    ("run=" + "0" * 32, "query.column=mlp"): ["0" * 32],
}


def test_what_cannot_be_answered_is_one_sentence(
    folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for words, parts in REFUSED.items():
        capsys.readouterr()
        assert command(*words) == MISTAKE, words
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        for part in parts:
            assert part in printed.splitlines()[-1], words


def test_a_run_without_columns_says_what_to_type(
    folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "wide/values_by_column.parquet").unlink()
    capsys.readouterr()
    assert command("run=wide") == MISTAKE
    last = capsys.readouterr().err.splitlines()[-1]
    assert "query.column=value" in last
    assert "engine.pairwise=true" in last


def test_a_damaged_table_is_named(
    folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "wide/values_by_column.parquet"
    table = pq.read_table(path)
    path.write_bytes(b"nothing")
    capsys.readouterr()
    assert command("run=wide", "query.column=mlp") == MISTAKE
    assert f"{Path('wide') / path.name} is damaged" in capsys.readouterr().err.splitlines()[-1]
    name = table["sample_id"][0].as_py()
    pq.write_table(
        table.set_column(0, "sample_id", pa.array(["x", *table["sample_id"].to_pylist()[1:]])), path
    )
    assert command("run=wide", "query.column=mlp") == MISTAKE
    assert "lacks 'x', which has a value" in capsys.readouterr().err.splitlines()[-1], name


def test_the_samples_of_a_test_set_are_the_runs_too(tmp_path: Path) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        made = compose("config", ["experiment=digits", "data.val_samples=40", "data.test_samples=10"])
        asked = compose("search", ["run=made"])
    data = build_data(made.data)
    assert data.test is not None
    write_samples({"train": data.train, "val": data.val, "test": data.test}, tmp_path / "samples.parquet")
    refuse_other_samples(asked, Run(tmp_path, "made"), data)
    made.data.test_samples = 9
    with pytest.raises(ConfigError, match="have changed since"):
        refuse_other_samples(asked, Run(tmp_path, "made"), build_data(made.data))
