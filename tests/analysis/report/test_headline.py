from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.report import run_headline
from analysis.runs import load_run
from tests.analysis.report.test_run import configure


def test_key_figures_come_first_then_both_ends_by_id(make_run: Callable[..., Path]) -> None:
    path = make_run()
    text = run_headline(load_run(path))
    assert text.startswith("**Samples scored** ")
    rows = pq.read_table(path / "values.parquet").sort_by([("value", "descending")])["sample_id"].to_pylist()
    assert text.index("helped most") < text.index(f"`{rows[0]}`") < text.index("helped least")
    assert text.index("helped least") < text.index(f"`{rows[-1]}`") < text.index("report.html")


def test_ids_are_no_markup(make_run: Callable[..., Path]) -> None:
    path = make_run()
    table = pq.read_table(path / "values.parquet")
    ids = [f"a|`b`*{i}*" for i in range(len(table))]
    pq.write_table(table.set_column(0, "sample_id", pa.array(ids)), path / "values.parquet")
    shown = [line for line in run_headline(load_run(path)).splitlines() if "a\\|" in line]
    assert len(shown) >= 2
    assert all("`a\\|'b'*" in line for line in shown)


def test_a_run_without_values_has_its_losses(make_run: Callable[..., Path]) -> None:
    path = make_run()
    configure(path, engine__name="regular")
    (path / "values.parquet").unlink()
    text = run_headline(load_run(path))
    assert "**Validation loss** " in text
    assert "helped most" not in text
