"""The report of several runs, from an aggregate's folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.errors import AnalysisError
from analysis.report import write_comparison_report
from tests.analysis.report.test_run import Outline

MakeAggregate = Callable[..., Path]

TITLES = [
    "Runs", "How far runs agree", "Samples that stand out", "Domains", "Losses", "What the numbers mean",
    "What this does not say",
]  # fmt: skip
HELD_OUT = {"final_loss": {"difference": -0.25, "low": -0.5, "high": -0.125},
            "best_loss": {"difference": 0.0625, "low": None, "high": None}}  # fmt: skip
COMPARISON: dict[str, Any] = {
    "metric": "test/loss",
    "target_loss": 4.5,
    "target_rule": "the largest of the best losses of everything's runs",
    "unit": "steps",
    "confidence": 0.95,
    "groups": [
        {"name": "everything", "runs": [
            {"run": "a0", "seed": 0, "steps_to_target": 1040.26, "last_step": 1200, "final_loss": 4.25},
            {"run": "a1", "seed": 1, "steps_to_target": None, "last_step": 1200, "final_loss": 4.75}]},
        {"name": "<i>kept</i>", "runs": [
            {"run": "b0", "seed": 0, "steps_to_target": 30, "last_step": 1200, "final_loss": 4.0}]},
    ],
    "contrasts": [
        {"group": "<i>kept</i>", "against": "everything", "ratio": 0.75, "low": 0.5, "high": 0.875,
         "at_least": None, "at_most": None, "pairs": 1, "reading": "kept is clearly better",
         "note": "one seed"} | HELD_OUT,
        {"group": "none", "against": "everything", "ratio": None, "low": None, "high": None, "pairs": 0,
         "at_least": 1.375, "at_most": None, "reading": "none is not known",
         "note": "never reached"} | HELD_OUT,
    ],
    "notes": ["the runs also differ in trainer.warmup_steps"],
}  # fmt: skip


def report(folder: Path, comparison: Path | None = None) -> Outline:
    return Outline(write_comparison_report(folder, folder.parent / "report.html", comparison))


def test_a_whole_aggregate_has_every_section(make_aggregate: MakeAggregate) -> None:
    folder = make_aggregate(runs=3)
    found = report(folder)
    assert found.titles == TITLES
    assert "3 runs beside each other" in found.text
    values = pq.read_table(folder / "values.parquet").sort_by("rank").to_pylist()
    assert all(row["sample_id"] in found.text for row in [*values[:12], *values[-12:]])
    assert f"{1e3 * values[0]['value']:+.3f}" in found.text
    assert f"{1e3 * values[0]['std']:.3f}" in found.text
    for pair in pq.read_table(folder / "correlations.parquet").to_pylist():
        assert f"{pair['spearman']:+.2f}".replace("-", "−") in found.text
    assert all(f"seed{seed}" in found.text for seed in range(3))


def test_nothing_is_loaded_and_no_id_is_there_twice(make_aggregate: MakeAggregate) -> None:
    found = report(make_aggregate(runs=3, columns=True))
    assert "Values by part" in found.titles
    assert found.tags.count("svg") == 7
    assert all(reference.startswith(("#", "data:,")) for reference in found.references)
    assert len(set(found.ids)) == len(found.ids)


@pytest.mark.parametrize("runs", [1, 2, 20])
def test_any_number_of_runs(make_aggregate: MakeAggregate, runs: int) -> None:
    found = report(make_aggregate(runs=runs, steps=4))
    assert found.titles == TITLES
    assert ("No two runs scored the same samples" in found.text) == (runs == 1)


def test_many_samples_are_counted_in_cells(make_aggregate: MakeAggregate) -> None:
    folder = make_aggregate(runs=2, samples=4000, steps=8, batch=2000)
    report(folder)
    assert (folder.parent / "report.html").stat().st_size < 1_000_000


def test_runs_whose_directories_are_gone_leave_their_tables(make_aggregate: MakeAggregate) -> None:
    folder = make_aggregate(runs=2)
    for row in pq.read_table(folder / "runs.parquet").to_pylist():
        shutil.rmtree(row["directory"])
    found = report(folder)
    assert found.titles == TITLES
    assert "The ranks of two runs are not drawn" in found.text
    assert "no longer there" in found.text


def test_ranks_are_of_the_values_that_were_aggregated(make_aggregate: MakeAggregate) -> None:
    folder = make_aggregate(runs=2)
    assert "not drawn" not in report(folder).text
    run = Path(pq.read_table(folder / "runs.parquet")["directory"][1].as_py())
    values = pq.read_table(run / "values.parquet")
    pq.write_table(values[1:], run / "values.parquet")
    said = "The ranks of two runs are not drawn: run seed1 has other values now"
    assert said in report(folder).text


def test_one_run_without_losses_is_counted(make_aggregate: MakeAggregate) -> None:
    folder = make_aggregate(runs=3)
    (Path(pq.read_table(folder / "runs.parquet").to_pylist()[0]["directory"]) / "metrics.jsonl").unlink()
    assert "1 of 3 runs are left out" in report(folder).text


def test_groups_are_shown_where_they_were_compared(make_aggregate: MakeAggregate) -> None:
    folder = make_aggregate(runs=2)
    (folder / "comparison.json").write_text(json.dumps(COMPARISON))
    found = report(folder)
    assert found.titles[0] == "Groups of runs"
    for said in (
        "steps that their runs take to a test loss of 4.5000 nats",
        "the largest of the best losses of everything's runs",
        "0.75",
        "0.5 to 0.875",
        "> 1.38",
        "−0.2500",
        "−0.5000 to −0.1250",
        "+0.0625",
        "Kept is clearly better.",
        "The runs also differ in trainer.warmup_steps.",
        "1 040.3",
        "not in 1 200",
        "never reached",
        "<i>kept</i>",
        "4.5000",
        "4.7500",
    ):
        assert said in found.text, said
    assert "i" not in {tag for tag, _ in found.headings}


def test_groups_of_other_batches_are_compared_by_samples(make_aggregate: MakeAggregate) -> None:
    folder = make_aggregate(runs=2)
    changed = COMPARISON | {"unit": "samples", "metric": "val/loss"}
    (folder / "comparison.json").write_text(json.dumps(changed))
    text = report(folder).text
    assert "training samples that their runs take to a validation loss of" in text
    assert "Ratio of the training samples to the target loss" in text
    assert "Training samples to the target loss, against each other" in text


def test_a_comparison_elsewhere_can_be_named(make_aggregate: MakeAggregate, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.json"
    path.write_text(json.dumps(COMPARISON))
    assert "Groups of runs" in report(make_aggregate(runs=2), path).titles


@pytest.mark.parametrize("content", ["{", "{}", json.dumps(COMPARISON | {"groups": None})])
def test_a_damaged_comparison_is_named(make_aggregate: MakeAggregate, content: str) -> None:
    folder = make_aggregate(runs=2)
    (folder / "comparison.json").write_text(content)
    with pytest.raises(AnalysisError, match=r"comparison\.json is damaged"):
        report(folder)


def test_a_folder_without_an_aggregate_is_named(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="holds no aggregate"):
        write_comparison_report(tmp_path, tmp_path / "report.html")


def test_a_table_of_other_columns_is_named(make_aggregate: MakeAggregate) -> None:
    folder = make_aggregate(runs=2)
    pq.write_table(pa.table({"run": ["a"]}), folder / "domains.parquet")
    with pytest.raises(AnalysisError, match=r"domains\.parquet has no column 'domain'"):
        report(folder)
    (folder / "domains.parquet").write_bytes(b"PAR1")
    with pytest.raises(AnalysisError, match=r"domains\.parquet is damaged"):
        report(folder)
    assert not (folder.parent / "report.html").exists()
