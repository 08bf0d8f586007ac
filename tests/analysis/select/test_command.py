"""`python -m analysis.select`: where values come from, and what is written."""

import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.lists import read_list
from analysis.select import command as select
from tests.analysis.command_line import Command

MEDIAN = ["method=quantile", "quantile=0.5"]


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A run directory with four scored training samples, one that never was, and one of validation."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    ids = ["a", "b", "c", "d", "never", "v"]
    splits = ["train"] * 5 + ["val"]
    samples = {"index": range(6), "sample_id": ids, "domain": ["x"] * 6, "split": splits}
    pq.write_table(pa.table(samples), folder / "samples.parquet")
    values = {
        "sample_id": ids[:4],
        "domain": ["x"] * 4,
        "value": [4.0, -3.0, 2.0, -1.0],
        "times_seen": [1] * 4,
    }
    pq.write_table(pa.table(values), folder / "values.parquet")
    return folder


@pytest.mark.parametrize("source", ["run", "run/values.parquet"])
def test_both_lists_of_a_run(
    in_process: Command, scored: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(select.main, f"values={source}", *MEDIAN, "out=made/list.txt", "write=both") == 0
    assert read_list(Path("made/list-keep.txt")) == ["a", "c", "never"]
    assert read_list(Path("made/list-drop.txt")) == ["b", "d"]
    row = next(line for line in capsys.readouterr().out.splitlines() if " all " in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "all",
        "3",
        "2",
        "1",
        "+6.000e+00",
        "-4.000e+00",
    ]


def test_samples_that_were_never_scored_can_be_dropped(in_process: Command, scored: Path) -> None:
    assert in_process(select.main, "values=run", *MEDIAN, "out=d.csv", "write=drop", "unscored=drop") == 0
    assert sorted(read_list(Path("d.csv"))) == ["b", "d", "never"]


def test_an_aggregates_samples_are_those_of_its_runs(
    in_process: Command, scored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "aggregate"
    folder.mkdir()
    pq.write_table(pq.read_table(scored / "values.parquet"), folder / "values.parquet")
    pq.write_table(pa.table({"directory": [str(scored)] * 2}), folder / "runs.parquet")
    assert in_process(select.main, "values=aggregate", *MEDIAN, "out=keep.parquet") == 0
    assert read_list(Path("keep.parquet")) == ["a", "c", "never"]
    assert "never scored may be unknown" not in caplog.text
    (scored / "samples.parquet").unlink()
    with caplog.at_level(logging.WARNING):
        assert in_process(select.main, "values=aggregate", *MEDIAN, "out=keep.parquet") == 0
    assert read_list(Path("keep.parquet")) == ["a", "c"]


def test_without_out_nothing_is_written(in_process: Command, scored: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert in_process(select.main, "values=run", *MEDIAN) == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["values=run"], "method has no value"),
        (["values=run", *MEDIAN, "write=drop"], "write=drop has no effect without out=FILE"),
        (["values=run", *MEDIAN, "out=list.json"], "out=list.json ends in none of .txt, .csv, .parquet"),
        (["values=run", *MEDIAN, "out=run/values.parquet"], "replace run/values.parquet, which is no list"),
        (["values=run", "method=quantile"], "quantile=null does not say"),
        (["values=run", *MEDIAN, "by=run_rank"], "has no column run_rank"),
        (["values=.", *MEDIAN], "has no values.parquet: give a scored run's directory"),
        (["values=run/config.yaml", *MEDIAN], "is no table of values"),
        (["values=other", *MEDIAN], "samples.parquet has no column split"),
        (["values=nowhere", *MEDIAN], "nowhere is no directory, and there is no tracking store"),
    ],
)
def test_what_cannot_work_is_refused(
    in_process: Command, scored: Path, arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(scored, "other")
    pq.write_table(pa.table({"sample_id": ["a"], "domain": ["x"]}), "other/samples.parquet")
    assert in_process(select.main, *arguments) == 2
    assert said in " ".join(capfd.readouterr().err.split())
