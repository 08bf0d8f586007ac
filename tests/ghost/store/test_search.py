"""Search against NumPy over all rows, and what it refuses."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghost.errors import GhostError, StoreError
from ghost.layout import Layout
from ghost.store import ProjectionStore
from ghost.store.search import Best, top
from tests.ghost.store.building import (
    FINGERPRINTS,
    LAYOUT,
    PROJECTION,
    built,
    rows_of,
    writer,
)

DTYPES = ("float32", "float16", "bfloat16", "int8")


def brute_force(rows: np.ndarray, queries: np.ndarray, metric: str, factors: np.ndarray) -> np.ndarray:
    """All scores `[q, N]` in float64."""
    rows, queries = rows.astype(np.float64), queries.astype(np.float64)
    scores = (queries * factors) @ rows.T
    if metric == "cosine":
        lengths = np.sqrt((rows**2) @ factors)
        scores /= np.where(lengths > 0, lengths, 1) * np.sqrt((queries**2) @ factors)[:, None]
    return scores


def column_factors(weights: dict[str, float]) -> np.ndarray:
    """`[K]`, for weights that name whole parameters."""
    factors = np.ones(LAYOUT.width)
    for part in LAYOUT.slices:
        factors[part.columns] = weights.get(part.parameter, 1.0)
    return factors


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_is_numpys_answer(data: st.DataObject) -> None:
    """Over sizes, formats, filters, weights, deletions and blocks.

    Rows are small whole numbers, so that there are many ties.
    """
    seed = data.draw(st.integers(0, 2**16))
    random = np.random.default_rng(seed)
    n, q = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from(DTYPES))
    metric = data.draw(st.sampled_from(["cosine", "inner_product"]))
    rows = random.integers(-2, 3, (n, LAYOUT.width)).astype(np.float32)
    rows[:, 0] = 127 / 64  # what int8 scales by, so that it is exact too
    queries = random.integers(-2, 3, (q, LAYOUT.width)).astype(np.float32)
    queries[:, 1] = 1
    ids = random.integers(0, 2 * n, n)
    weights = data.draw(
        st.dictionaries(st.sampled_from(LAYOUT.parameters[:2]), st.sampled_from([0.0, 0.5, 2.0]))
    )
    deleted = data.draw(st.lists(st.sampled_from(sorted(set(ids.tolist()))), unique=True))
    kept = ~np.isin(ids, deleted)
    some = data.draw(st.none() | st.lists(st.sampled_from(sorted(set(ids.tolist()))), unique=True))
    searched = kept if some is None else kept & np.isin(ids, some)
    with TemporaryDirectory() as folder:
        with writer(Path(folder), dtype=dtype, batches_per_shard=1) as building:
            for part in np.array_split(np.arange(n), data.draw(st.integers(1, 4))):
                building.append(torch.from_numpy(ids[part]), torch.from_numpy(rows[part]))
        store = ProjectionStore.open(folder)
        store.delete(deleted)
        if data.draw(st.booleans()):
            store.compact()
        if not searched.any():
            return
        k = data.draw(st.integers(1, int(searched.sum())))
        found, scores = store.search(
            queries, k, metric, weights, None if some is None else np.setdiff1d(some, deleted),
            block_rows=data.draw(st.none() | st.integers(1, n + 1)),
        )  # fmt: skip
        stored = np.zeros_like(rows)
        stored[kept] = np.asarray(store.matrix())
    np.testing.assert_allclose(stored[kept], rows[kept], rtol=1e-2)
    expected = brute_force(stored, queries, metric, column_factors(weights))
    expected[:, ~searched] = -np.inf
    best = -np.sort(-expected, axis=1)[:, :k]
    np.testing.assert_allclose(scores, best, rtol=1e-5, atol=1e-5)
    for one, scored, of_query in zip(found, scores, expected, strict=True):
        # Scores that agree to rounding may be in any order; everything else is where NumPy has it.
        for sample, score in zip(one, scored, strict=True):
            assert np.isclose(of_query[(ids == sample) & searched], score, rtol=1e-5, atol=1e-5).any()


@pytest.mark.parametrize("block_rows", [None, 1, 7, 1000])
@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_a_row_finds_itself_and_equals_come_in_stored_order(
    tmp_path: Path, metric: str, block_rows: int | None
) -> None:
    rows = torch.eye(LAYOUT.width).repeat(3, 1)  # every row three times
    with writer(tmp_path, batches_per_shard=1) as building:
        for part in range(0, len(rows), 8):
            building.append(torch.arange(part, min(part + 8, len(rows))), rows[part : part + 8])
    store = ProjectionStore.open(tmp_path)
    found, scores = store.search(torch.eye(LAYOUT.width), 4, metric, block_rows=block_rows)
    own = torch.arange(LAYOUT.width)
    assert torch.equal(found[:, :3], torch.stack([own, own + LAYOUT.width, own + 2 * LAYOUT.width], 1))
    assert torch.equal(scores, torch.tensor([1.0, 1, 1, 0]).expand(len(own), -1))
    first_other = torch.where(own == 0, 1, 0)
    assert torch.equal(found[:, 3], first_other)


def test_arrays_give_arrays_and_tensors_tensors(tmp_path: Path) -> None:
    store = built(tmp_path)
    _, rows = rows_of()
    ids, scores = store.search(rows[:2].numpy(), 3)
    assert isinstance(ids, np.ndarray)
    assert isinstance(scores, np.ndarray)
    assert (ids.dtype, scores.dtype) == (np.int64, np.float32)
    ids_of_tensor, scores_of_tensor = store.search(rows[:2].double().requires_grad_(), 3)
    assert ids_of_tensor.dtype == torch.int64
    assert scores_of_tensor.dtype == torch.float32
    np.testing.assert_array_equal(ids_of_tensor, ids)
    np.testing.assert_array_equal(scores_of_tensor, scores)


def test_tiny_and_huge_rows_and_queries_neither_vanish_nor_overflow(tmp_path: Path) -> None:
    _, rows = rows_of()
    sizes = torch.logspace(-30, 30, len(rows))[:, None]
    with writer(tmp_path) as building:
        building.append(torch.arange(len(rows)), rows * sizes)
    store = ProjectionStore.open(tmp_path)
    expected = brute_force(rows.numpy(), rows.numpy(), "cosine", np.ones(LAYOUT.width))
    for size in (1e-300, 1e-30, 1.0, 1e30, 1e300):
        found, scores = store.search(rows.double() * size, len(rows))
        np.testing.assert_allclose(np.take_along_axis(expected, found.numpy(), 1), scores, atol=1e-6)
        np.testing.assert_array_equal(found[:, 0], np.arange(len(rows)))


def test_a_row_of_zeros_has_cosine_zero(tmp_path: Path) -> None:
    with writer(tmp_path) as building:
        building.append([1, 2], torch.stack([-torch.ones(LAYOUT.width), torch.zeros(LAYOUT.width)]))
    found, scores = ProjectionStore.open(tmp_path).search(torch.ones(1, LAYOUT.width), 2)
    assert found.tolist() == [[2, 1]]
    torch.testing.assert_close(scores, torch.tensor([[0.0, -1.0]]))


def test_weights_by_pattern_and_the_last_match_counts(tmp_path: Path) -> None:
    store = built(tmp_path)
    _, rows = rows_of()
    for weights, alike in [
        ({"h.0.attn": 3.0}, {"h.0.attn.weight": 3.0, "h.0.attn.bias": 3.0}),
        ({"*": 0.0, "*.mlp": 1.0}, {"h.0.attn.weight": 0.0, "h.0.attn.bias": 0.0}),
        ({"re:.*bias": 0.5}, {"h.0.attn.bias": 0.5}),
    ]:
        found, scores = store.search(rows[:3], 5, weights=weights)
        expected, expected_scores = store.search(rows[:3], 5, weights=alike)
        assert torch.equal(found, expected)
        assert torch.equal(scores, expected_scores)
    assert not torch.equal(store.search(rows[:3], 5)[1], scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": torch.ones(LAYOUT.width)}, r"floating-point rows \[q, 21\]"),
        ({"queries": torch.ones(0, LAYOUT.width)}, "one or more floating-point rows"),
        ({"queries": torch.ones(1, 4)}, r"floating-point rows \[q, 21\]"),
        ({"queries": torch.ones(1, LAYOUT.width, dtype=torch.int64)}, "floating-point rows"),
        ({"queries": torch.full((2, LAYOUT.width), torch.nan)}, "query 0 is not finite"),
        ({"queries": torch.eye(2, LAYOUT.width) - torch.eye(1, LAYOUT.width)}, "query 0 is zero"),
        ({"weights": {"*": 0.0}}, "query 0 is zero in all columns that count"),
        ({"weights": {"h.7": 1.0}}, "'h.7' matches none of the 3 parameters"),
        ({"weights": {"*": -1.0}}, "factor -1.0: it should be 0 or positive"),
        ({"weights": {"*": float("nan")}}, "factor nan"),
        ({"weights": {"h.0.attn.head[1]": 1.0}}, "names heads"),
        ({"weights": {"h.0.*": "2"}}, "factor '2'"),
        ({"k": 2.5}, "k is 2.5: it should be between 1 and 31"),
        ({"k": 0}, "k is 0: it should be between 1 and 31"),
        ({"k": 33}, "k is 33: it should be between 1 and 31"),
        ({"sample_ids": []}, "there are no rows to search"),
        ({"sample_ids": "100"}, "sample_ids are '100': they should be several whole numbers"),
        ({"sample_ids": [100.7]}, "sample_ids are"),
        ({"sample_ids": 100}, "sample_ids are 100"),
        ({"sample_ids": np.ones(31, bool)}, "sample_ids are array"),
        ({"k": 2, "sample_ids": [100]}, "k is 2: it should be between 1 and 1"),
        ({"sample_ids": [100, -1]}, "no samples -1: "),
        ({"metric": "l2"}, "metric is 'l2': it should be one of cosine, inner_product"),
        ({"block_rows": 0}, "block_rows is 0"),
    ],
)
def test_refuses(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    store = built(tmp_path)
    with pytest.raises(GhostError, match=message):
        store.search(**({"queries": torch.ones(2, LAYOUT.width), "k": 1} | arguments))


def test_queries_must_be_made_as_the_rows_were(tmp_path: Path) -> None:
    store = built(tmp_path)
    store.check_matches(LAYOUT, PROJECTION, {"model": FINGERPRINTS["model"]})
    store.check_matches(store.layout, store.projection, {})
    for layout, projection, fingerprints, message in [
        (LAYOUT, {**PROJECTION, "seed": 1}, {}, "projection.seed is 0 there and 1 here"),
        (LAYOUT, PROJECTION, {"model": "zz"}, "fingerprints.model is 'a1' there and 'zz' here"),
        (LAYOUT, PROJECTION, {"optimizer": "zz"}, "fingerprints.optimizer is only here"),
        (Layout(LAYOUT.slices[:2]), PROJECTION, {}, "layout has 3 entries there and 2 here"),
        (
            Layout.of([(name, (10, 12), (3, 4)) for name in LAYOUT.parameters]), PROJECTION, {},
            r"layout\[1\].stop is 15 there and 24 here",
        ),
    ]:  # fmt: skip
        with pytest.raises(StoreError, match=message):
            store.check_matches(layout, projection, fingerprints)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 30), st.integers(1, 9))
def test_blocks_merge_into_a_stable_sort(seed: int, k: int, n: int, block: int) -> None:
    """Few different scores, so that most of the order is a matter of ties."""
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (3, n))).float()
    best = Best(3, k)
    for start in range(0, n, block):
        best.offer(scores[:, start : start + block], torch.arange(start, min(start + block, n)))
    expected = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(best.numbers[:, :n], expected)
    assert torch.equal(best.scores[:, :n], scores.gather(1, expected))
    assert torch.equal(top(scores, min(k, n))[1], expected)
