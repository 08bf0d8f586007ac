"""`python -m analysis.report`."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from analysis.errors import AnalysisError
from analysis.report.command import ReportConfig, main, report
from analysis.report.texts import read_texts
from conf.errors import ConfigError
from tests.analysis.report.test_run import Outline

MakeRun = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[3]
EMPTY = {
    "run": None,
    "aggregate": None,
    "comparison": None,
    "texts": None,
    "tracking": {"uri": None},
    "out": "report.html",
}


def made(**keys: object) -> Path:
    return report(OmegaConf.merge(OmegaConf.structured(ReportConfig), EMPTY | keys))


def test_the_whole_command_leaves_the_page_and_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run()
    folder = tmp_path / "typed here"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "analysis.report", f"run={path}"],
        capture_output=True, text=True, cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Wrote report.html" in done.stderr
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    assert "Samples that stand out" in Outline(folder / "report.html").titles


def test_texts_are_shown_only_when_asked_for(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run()
    ids = [line["sample_id"] for line in _rows(path)]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"sample_id": i, "text": f"words\nof {i}"}) + "\n" for i in ids))
    assert "words of" not in Outline(made(run=str(path), out=str(tmp_path / "a.html"))).text
    shown = Outline(made(run=str(path), texts=str(texts), out=str(tmp_path / "b.html")))
    assert shown.text.count("words of") == 24


def test_an_aggregate(make_aggregate: Callable[..., Path], tmp_path: Path) -> None:
    out = made(aggregate=str(make_aggregate(runs=2)), out=str(tmp_path / "page.html"))
    assert "How far runs agree" in Outline(out).titles


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "exactly one of run=DIRECTORY and aggregate=FOLDER"),
        ({"run": "a", "aggregate": "b"}, "exactly one of run=DIRECTORY and aggregate=FOLDER"),
        ({"aggregate": "b", "texts": "t"}, "texts=t has no effect on a report of aggregate=b"),
        (
            {"aggregate": "b", "tracking": {"uri": "sqlite:///m.db"}},
            "tracking.uri=sqlite:///m.db has no effect",
        ),
        ({"run": "a", "comparison": "c"}, "comparison=c has no effect on a report of run=a"),
        ({"run": "a", "out": "page.pdf"}, "out=page.pdf is no HTML file"),
        ({"run": "a", "out": "no/such/page.html"}, "out=no/such/page.html cannot be written"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        made(**keys)
    assert said in str(error.value)


def test_a_folder_of_several_runs_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("sweep/0", "sweep/1"):
        make_run(name)
    with pytest.raises(ConfigError, match="is 2 runs"):
        made(run=str(tmp_path / "sweep"), out=str(tmp_path / "page.html"))


def test_mistakes_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "argv", ["report", "aggregate=nothing"])
    with pytest.raises(SystemExit) as end:
        main()
    root.handlers[:], root.level = handlers, level
    assert end.value.code == 2


@pytest.mark.parametrize("line", ["{", "[]", '{"sample_id": "a"}', "1"])
def test_texts_that_are_none_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"sample_id": "a", "text": "b"}\n' + line + "\n")
    with pytest.raises(AnalysisError, match="line 2"):
        read_texts(path)
    with pytest.raises(AnalysisError, match="is no file"):
        read_texts(tmp_path / "none.jsonl")


def test_long_texts_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"sample_id": "a", "text": "word " * 10_000}) + "\n")
    text = read_texts(path)["a"]
    assert len(text) == 240
    assert text.endswith("…")


def _rows(path: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(path / "values.parquet").to_pylist()
