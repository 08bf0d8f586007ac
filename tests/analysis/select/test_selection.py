"""Which samples a rule keeps, on tables small enough to read."""

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from omegaconf import OmegaConf

from analysis.errors import AnalysisError
from analysis.select.rules import RuleConfig, Side, check_rule, described
from analysis.select.selection import (
    METADATA,
    Parted,
    list_of,
    random_samples,
    random_samples_per_domain,
    select,
)
from conf.errors import ConfigError

NAN = float("nan")
NOBODY = pa.table({"sample_id": pa.array([], pa.string()), "domain": pa.array([], pa.string())})
NEUTRAL = {
    "by": "value", "threshold": None, "quantile": None, "k": None, "negative_share": None,
    "per_domain": False, "unscored": "keep",
}  # fmt: skip


def rule(method: str, **keys: Any) -> Any:
    return OmegaConf.merge(OmegaConf.structured(RuleConfig), NEUTRAL | {"method": method} | keys)


def table(values: list[float | None], domains: str | None = None, **columns: list[Any]) -> pa.Table:
    """Samples a, b, c, … with these values."""
    ids = [chr(97 + i) for i in range(len(values))]
    named = {
        "sample_id": ids,
        "domain": list(domains or "x" * len(ids)),
        "value": pa.array(values, pa.float64()),
    }
    return pa.table(named | columns)


def kept(values: pa.Table, method: str, never: pa.Table = NOBODY, **keys: Any) -> str:
    return "".join(
        sorted(select(values, rule(method, **keys), never).part(Side.keep)["sample_id"].to_pylist())
    )


# ---------------------------------------------------------------- the rules


def test_a_threshold_keeps_what_reaches_it() -> None:
    assert kept(table([1, 0, -1, 0.5]), "threshold", threshold=0) == "abd"
    assert kept(table([1, 0, -1, 0.5]), "threshold", threshold=0.5) == "ad"


@pytest.mark.parametrize(
    ("quantile", "dropped"), [(0.1, 1), (0.19, 1), (0.2, 2), (0.29, 2), (0.3, 3), (0.7, 7), (0.99, 9)]
)
def test_a_quantile_drops_the_floor_of_its_share(quantile: float, dropped: int) -> None:
    found = kept(table([float(i) for i in range(10)]), "quantile", quantile=quantile)
    assert found == "abcdefghij"[dropped:]


def test_a_share_counts_as_it_is_typed_and_not_as_its_nearest_float() -> None:
    assert math.floor(0.29 * 100) == 28  # what the float would give
    values = pa.table(
        {"sample_id": [f"{i:03}" for i in range(100)], "domain": ["x"] * 100, "value": np.arange(100.0)}
    )
    assert (~select(values, rule("quantile", quantile=0.29), NOBODY).kept).sum() == 29


def test_of_equal_values_the_first_id_is_the_higher_one() -> None:
    equal = table([0.0, 0.0, 0.0, 0.0])
    assert kept(equal, "quantile", quantile=0.25) == "abc"
    assert kept(equal, "top_k", k=1) == "a"
    shuffled = equal.take([2, 0, 3, 1])
    assert kept(shuffled, "quantile", quantile=0.25) == "abc"
    assert kept(shuffled, "top_k", k=3) == "abc"


def test_rules_count_within_each_domain() -> None:
    values = table([9, 8, 7, 6, 3, 2, 1], "xxxxyyy")
    assert kept(values, "quantile", quantile=0.3) == "abcde"
    assert kept(values, "quantile", quantile=0.34, per_domain=True) == "abcef"  # floor(1.36) and floor(1.02)
    assert kept(values, "top_k", k=2) == "ab"
    assert kept(values, "top_k", k=2, per_domain=True) == "abef"
    assert kept(values, "top_k", k=3, per_domain=True) == "abcefg"  # a domain of three stays whole


def test_ranks_can_be_compared_instead_of_values() -> None:
    values = table([1, 2, 3], run_rank=[0.9, 0.5, 0.1])
    assert kept(values, "top_k", k=1, by="run_rank") == "a"
    with pytest.raises(AnalysisError, match="has no column step_rank"):
        kept(values, "top_k", k=1, by="step_rank")


def test_a_sign_is_dropped_where_enough_runs_agree_on_it() -> None:
    # Shares of negative runs: 1, 2/3, 1/3, none; a sample of one run says nothing; zeros are no sign.
    values = table(
        [-1, -1, 1, 1, -1, 0],
        runs=[3, 3, 3, 3, 1, 3],
        positive=[0, 1 / 3, 2 / 3, 1, 0, 0],
        sign_stability=[1, 2 / 3, 2 / 3, 1, 1, 0],
    )
    assert kept(values, "sign", negative_share=1.0) == "bcdef"
    assert kept(values, "sign", negative_share=2 / 3) == "cdef"
    assert kept(values, "sign", negative_share=1.0, unscored="drop") == "bcdf"
    rounded = np.nextafter(2 / 3, 1)  # the same share, summed in another order
    agreed = table([1, -1], runs=[3, 3], positive=[2 / 3, 0], sign_stability=[rounded, 1])
    assert kept(agreed, "sign", negative_share=0.6) == "a"
    with pytest.raises(AnalysisError, match="has no column runs"):
        kept(table([1, -1]), "sign", negative_share=1.0)


# ---------------------------------------------------------------- samples without a value


def test_samples_without_a_finite_value_take_no_part_and_go_where_the_rule_says() -> None:
    values = table([3, NAN, 1, -math.inf, 2, None])
    assert kept(values, "quantile", quantile=0.4) == "abdef"  # floor(0.4 * 3) of three, not of six
    assert kept(values, "quantile", quantile=0.4, unscored="drop") == "ae"
    assert kept(values, "threshold", threshold=1.5) == "abdef"
    assert kept(values, "top_k", k=1) == "abdf"


def test_samples_that_were_never_scored_go_with_them() -> None:
    never = pa.table({"sample_id": ["y", "z"], "domain": ["x", "w"]})
    assert kept(table([1, 0]), "top_k", never, k=1) == "ayz"
    parted = select(table([1, 0]), rule("top_k", k=1, unscored="drop"), never)
    assert parted.part(Side.drop).to_pylist() == [
        {"sample_id": "b", "domain": "x", "value": 0.0},
        {"sample_id": "y", "domain": "x", "value": None},
        {"sample_id": "z", "domain": "w", "value": None},
    ]
    assert parted.unscored.tolist() == [False, False, True, True]


def test_the_two_lists_part_the_samples() -> None:
    generator = np.random.default_rng(0)
    values = table([*generator.normal(size=20), NAN, NAN], "xy" * 11)
    for one in (rule("quantile", quantile=0.3, per_domain=True), rule("threshold", threshold=0.0)):
        parted = select(values, one, NOBODY)
        sides = [set(parted.part(side)["sample_id"].to_pylist()) for side in Side]
        assert sides[0] | sides[1] == set(values["sample_id"].to_pylist())
        assert not sides[0] & sides[1]


def test_a_rule_that_parts_nothing_is_refused() -> None:
    with pytest.raises(AnalysisError, match=r"quantile=0\.1 by=value unscored=keep drops none of 3 samples"):
        kept(table([1, 2, 3]), "quantile", quantile=0.1)
    with pytest.raises(AnalysisError, match="keeps none of 3 samples"):
        kept(table([1, 2, 3]), "threshold", threshold=4)
    with pytest.raises(AnalysisError, match="has a sample twice"):
        kept(pa.concat_tables([table([1, 2])] * 2), "top_k", k=1)


def test_a_list_says_how_it_was_made_and_nothing_of_when() -> None:
    parted: Parted = select(table([2, 1]), rule("top_k", k=1), NOBODY)
    made = list_of(parted, Side.drop, rule("top_k", k=1), "here")
    assert json.loads(made.schema.metadata[METADATA]) == {
        "list": "drop", "rule": "method=top_k k=1 by=value unscored=keep", "source": "here",
        "kept": 1, "dropped": 1, "unscored": 0,
    }  # fmt: skip


# ---------------------------------------------------------------- the keys


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"method": "quantile"},
            "quantile=null does not say the share of samples that is dropped: type quantile=0.1",
        ),
        ({"method": "quantile", "quantile": 1.0}, "quantile=1.0 is no share between 0 and 1"),
        (
            {"method": "quantile", "quantile": 0.1, "k": 3},
            "k=3 has no effect with method=quantile: type k=null",
        ),
        ({"method": "top_k", "k": 0}, "k=0 keeps nothing"),
        ({"method": "threshold", "threshold": NAN}, "threshold=nan does not say"),
        ({"method": "threshold", "threshold": 0, "per_domain": True}, "per_domain=true has no effect"),
        ({"method": "sign", "negative_share": 0.5}, "negative_share=0.5 is not above 0.5"),
        (
            {"method": "sign", "negative_share": 1.0, "by": "run_rank"},
            "by=run_rank has no effect with method=sign",
        ),
    ],
)
def test_keys_that_cannot_work_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_rule(rule(**keys))
    assert str(refused.value).startswith(said)
    with pytest.raises(ConfigError) as refused:
        check_rule(OmegaConf.create({"here": {"rule": rule(**keys)}}), "here.rule.")
    assert str(refused.value).startswith(f"here.rule.{said.split('=')[0]}=")


def test_a_rule_is_described_as_it_is_typed() -> None:
    assert described(rule("sign", negative_share=1.0)) == "method=sign negative_share=1.0 unscored=keep"
    assert described(rule("quantile", quantile=0.2, per_domain=True, by="run_rank")) == (
        "method=quantile quantile=0.2 by=run_rank per_domain=true unscored=keep"
    )


def test_random_controls_match_the_dropped_ones_in_number_per_domain() -> None:
    samples = table([float(i) for i in range(24)], "xxxxxxyy" * 3)
    dropped = samples.take([0, 1, 2, 6, 7])
    drawn = {seed: random_samples_per_domain(samples, dropped, (seed, 0)) for seed in range(40)}
    for one in drawn.values():
        ids = one["sample_id"].to_pylist()
        assert len(set(ids)) == len(ids) == 5
        assert sorted(one["domain"].to_pylist()) == list("xxxyy")
    again = random_samples_per_domain(samples.take(list(range(24))[::-1]), dropped, (3, 0))
    assert sorted(again["sample_id"].to_pylist()) == sorted(drawn[3]["sample_id"].to_pylist())
    # Each of 18 and of 6 samples is as likely as any other.
    often = np.zeros(24)
    for one in drawn.values():
        often[[ord(name) - 97 for name in one["sample_id"].to_pylist()]] += 1
    assert often.min() > 0
    assert set(random_samples_per_domain(samples, dropped, (3, 1))["sample_id"].to_pylist()) != set(
        again["sample_id"].to_pylist()
    )


def test_random_controls_match_the_dropped_ones_in_number() -> None:
    samples = table([float(i) for i in range(24)], "xxxxxxyy" * 3)
    dropped = samples.take([0, 1, 2, 6, 7])
    drawn = [random_samples(samples, dropped, (seed, 0))["sample_id"].to_pylist() for seed in range(40)]
    assert all(len(set(ids)) == len(ids) == 5 for ids in drawn)
    assert len({"".join(sorted(ids)) for ids in drawn}) > 30
    assert {name for ids in drawn for name in ids} == set(samples["sample_id"].to_pylist())
    shuffled = samples.take(list(range(24))[::-1])
    assert set(random_samples(shuffled, dropped, (3, 0))["sample_id"].to_pylist()) == set(drawn[3])
