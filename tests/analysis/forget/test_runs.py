"""Runs without samples: scores, figures and reports, and what analysis reads of them afterwards."""

import html
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analysis.domains import domain_trajectories
from analysis.forget import folder
from analysis.forget.command import forget
from analysis.forget.verification import verify_gone
from analysis.plots import plot_run
from analysis.report import write_comparison_report, write_run_report
from analysis.runs import load_run
from ghost.values import accumulate
from tests.analysis.conftest import CONFIG, MakeRun


def shards(run: Path) -> dict[str, torch.Tensor]:
    """All rows of all shards."""
    parts = list(load_run(run).scores())
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("groups", [None, 3])
def test_rows_go_and_the_others_keep_theirs(make_run: MakeRun, groups: int | None) -> None:
    run = make_run(groups=groups)
    plot_run(run)
    before, values, samples = shards(run), load_run(run).values, load_run(run).samples
    gone = values["sample_id"].to_pylist()[3:6]
    forget([run], set(gone))
    numbers = samples.filter(pa.compute.is_in(samples["sample_id"], pa.array(gone)))["index"].to_pylist()
    keep = ~torch.isin(before["sample"], torch.tensor(numbers))
    assert 0 < int(keep.sum()) < len(keep)
    after = shards(run)
    for name, column in before.items():
        assert torch.equal(after[name], column[keep])
        assert after[name].dtype == column.dtype
    kept = pa.compute.invert(pa.compute.is_in(values["sample_id"], pa.array(gone)))
    assert load_run(run).values.equals(values.filter(kept))
    assert load_run(run).samples.num_rows == len(samples) - 3
    found = accumulate(load_run(run).scores())
    assert sorted(found.value.tolist()) == sorted(load_run(run).values["value"].to_pylist())
    domain_trajectories(load_run(run))
    assert verify_gone([run], set(gone)) == []
    assert len(list((run / "plots").iterdir())) == 4


def test_figures_and_reports_are_made_again(make_run: MakeRun) -> None:
    run = make_run()
    plot_run(run)
    figures = {path.name: path.read_bytes() for path in (run / "plots").iterdir()}
    page = write_run_report(load_run(run), run / "report.html", {})
    written = page.read_bytes()
    forget([run], {"nobody"})
    assert page.read_bytes() == written
    best = max(load_run(run).values.to_pylist(), key=lambda row: row["value"])
    assert best["sample_id"] in written.decode()
    forget([run], {best["sample_id"]})
    assert best["sample_id"] not in page.read_text()
    next_best = max(load_run(run).values.to_pylist(), key=lambda row: row["value"])
    assert next_best["sample_id"] in page.read_text()
    after = {path.name: path.read_bytes() for path in (run / "plots").iterdir()}
    assert after.keys() == figures.keys()
    assert after["top_bottom.png"] != figures["top_bottom.png"]


def test_only_reports_that_may_show_the_sample_are_deleted(
    make_aggregate: Callable[..., Path], make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    aggregate = make_aggregate(runs=2)
    (tmp_path / "elsewhere").mkdir()
    other = write_run_report(load_run(make_run("other", domains=("x",))), tmp_path / "other/report.html", {})
    inside = write_comparison_report(aggregate, aggregate / "report.html")
    above = write_comparison_report(aggregate, tmp_path / "cut short.html")
    apart = write_comparison_report(aggregate, tmp_path / "elsewhere/it.html")
    own = [aggregate / "notes.html", tmp_path / "index.html"]
    name = pq.read_table(aggregate / "values.parquet").sort_by("rank")["sample_id"][0].as_py()
    for page in own:
        page.write_text(f"<html><p>{html.escape(name)}")
    caplog.set_level(logging.INFO)
    forget([tmp_path], {name})
    assert [page.exists() for page in (inside, above, apart, other, *own)] == [False] * 3 + [True] * 3
    assert f"{inside} is deleted, since it may show the samples." in caplog.messages
    found = {finding.path for finding in verify_gone([tmp_path], {name})}
    assert found == {page.resolve() for page in own}


def test_a_run_can_lose_all_its_samples(make_run: MakeRun) -> None:
    run = make_run(samples=4, batch=4)
    plot_run(run)
    ids = set(load_run(run).samples["sample_id"].to_pylist())
    forget([run], ids)
    assert len(load_run(run).values) == len(shards(run)["sample"]) == 0
    assert [path.name for path in (run / "plots").iterdir()] == ["loss.png"]
    assert verify_gone([run], ids) == []


def test_rows_without_a_name_are_found(make_run: MakeRun) -> None:
    run = make_run()
    samples = pq.read_table(run / "samples.parquet")
    pq.write_table(samples[1:], run / "samples.parquet")
    assert any("which has no name" in finding.why for finding in verify_gone([run], {"nobody"}))


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with pairs of four training samples and five validation samples of two domains."""
    monkeypatch.setattr(folder, "plot_run", lambda _: [])
    run = tmp_path / "pairs"
    (run / "scores").mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    domains = ["a", "a", "a", "b", "b"]
    rows = {
        "index": range(9),
        "sample_id": [f"train/{i}" for i in range(4)] + [f"val/{i}" for i in range(5)],
        "domain": ["a"] * 4 + domains,
        "split": ["train"] * 4 + ["val"] * 5,
    }
    pq.write_table(pa.table(rows), run / "samples.parquet")
    score = torch.arange(12, dtype=torch.float64).view(6, 2)
    shard = {
        "step": torch.tensor([0, 0, 1, 1, 2, 2]),
        "sample": torch.tensor([0, 1, 2, 3, 0, 2]),
        "score": score,
        "lr": torch.ones_like(score),
        "clip": torch.ones(6, dtype=torch.float64),
        "val": torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3], [4, 0], [4, 0]]),
    }
    torch.save(shard, run / "scores/shard-00000.pt")
    columns = {"sample_id": rows["sample_id"][:4], "domain": ["a"] * 4}
    columns |= {f"val/{i}": np.arange(4.0) for i in range(5)}
    pq.write_table(pa.table(columns), run / "values_by_column.parquet")
    return run


# The domains take turns: val/0 of a, val/3 of b, val/1, val/4, val/2.
NUMBERS = {"val/0": 0, "val/3": 1, "val/1": 2, "val/4": 3, "val/2": 4}


def test_validation_samples_become_nobody_and_sums_stay(pairs: Path) -> None:
    before = shards(pairs)
    columns = pq.read_table(pairs / "values_by_column.parquet")
    gone: list[int] = []
    # One after the other: numbers must not shift once a sample is missing.
    for name in ("val/3", "val/0", "val/2"):
        forget([pairs], {name})
        gone.append(NUMBERS[name])
        after = shards(pairs)
        expected = before["val"].masked_fill(torch.isin(before["val"], torch.tensor(gone)), -1)
        assert torch.equal(after["val"], expected)
        for column in ("step", "sample", "score", "lr", "clip"):
            assert torch.equal(after[column], before[column])
        columns = columns.drop_columns([name])
        assert pq.read_table(pairs / "values_by_column.parquet").equals(columns)
        assert verify_gone([pairs], {name}) == []
    assert json.loads((pairs / "scores/validation.json").read_text()) == {"index": [4, 7, 5, 8, 6]}


def test_training_samples_go_from_pairs(pairs: Path) -> None:
    before = shards(pairs)
    forget([pairs], {"train/2"})
    after = shards(pairs)
    for name, column in before.items():
        assert torch.equal(after[name], column[before["sample"] != 2])
    assert not (pairs / "scores/validation.json").exists()
    assert verify_gone([pairs], {"train/2"}) == []


def test_a_pair_without_a_name_is_found(pairs: Path) -> None:
    forget([pairs], {"val/3"})
    samples = pq.read_table(pairs / "samples.parquet")
    pq.write_table(
        samples.filter(pa.compute.not_equal(samples["sample_id"], "val/0")), pairs / "samples.parquet"
    )
    assert any("has pairs in shard-00000.pt" in finding.why for finding in verify_gone([pairs], {"val/0"}))
