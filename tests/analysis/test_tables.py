from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.aggregate.tables import OPTIONAL, SCHEMAS, check_folder, read_aggregate, write_aggregate
from analysis.errors import AnalysisError
from ghost.scores import ONE_COLUMN
from tests.analysis.synthetic import SETS, tables_of, write_run


@pytest.mark.parametrize("columns", [ONE_COLUMN, SETS], ids=["one", "sets"])
def test_what_is_written_is_read(tmp_path: Path, columns: tuple) -> None:
    tables = tables_of(write_run(tmp_path / "a", 0, columns=columns), write_run(tmp_path / "b", 1))
    folder = tmp_path / "deep" / "aggregate"
    write_aggregate({name: [table] for name, table in tables.items()}, folder)
    assert {path.name for path in folder.iterdir()} == {f"{name}.parquet" for name in tables}
    found = read_aggregate(folder)
    for name, schema in SCHEMAS.items():
        table = getattr(found, name)
        if name in tables:
            assert table.schema.equals(schema)
            assert table.equals(tables[name])
        else:
            assert name in OPTIONAL
            assert table is None


def test_an_earlier_aggregate_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    wide, plain = write_run(tmp_path / "wide", columns=SETS), write_run(tmp_path / "plain", 1)
    folder = tmp_path / "aggregate"
    write_aggregate({name: [table] for name, table in tables_of(wide).items()}, folder)

    def fails():  # type: ignore[no-untyped-def]
        yield tables_of(plain)["correlations"]
        raise AnalysisError("the last table")

    broken = {name: [table] for name, table in tables_of(plain).items()} | {"correlations": fails()}
    with pytest.raises(AnalysisError, match="the last table"):
        write_aggregate(broken, folder)
    assert read_aggregate(folder).runs["run"].to_pylist() == ["wide"]
    assert not [path for path in folder.iterdir() if "partial" in path.name]
    write_aggregate({name: [table] for name, table in tables_of(plain).items()}, folder)
    assert read_aggregate(folder).runs["run"].to_pylist() == ["plain"]
    assert read_aggregate(folder).columns is None


def test_folders_with_other_files_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(AnalysisError, match=r"run has other files in it, such as config\.yaml"):
        write_aggregate({"values": [tables_of(run)["values"]]}, run)
    assert pq.read_table(run / "values.parquet").num_columns == 4
    with pytest.raises(AnalysisError, match="is no folder"):
        check_folder(run / "config.yaml")
    with pytest.raises(AnalysisError, match="cannot be written"):
        write_aggregate({}, run / "config.yaml" / "below")


def test_what_is_no_aggregate_is_said(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="holds no aggregate"):
        read_aggregate(tmp_path)
    run = write_run(tmp_path / "run")
    folder = tmp_path / "aggregate"
    write_aggregate({name: [table] for name, table in tables_of(run).items()}, folder)
    (folder / "runs.parquet").write_bytes(b"PAR1")
    with pytest.raises(AnalysisError, match=r"runs\.parquet cannot be read"):
        read_aggregate(folder)
    (folder / "runs.parquet").unlink()
    with pytest.raises(AnalysisError, match=r"runs\.parquet cannot be read"):
        read_aggregate(folder)
    pq.write_table(pa.table({"run": ["a"]}), folder / "runs.parquet")
    with pytest.raises(AnalysisError, match=r"runs\.parquet has the columns \['run'\]"):
        read_aggregate(folder)
    with pytest.raises(AnalysisError, match=r"values\.parquet has the columns"):  # a run's own values
        read_aggregate(run)
