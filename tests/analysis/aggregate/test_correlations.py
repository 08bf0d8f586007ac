import numpy as np
import pytest
from scipy.stats import kendalltau, pearsonr, spearmanr

from analysis.aggregate.correlations import agreement, correlate, differing_keys
from analysis.aggregate.sample_totals import RunValues
from tests.analysis.synthetic import CONFIG


@pytest.mark.parametrize("decimals", [0, 12])
def test_against_scipy_on_the_samples_that_both_scored(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    runs = []
    for name in "abc":
        position = rng.permutation(50)[:35]
        runs.append(RunValues(name, position, rng.normal(size=35).round(decimals) * 1e-9))
    found = correlate(runs, [CONFIG | {"seed": i} for i in range(3)], 50).to_pylist()
    assert [(row["run_a"], row["run_b"]) for row in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    for row in found:
        a, b = (next(run for run in runs if run.name == row[key]) for key in ("run_a", "run_b"))
        shared = sorted(set(a.position.tolist()) & set(b.position.tolist()))
        x, y = (np.array([run.value[run.position.tolist().index(p)] for p in shared]) for run in (a, b))
        assert row["shared"] == len(shared)
        assert row["spearman"] == pytest.approx(spearmanr(x, y).statistic, rel=1e-12)
        assert row["kendall"] == pytest.approx(kendalltau(x, y).statistic, rel=1e-12)
        assert row["pearson"] == pytest.approx(pearsonr(x, y).statistic, rel=1e-12)
        assert row["same_sign"] == pytest.approx(np.mean(np.sign(x) == np.sign(y)))
        assert row["differ"] == "seed"


def test_what_is_not_defined_is_null() -> None:
    nothing = dict.fromkeys(("spearman", "kendall", "pearson", "same_sign"))
    assert agreement(np.zeros(0), np.zeros(0)) == nothing
    assert agreement(np.array([0.1, 0.1, 0.1]), np.array([1.0, -2.0, 3.0])) == nothing | {"same_sign": 2 / 3}
    apart = [RunValues("a", np.array([0]), np.ones(1)), RunValues("b", np.array([1]), np.ones(1))]
    assert correlate(apart, [CONFIG, CONFIG], 2)["shared"].to_pylist() == [0]
    assert correlate(apart[:1], [CONFIG], 2).num_rows == 0


def test_extreme_scales_do_not_matter() -> None:
    x = np.array([1.0, 2.0, 4.0])
    found = agreement(x * 1e-200, x * 1e200)
    assert [found[name] for name in ("spearman", "kendall", "pearson")] == pytest.approx([1, 1, 1])


def test_keys_that_differ() -> None:
    other = CONFIG | {"output_dir": "b", "tracking": {"uri": "x"}, "hardware": {"threads": 4}}
    assert differing_keys(CONFIG | {"output_dir": "a"}, other) == []
    other = CONFIG | {"seed": 1, "dtype": {"model": "bfloat16", "autocast": None}, "data": {"seed": 3}}
    assert differing_keys(CONFIG, other) == ["seed", "data.seed", "dtype.model"]
    larger = CONFIG | {"model": {"name": "gpt2", "path": "x"}, "optimizer": {"name": "adamw", "lr": 1e-4}}
    assert differing_keys(CONFIG, larger) == ["model.name", "optimizer.lr"]
