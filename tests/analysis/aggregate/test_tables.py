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


def test_a_report_and_a_comparison_may_stand_beside_the_tables(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = {name: [table] for name, table in tables_of(write_run(tmp_path / "run")).items()}
    folder = tmp_path / "aggregate"
    write_aggregate(tables, folder)
    for name in ("report.html", "comparison.json"):
        (folder / name).write_text("")
    write_aggregate(tables, folder)
    assert [line for line in caplog.messages if line.endswith("of the aggregate before: write it again.")]
    assert {"report.html", "comparison.json"} < {path.name for path in folder.iterdir()}


def test_what_is_no_aggregate_is_said(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match=r"holds no aggregate, since it has no values\.parquet"):
        read_aggregate(tmp_path)
    run = write_run(tmp_path / "run")
    with pytest.raises(AnalysisError, match=r"holds no aggregate, since it has no runs\.parquet"):
        read_aggregate(run)
    folder = tmp_path / "aggregate"
    write_aggregate({name: [table] for name, table in tables_of(run).items()}, folder)
    (folder / "domains.parquet").unlink()
    with pytest.raises(AnalysisError, match=r"domains\.parquet is missing"):
        _ = read_aggregate(folder).domains
    (folder / "runs.parquet").write_bytes(b"PAR1")
    with pytest.raises(AnalysisError, match=r"runs\.parquet is damaged"):
        _ = read_aggregate(folder).runs
    pq.write_table(pa.table({"run": ["a"]}), folder / "runs.parquet")
    with pytest.raises(AnalysisError, match=r"runs\.parquet has no column 'directory', only run"):
        _ = read_aggregate(folder).runs


def test_a_table_is_read_once_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "aggregate"
    run = write_run(tmp_path / "run")
    write_aggregate({name: [table] for name, table in tables_of(run).items()}, folder)
    (folder / "trajectories.parquet").write_bytes(b"")
    found = read_aggregate(folder)
    assert found.values is found.values
    assert [(name, one.directory) for name, one in found.open_runs().items()] == [("run", run)]
