"""Lists and tables without samples: nothing of the others changes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.errors import AnalysisError
from analysis.forget.folder import naming_file

GONE = {"mail/1#0", "ümlaut"}


def rid(path: Path) -> set[str]:
    """Forgets `GONE` in the file; returns what it had named."""
    file = naming_file(path)
    assert file is not None
    names = file.names()
    file.forget(GONE)
    assert not file.names() & GONE
    assert file.names() == names - GONE
    return names


CASES = {
    "keep.txt": ("a\nmail/1#0\r\n\nmail/1#01\nümlaut", "a\n\nmail/1#01\n"),
    "found.csv": (
        'rank,sample_id,text\n1,"mail/1#0","a\nb"\n2,mail/1#01,"mail/1#0, ""quoted"""\r\n3,ümlaut,x\n',
        'rank,sample_id,text\n2,mail/1#01,"mail/1#0, ""quoted"""\r\n',
    ),
    "other.csv": ("name,value\nmail/1#0,1\n", "name,value\nmail/1#0,1\n"),
    "found.jsonl": (
        '{"query": "mail/1#0", "score": 1e-1}\nno JSON\n{"sample_id":  "b"}\n{"sample_id": "\\u00fcmlaut"}\n',
        'no JSON\n{"sample_id":  "b"}\n',
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_lines_of_others_keep_their_bytes(tmp_path: Path, name: str) -> None:
    before, after = CASES[name]
    (tmp_path / name).write_bytes(before.encode())
    rid(tmp_path / name)
    assert (tmp_path / name).read_bytes() == after.encode()


def test_bytes_that_are_no_text_stay(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"mail/1#0\n\xff\xfe\x00\n")
    rid(tmp_path / "list.txt")
    assert (tmp_path / "list.txt").read_bytes() == b"\xff\xfe\x00\n"


@pytest.mark.parametrize("indent", [None, 1, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_keeps_its_form(tmp_path: Path, indent: int | None, ascii_only: bool) -> None:
    def write(value: object) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only) + "\n"

    rows = [{"query": q, "sample_id": s, "score": 0.1 + i} for i, (q, s) in enumerate(
        [("é", "mail/1#0"), ("mail/1#0", "b"), ("é", "ümlaut"), ("é", "b")]
    )]  # fmt: skip
    path = tmp_path / "found.json"
    path.write_text(write(rows), encoding="utf-8")
    assert rid(path) == {"é", "b", *GONE}
    assert path.read_text(encoding="utf-8") == write(rows[3:])
    report = {"model": "mail/1#0", "sample_ids": ["mail/1#0", "é"], "samples": 2, "rms": [1e-300, 0.1]}
    path.write_text(write(report), encoding="utf-8")
    rid(path)
    assert path.read_text(encoding="utf-8") == write(report | {"sample_ids": ["é"]})


def test_a_vocabulary_is_no_list(tmp_path: Path) -> None:
    content = json.dumps({"mail/1#0": 3, "merges": ["mail/1#0"]})
    (tmp_path / "vocab.json").write_text(content)
    assert rid(tmp_path / "vocab.json") == set()
    assert (tmp_path / "vocab.json").read_text() == content


def table(**columns: object) -> pa.Table:
    return pa.table(columns).replace_schema_metadata({"made": "here"})


def test_rows_go_from_tables_and_the_others_stay(tmp_path: Path) -> None:
    value = np.array([0.1, float("nan"), -0.0, 5e-324])
    values = table(sample_id=["a", "mail/1#0", "b", "ümlaut"], domain=["d"] * 4, value=value, rank=range(4))
    pq.write_table(values, tmp_path / "values.parquet")
    rid(tmp_path / "values.parquet")
    assert pq.read_table(tmp_path / "values.parquet").equals(values.take([0, 2]), check_metadata=True)
    found = table(query=["a", "mail/1#0", "a"], sample_id=["b", "b", "ümlaut"], score=[1.0, 2.0, 3.0])
    pq.write_table(found, tmp_path / "found.parquet")
    rid(tmp_path / "found.parquet")
    assert pq.read_table(tmp_path / "found.parquet").equals(found[:1])


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_text_is_text_however_a_program_stores_it(tmp_path: Path, kind: pa.DataType) -> None:
    found = table(sample_id=pa.array(["a", "mail/1#0", "b"]).cast(kind), value=[1.0, 2.0, 3.0])
    pq.write_table(found, tmp_path / "keep.parquet", compression="none")
    assert rid(tmp_path / "keep.parquet") == {"a", "b", "mail/1#0"}
    left = pq.ParquetFile(tmp_path / "keep.parquet").read()
    assert left["sample_id"].to_pylist() == ["a", "b"]
    ids = left["sample_id"].combine_chunks()
    assert "mail/1#0" not in (ids.dictionary if pa.types.is_dictionary(ids.type) else ids).to_pylist()


def test_columns_of_validation_samples_go(tmp_path: Path) -> None:
    names = ["mail/1#0", "attn | ümlaut", "attn | c", "attn"]
    columns = table(sample_id=["a", "mail/1#0"], domain=["d", "d"], **{name: [1.0, 2.0] for name in names})
    path = tmp_path / "values_by_column.parquet"
    pq.write_table(columns, path)
    rid(path)
    assert pq.read_table(path).to_pylist() == [
        {"sample_id": "a", "domain": "d", "attn | c": 1.0, "attn": 1.0}
    ]


@pytest.mark.parametrize("name", ["values_by_column.parquet", "columns.parquet"])
def test_a_validation_set_is_no_sample(tmp_path: Path, name: str) -> None:
    """A sample that has the name of a domain goes alone."""
    sets = table(sample_id=["3", "4"], domain=["3", "4"], val=["3", "4"], **{"attn | 3": [1.0, 2.0]})
    pq.write_table(sets, tmp_path / name)
    file = naming_file(tmp_path / name)
    assert file is not None
    file.forget({"3"})
    left = pq.read_table(tmp_path / name)
    assert left["sample_id"].to_pylist() == ["4"]
    assert left.column_names == sets.column_names


def test_validation_samples_of_an_aggregate_go(tmp_path: Path) -> None:
    rows = table(part=["attn"] * 3, val=["mail/1#0", "b", "d"], domain=["d"] * 3, total=[1.0, 2.0, 3.0])
    pq.write_table(rows, tmp_path / "columns.parquet")
    rid(tmp_path / "columns.parquet")
    assert pq.read_table(tmp_path / "columns.parquet").equals(rows[1:])


@pytest.mark.parametrize("write", [
    lambda path: pq.write_table(table(sample_id=["a"], value=[1.0]), path),
    lambda path: pq.write_table(table(name=["mail/1#0"]), path),
    lambda path: pq.write_table(table(sample_id=[1, 2]), path),
])  # fmt: skip
def test_a_table_without_the_samples_is_left_alone(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "table.parquet"
    write(path)
    before = path.read_bytes(), path.stat().st_ino
    rid(path)
    assert (path.read_bytes(), path.stat().st_ino) == before


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "values.parquet").write_bytes(b"PAR1")
    with pytest.raises(AnalysisError, match=r"values\.parquet is damaged"):
        rid(tmp_path / "values.parquet")
