"""Every number of an aggregate against a slow reference."""

import tracemalloc
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analysis.aggregate.tables import SCHEMAS
from analysis.errors import AnalysisError
from analysis.runs import load_run
from ghost.scores import ONE_COLUMN, Column
from tests.analysis.conftest import MakeRun
from tests.analysis.synthetic import PAIRS, SETS, plain_rows, plain_values, tables_of, write_run


def assert_rows(found: pa.Table, expected: list[dict[str, Any]], *keys: str) -> None:
    """The same rows, whatever their order; numbers to 1e-9 relative, or 1e-15 where they should be 0."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in keys)

    rows = sorted(found.to_pylist(), key=place)
    assert len(rows) == len(expected)
    for row, right in zip(rows, sorted(expected, key=place), strict=True):
        assert row.keys() == right.keys()
        for name, value in right.items():
            if isinstance(value, float):
                assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-15), (name, place(row))
            else:
                assert row[name] == value, (name, place(row))


def without_ranks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rank` breaks ties that rounding makes or hides; it is checked on its own."""
    return [{name: value for name, value in row.items() if name != "rank"} for row in rows]


@pytest.mark.parametrize("columns", [ONE_COLUMN, SETS, PAIRS], ids=["one", "sets", "pairs"])
@pytest.mark.parametrize("seed", range(4))
def test_every_column_of_values(tmp_path: Path, seed: int, columns: tuple[Column, ...]) -> None:
    paths = [
        write_run(tmp_path / f"run {i}", 10 * seed + i, first_id=3 * i, columns=columns, shards=3 + seed)
        for i in range(3)
    ]
    values = tables_of(*paths)["values"]
    assert values.schema.equals(SCHEMAS["values"])
    assert_rows(values.drop_columns("rank"), without_ranks(plain_values(paths)), "sample_id")
    ordered = sorted(values.to_pylist(), key=lambda row: (-row["value"], row["sample_id"]))
    assert [row["rank"] for row in ordered] == list(range(1, len(ordered) + 1))


def test_one_run_has_the_values_of_its_own_table(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", shards=6)
    own, found = pq.read_table(path / "values.parquet"), tables_of(path)["values"]
    assert found["sample_id"].equals(own["sample_id"])
    assert found["times_seen"].equals(own["times_seen"])
    np.testing.assert_allclose(found["value"].to_numpy(), own["value"].to_numpy(), rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("columns", [ONE_COLUMN, SETS, PAIRS], ids=["one", "sets", "pairs"])
def test_chunks_of_any_size_give_the_same(tmp_path: Path, columns: tuple[Column, ...]) -> None:
    paths = [write_run(tmp_path / f"run {i}", i, columns=columns, shards=5) for i in range(2)]
    whole = tables_of(*paths)
    for most_rows in (1, 2, 7, 16, 40):
        found = tables_of(*paths, most_rows=most_rows)
        assert found.keys() == whole.keys()
        for name, table in found.items():
            assert_rows(table, whole[name].to_pylist(), *_KEYS[name])


_KEYS = {
    "values": ("sample_id",),
    "runs": ("run",),
    "domains": ("run", "domain"),
    "trajectories": ("run", "step", "domain"),
    "correlations": ("run_a", "run_b"),
    "columns": ("run", "part", "val", "domain"),
    "column_values": ("sample_id", "part", "val"),
}


def test_only_some_steps(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", shards=6)
    steps = (4, 9)
    found = tables_of(path, steps=steps)
    assert_rows(found["values"].drop_columns("rank"), without_ranks(plain_values([path], steps)), "sample_id")
    assert set(found["trajectories"]["step"].to_pylist()) <= set(range(4, 10))
    with pytest.raises(AnalysisError, match=r"no run has a finite score row in steps=\[1000,1001\]"):
        tables_of(path, steps=(1000, 1001))


def test_runs_and_domains(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", 3, dtype={"model": "float32", "autocast": "bfloat16"})
    rows, found = plain_rows(path), tables_of(path)
    total = sum(row["value"] for row in rows)
    run = {
        "run": "run", "directory": str(path), "run_id": None, "seed": 3, "model": "gpt2-tiny",
        "optimizer": "adamw", "dtype": "float32, autocast bfloat16", "engine": "graddotprod",
        "steps": len({row["step"] for row in rows}), "samples": len({row["id"] for row in rows}),
        "total": total,
    }  # fmt: skip
    assert_rows(found["runs"], [run], "run")
    expected = []
    totals = {d: sum(row["value"] for row in rows if row["domain"] == d) for d in {r["domain"] for r in rows}}
    for domain, value in totals.items():
        own: dict[str, float] = defaultdict(float)
        for row in rows:
            if row["domain"] == domain:
                own[row["id"]] += row["value"]
        expected.append(
            {
                "run": "run",
                "domain": domain,
                "samples": len(own),
                "times_seen": sum(row["domain"] == domain for row in rows),
                "total": value,
                "mean": value / len(own),
                "share": value / sum(map(abs, totals.values())),
                "negative": sum(v < 0 for v in own.values()) / len(own),
            }
        )
    assert_rows(found["domains"], expected, "domain")


@pytest.mark.parametrize("points", [1000, 12, 5, 2, 1])
def test_trajectories_with_at_most_so_many_points(tmp_path: Path, points: int) -> None:
    path = write_run(tmp_path / "run", shards=8)
    rows = plain_rows(path)
    steps = sorted({row["step"] for row in rows})
    assert len(steps) > 20
    width = next(2**k for k in range(20) if -(-len(steps) // 2**k) <= points)
    expected = []
    for step in [*steps[width - 1 :: width], *([steps[-1]] if len(steps) % width else [])]:
        for domain in {row["domain"] for row in rows}:
            own = [row for row in rows if row["domain"] == domain]
            total = sum(row["value"] for row in own if row["step"] <= step)
            mean = total / len({row["id"] for row in own})
            expected.append({"run": "run", "step": step, "domain": domain, "total": total, "mean": mean})
    for most_rows in (3, 1000):
        found = tables_of(path, points=points, most_rows=most_rows)["trajectories"]
        assert_rows(found, expected, "step", "domain")


@pytest.mark.parametrize("columns", [SETS, PAIRS], ids=["sets", "pairs"])
def test_columns_add_up_to_the_values(tmp_path: Path, columns: tuple[Column, ...]) -> None:
    paths = [write_run(tmp_path / f"run {i}", i, first_id=4 * i, columns=columns) for i in range(2)]
    plain = write_run(tmp_path / "plain", 5)
    found = tables_of(*paths, plain)
    by_sample: dict[Any, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    expected: dict[Any, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    domain_of = {}
    for path in paths:
        for row in plain_rows(path):
            domain_of[row["id"]] = row["domain"]
            for (part, val), value in row["columns"].items():
                by_sample[row["id"], part, val][path.name] += value
                expected[path.name, part, val, row["domain"]][row["id"]] += value
    right = [
        {
            "sample_id": name, "domain": domain_of[name], "part": part, "val": val,
            "value": sum(runs.values()) / len(runs),
        }
        for (name, part, val), runs in by_sample.items()
    ]  # fmt: skip
    assert_rows(found["column_values"], right, "sample_id", "part", "val")
    right = [
        {
            "run": run, "part": part, "val": val, "domain": domain, "samples": len(own),
            "total": sum(own.values()), "mean": sum(own.values()) / len(own),
        }
        for (run, part, val, domain), own in expected.items()
    ]  # fmt: skip
    assert_rows(found["columns"], right, "run", "part", "val", "domain")
    totals = found["columns"].group_by("run").aggregate([("total", "sum")]).to_pylist()
    of_run = {row["run"]: row["total"] for row in found["runs"].to_pylist()}
    assert all(row["total_sum"] == pytest.approx(of_run[row["run"]], rel=1e-9) for row in totals)


def test_rows_that_are_not_finite_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_run(tmp_path / "run")
    lost = sum(len(torch.load(p, weights_only=True)["step"]) for p in (path / "scores").glob("*.pt"))
    lost -= len(plain_rows(path))
    assert lost > 0
    tables_of(path, most_rows=5)
    assert f"run: {lost} score rows are not finite" in caplog.text


def test_a_run_without_any_row_of_these_steps_is_empty(tmp_path: Path) -> None:
    short, long = write_run(tmp_path / "short", 0, shards=1), write_run(tmp_path / "long", 1, shards=9)
    steps = (plain_rows(short)[-1]["step"] + 1, 1000)
    found = tables_of(short, long, steps=steps)
    assert found["runs"]["steps"].to_pylist()[0] == found["runs"]["samples"].to_pylist()[0] == 0
    assert set(found["domains"]["run"].to_pylist()) == {"long"}
    assert_rows(found["values"].drop_columns("rank"), without_ranks(plain_values([long], steps)), "sample_id")
    assert found["correlations"].select(["shared", "spearman"]).to_pylist() == [
        {"shared": 0, "spearman": None}
    ]


def test_without_shards_values_count_and_steps_are_null(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, bare = write_run(tmp_path / "whole", 0), write_run(tmp_path / "bare", 1)
    right = {row["sample_id"]: row for row in tables_of(whole, bare)["values"].to_pylist()}
    for file in (bare / "scores").iterdir():
        file.unlink()
    found = tables_of(bare)
    assert "bare has no score shards here" in caplog.text
    assert found["trajectories"].num_rows == 0
    assert found["runs"]["steps"].to_pylist() == [None]
    assert found["values"]["step_rank"].null_count == found["values"].num_rows
    both = tables_of(whole, bare)["values"].to_pylist()
    own = {row["sample_id"]: row for row in tables_of(whole)["values"].to_pylist()}
    for row in both:
        for name in ("value", "std", "low", "high", "run_rank", "positive", "times_seen", "runs"):
            assert row[name] == pytest.approx(right[row["sample_id"]][name])
        for name in ("step_rank", "step_std"):  # of the run with shards alone
            assert row[name] == own.get(row["sample_id"], {name: None})[name]
    with pytest.raises(AnalysisError, match=r"no score shards, so steps=\[1,2\] cannot be told apart"):
        tables_of(bare, steps=(1, 2))


def test_runs_without_values_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scored, regular = (
        write_run(tmp_path / "scored"),
        write_run(tmp_path / "plain", engine={"name": "regular"}),
    )
    (regular / "values.parquet").unlink()
    assert tables_of(scored, regular)["runs"]["run"].to_pylist() == ["scored"]
    assert "plain (engine=regular) is left out" in caplog.text
    with pytest.raises(AnalysisError, match="none of the 1 runs has values"):
        tables_of(regular)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    first, moved = write_run(tmp_path / "first", 0, 30), write_run(tmp_path / "moved", 1, 30)
    for name in ("samples.parquet", "values.parquet"):
        table = pq.read_table(moved / name)
        domains = pa.array(["x"] * table.num_rows)
        pq.write_table(table.set_column(table.column_names.index("domain"), "domain", domains), moved / name)
    with pytest.raises(AnalysisError, match=r"sample \d+ has domain '\w+' in run first and 'x' in run moved"):
        tables_of(first, moved)

    twice = write_run(tmp_path / "twice")
    table = pq.read_table(twice / "samples.parquet")
    same = pa.array(["same"] * table.num_rows)
    pq.write_table(table.set_column(1, "sample_id", same), twice / "samples.parquet")
    with pytest.raises(AnalysisError, match="two samples of the id 'same'"):
        tables_of(twice)

    shorter = write_run(tmp_path / "shorter", shards=4)
    (shorter / "scores" / "shard-00003.pt").unlink()
    with pytest.raises(AnalysisError, match="shards are missing"):
        tables_of(shorter)

    mixed = write_run(tmp_path / "mixed", shards=2)
    shards = [mixed / "scores" / f"shard-{i:05d}.pt" for i in range(2)]
    (first_shard, last_shard) = (path.read_bytes() for path in shards)
    shards[0].write_bytes(last_shard)
    shards[1].write_bytes(first_shard)
    with pytest.raises(AnalysisError, match=r"shard-00001\.pt has step \d+ after step \d+"):
        tables_of(mixed)


def test_learning_rates_of_their_own_make_no_columns(tmp_path: Path) -> None:
    groups = tuple(Column("total", group, "") for group in range(3))
    path = write_run(tmp_path / "run", columns=groups)
    found = tables_of(path)
    assert not {"columns", "column_values"} & set(found)
    assert_rows(found["values"].drop_columns("rank"), without_ranks(plain_values([path])), "sample_id")


def test_columns_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", columns=SETS)
    (path / "scores" / "shard-00000.json").unlink()
    with pytest.raises(AnalysisError, match=r"shard-00000\.pt has other columns than"):
        tables_of(path)
    pairs = write_run(tmp_path / "pairs", columns=PAIRS)
    samples = pq.read_table(pairs / "samples.parquet")
    pq.write_table(samples.slice(0, samples.num_rows - 2), pairs / "samples.parquet")
    with pytest.raises(AnalysisError, match="other validation samples than the 2"):
        tables_of(pairs)


def test_memory_does_not_grow_with_the_number_of_shards(make_run: MakeRun) -> None:
    def peak(name: str, copies: int) -> int:
        path = make_run(name, samples=60, steps=200, batch=40)
        shards = [load_run(path).shards()[i] for i in range(2)]
        tensors = [torch.load(shard, weights_only=True) for shard in shards]
        for number in range(2, 2 * copies):  # the same rows at later steps
            later = tensors[number % 2] | {"step": tensors[number % 2]["step"] + 200 * (number // 2)}
            torch.save(later, path / "scores" / f"shard-{number:05d}.pt")
        values = pq.read_table(path / "values.parquet")
        seen = pa.array(values["times_seen"].to_numpy() * copies)
        pq.write_table(values.set_column(3, "times_seen", seen), path / "values.parquet")
        tables_of(path, points=50, most_rows=2000)  # whatever is imported or made once
        tracemalloc.start()
        tables_of(path, points=50, most_rows=2000)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    few, many = peak("few", 2), peak("many", 12)
    assert many < few + 200_000  # the rows of the 20 shards more are 2 MB
