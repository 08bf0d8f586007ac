from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analysis.domains import domain_trajectories
from analysis.errors import AnalysisError
from analysis.runs import load_run

MakeRun = Callable[..., Path]


def domain_means(path: Path) -> dict[str, float]:
    table = load_run(path).values.group_by("domain").aggregate([("value", "mean")])
    return dict(zip(table["domain"].to_pylist(), table["value_mean"].to_pylist(), strict=True))


@pytest.mark.parametrize("groups", [None, 2])
def test_curves_end_at_the_domain_means(make_run: MakeRun, groups: int | None) -> None:
    path = make_run(groups=groups)
    found = domain_trajectories(load_run(path))
    assert found.steps.tolist() == list(range(1, 13))
    assert found.domains == ["code", "docs", "legal"]
    np.testing.assert_allclose(
        found.means[-1], [domain_means(path)[name] for name in found.domains], rtol=1e-6
    )


def test_against_sums_by_hand(make_run: MakeRun) -> None:
    path = make_run(samples=3, steps=1, batch=3, domains=("a", "b"))
    table = {"index": [0, 4, 7], "sample_id": ["x", "y", "z"], "domain": ["b", "a", "unscored"]}
    pq.write_table(pa.table(table), path / "samples.parquet")
    shard = {
        "step": torch.tensor([9, 9, 3, 9]),  # steps in any order
        "sample": torch.tensor([0, 4, 4, 0]),
        "score": torch.tensor([1.0, 2.0, 10.0, float("nan")]),
        "lr": torch.tensor([0.5, 0.5, 0.1, 0.5]),
        "clip": torch.tensor([1.0, 0.5, 1.0, 1.0]),
    }
    torch.save(shard, path / "scores" / "shard-00000.pt")
    found = domain_trajectories(load_run(path))
    assert found.steps.tolist() == [3, 9]
    assert found.domains == ["a", "b"]
    np.testing.assert_allclose(found.means, [[1.0, 0.0], [1.5, 0.5]], rtol=1e-6)


def test_score_of_an_unknown_sample_is_an_error(make_run: MakeRun) -> None:
    path = make_run()
    table = load_run(path).samples
    pq.write_table(table.slice(0, table.num_rows - 1), path / "samples.parquet")
    with pytest.raises(AnalysisError, match=r"samples\.parquet lacks a sample"):
        domain_trajectories(load_run(path))
