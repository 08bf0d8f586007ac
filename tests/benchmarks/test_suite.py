"""The suite finds its benchmarks, and its page is what they have found."""

import re
import sys
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.__main__ import chosen, command, set_aside
from benchmarks.common import machine
from benchmarks.registry import FOLDER, NEEDS, OWN, QUICK, Benchmark, benchmarks
from benchmarks.scaling import VALUES, Size, sizes

RECORD = {
    "name": "speed",
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {
        "cpu": "Some CPU", "threads": "2", "gpu": "none", "memory": "8 GiB", "torch": "2", "python": "3",
    },
    "rows": [
        {"b": 4, "ratio": {"median": 1.02, "low": 1.0, "high": 1.05, "pairs": 7}},
        {"b": 8, "note": "a | b"},
    ],
}  # fmt: skip


def test_every_module_that_measures_is_found() -> None:
    names = [benchmark.name for benchmark in benchmarks()]
    assert names == sorted(names)
    assert {"memory", "projection_pass", "runner_overhead", "scaling", "step_overhead", "store_search"} <= {
        *names
    }
    assert not OWN & {*names}
    assert {*QUICK, *NEEDS} <= {*names}
    assert all(benchmark.summary.endswith((".", "?")) for benchmark in benchmarks())


def test_a_new_module_needs_no_entry(tmp_path: Path) -> None:
    (tmp_path / "speed.py").write_text(
        '"""How fast.\n\nIt\nruns."""\n\n\ndef main() -> None:\n    """Run."""\n'
    )
    (tmp_path / "tools.py").write_text('"""Shared."""\n')
    assert benchmarks(tmp_path) == [Benchmark("speed", "How fast.", "It runs.")]


def test_all_are_chosen_but_those_that_need_arguments() -> None:
    known = benchmarks()
    assert {b.name for b in chosen([], known)} == {b.name for b in known} - {*NEEDS}
    assert [b.name for b in chosen(["scaling"], known)] == ["scaling"]
    with pytest.raises(SystemExit, match="no benchmark"):
        chosen(["speeed"], known)
    with pytest.raises(SystemExit, match="the folder of a store"):
        chosen(["retrieval"], known)


def test_a_first_look_leaves_results_alone(tmp_path: Path) -> None:
    result, look = tmp_path / "speed.json", tmp_path / "quick" / "speed.json"
    with set_aside(result, look):
        result.write_text("first")
    assert not result.exists()
    assert look.read_text() == "first"
    result.write_text("measured")
    with set_aside(result, look):
        result.write_text("second")
    assert (result.read_text(), look.read_text()) == ("measured", "second")
    with set_aside(result, look):
        pass  # it failed
    assert (result.read_text(), look.read_text()) == ("measured", "second")


def test_quick_runs_are_shorter() -> None:
    (scaling,) = chosen(["scaling"], benchmarks())
    assert command(scaling, quick=False) == [sys.executable, "-m", "benchmarks.scaling"]
    assert command(scaling, quick=True)[3:] == ["--rounds", "2", "--values", "2"]


def test_a_quick_run_passes_only_what_the_module_takes() -> None:
    for name, arguments in QUICK.items():
        source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        for flag in [argument for argument in arguments if argument.startswith("--")]:
            assert f'"{flag}"' in source, f"{name} {flag}"


def test_the_page_has_a_table_for_each_result() -> None:
    known = [Benchmark("slow", "How slow.", ""), Benchmark("speed", "How fast.", "In turns.")]
    text = page.page(known, {"speed": RECORD})
    assert "## slow\n\nHow slow.\n\nNot measured yet" in text
    assert "| b | ratio | note |\n| --- | --- | --- |\n" in text
    assert "| 4 | 1.020 [1.000, 1.050] |  |\n| 8 |  | a \\| b |" in text
    assert "*Some CPU, 2 threads, 8 GiB memory, no GPU, torch 2, Python 3; 2026-01-02.*\n\nIn turns." in text


def test_the_page_of_the_recorded_results_names_no_folder_of_a_machine() -> None:
    text = page.page(benchmarks(), page.read_records())
    assert not re.search(r"/(home|root|tmp|work|Users)\b", text)
    assert set(machine()) >= {"cpu", "threads", "memory", "gpu", "torch", "python"}


def test_scaling_varies_one_size_at_a_time() -> None:
    middle = Size()
    for size in sizes(4):
        assert sum(getattr(size, name) != getattr(middle, name) for name in VALUES) <= 1
    assert len(sizes(4)) == len(set(sizes(4))) == 13
