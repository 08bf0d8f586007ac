from pathlib import Path

import pyarrow as pa
import pytest

from analysis.errors import AnalysisError
from analysis.lists import read_list, write_list

IDS = ["code/a.py#0", "a,b", 'say "so"', "007", "ünï ✓"]


@pytest.mark.parametrize("ending", ["txt", "csv", "parquet"])
def test_a_list_reads_as_it_was_written(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"list.{ending}"
    write_list(pa.table({"sample_id": IDS, "domain": ["d"] * len(IDS)}), path)
    assert read_list(path) == IDS


def test_what_is_no_list_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\n")
    (tmp_path / "other.csv").write_text("id,value\na,1\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name, says in {
        "empty.txt": "lists no sample",
        "twice.txt": "has 'a' more than once",
        "latin.txt": "cannot be read",
        "other.csv": "sample_id",
        "broken.parquet": "cannot be read",
        "missing.txt": "is missing",
        "list.json": "lists end in .txt, .csv, .parquet",
    }.items():
        with pytest.raises(AnalysisError, match=says) as error:
            read_list(tmp_path / name)
        assert "\n" not in str(error.value)


def test_an_id_that_is_no_line_is_refused_as_text(tmp_path: Path) -> None:
    table = pa.table({"sample_id": ["two\nlines"]})
    with pytest.raises(AnalysisError, match=r"is no line: end it in \.parquet"):
        write_list(table, tmp_path / "list.txt")
    write_list(table, tmp_path / "list.parquet")
    assert read_list(tmp_path / "list.parquet") == ["two\nlines"]
    assert [path.name for path in tmp_path.iterdir()] == ["list.parquet"]
    with pytest.raises(AnalysisError, match="ends in none of"):
        write_list(table, tmp_path / "list.xlsx")
