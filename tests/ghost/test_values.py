"""Values are learning rate times clipping times score, summed over the steps."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghost.scores import Column, ScoreLog, save_atomically
from ghost.values import accumulate, accumulate_columns, column_values, read_shards, row_values


def shard(sample: list[int], score: list[float], lr: float = 0.1, clip: float = 1.0) -> dict[str, Tensor]:
    n = len(sample)
    return {
        "step": torch.zeros(n, dtype=torch.int64),
        "sample": torch.tensor(sample, dtype=torch.int64),
        "score": torch.tensor(score),
        "lr": torch.full((n,), lr, dtype=torch.float64),
        "clip": torch.full((n,), clip, dtype=torch.float64),
    }


@pytest.mark.parametrize("wide", [False, True])
def test_curvature_takes_off_half_the_square(wide: bool) -> None:
    rows = shard([0, 1], [2.0, -4.0], lr=0.1, clip=0.5)
    rows["curvature"] = torch.tensor([8.0, 16.0])
    expected = [2.0 * 0.05 - 8.0 * 0.05**2 / 2, -4.0 * 0.05 - 16.0 * 0.05**2 / 2]
    if wide:  # two columns, each with half of both terms
        halves = {name: rows[name][:, None].expand(-1, 2) / 2 for name in ("score", "curvature")}
        rows |= halves | {"lr": rows["lr"][:, None].expand(-1, 2)}
    assert row_values(rows).tolist() == pytest.approx(expected)
    assert column_values(rows, 1 + wide).sum(1).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("wide", [False, True])
def test_a_weight_counts_both_terms_so_often(wide: bool) -> None:
    rows = shard([0, 1], [2.0, -4.0], lr=0.1, clip=0.5)
    rows["curvature"] = torch.tensor([8.0, 16.0])
    if wide:
        halves = {name: rows[name][:, None].expand(-1, 2) / 2 for name in ("score", "curvature")}
        rows |= halves | {"lr": rows["lr"][:, None].expand(-1, 2)}
    plain = row_values(rows)
    rows["weight"] = torch.tensor([0.0, 1.5], dtype=torch.float64)
    assert row_values(rows).tolist() == pytest.approx([0.0, 1.5 * float(plain[1])])


def test_an_infinite_curvature_of_a_step_not_taken_is_nothing() -> None:
    rows = shard([0], [2.0], lr=0.1, clip=0.0)
    rows["curvature"] = torch.tensor([float("inf")])
    assert row_values(rows).tolist() == [0.0]


def test_row_values() -> None:
    rows = row_values(shard([0, 1], [2.0, -4.0], lr=0.1, clip=0.5))
    assert rows.dtype == torch.float64
    assert rows.tolist() == pytest.approx([0.1, -0.2])


def test_rates_of_groups_are_folded_in() -> None:
    rows = shard([0, 1], [0, 0], clip=0.5)
    rows["score"] = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    rows["lr"] = torch.tensor([[0.1, 0.01], [0.1, 0.01]], dtype=torch.float64)
    assert row_values(rows).tolist() == pytest.approx([0.1, 0.2])


def test_samples_are_summed_over_shards_of_any_width() -> None:
    wide = shard([7, 2], [0, 0])
    wide["score"], wide["lr"] = torch.ones(2, 2), torch.full((2, 2), 0.5, dtype=torch.float64)
    values = accumulate([shard([5, 2, 5], [1.0, 2.0, 3.0]), wide, shard([], [])])
    assert values.sample.tolist() == [2, 5, 7]
    assert values.value.tolist() == pytest.approx([1.2, 0.4, 1.0])
    assert values.times_seen.tolist() == [2, 2, 1]


def test_nothing_scored() -> None:
    values = accumulate([])
    assert values.sample.numel() == values.value.numel() == values.times_seen.numel() == 0


def test_rows_that_are_not_finite_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ghost.values"):
        values = accumulate([shard([0, 1, 0, 2], [1.0, float("nan"), float("inf"), 2.0])])
    assert values.sample.tolist() == [0, 2]
    assert values.value.tolist() == pytest.approx([0.1, 0.2])
    assert "2 score rows are not finite" in caplog.text


def test_a_step_that_was_not_taken_gives_nothing_even_where_it_overflowed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = shard([0, 1, 2], [float("inf"), float("nan"), 2.0], clip=0.0)
    values = accumulate([rows, shard([0], [3.0])])
    assert values.sample.tolist() == [0, 1, 2]
    assert values.value.tolist() == pytest.approx([0.3, 0.0, 0.0])
    assert not caplog.text


def test_low_precision_scores_are_summed_in_float64() -> None:
    rows = shard([0] * 1000, [1.0] * 1000, lr=1.0)
    rows["score"] = rows["score"].bfloat16()
    assert accumulate([rows]).value.item() == 1000


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 20), st.floats(-1e6, 1e6, width=32)), max_size=8), max_size=4)
)
def test_values_are_a_plain_sum(parts: list[list[tuple[int, float]]]) -> None:
    values = accumulate(shard([i for i, _ in part], [s for _, s in part]) for part in parts)
    expected: dict[int, float] = {}
    for part in parts:
        for i, score in part:
            expected[i] = expected.get(i, 0.0) + 0.1 * score
    assert values.sample.tolist() == sorted(expected)
    assert values.value.tolist() == pytest.approx([expected[i] for i in sorted(expected)], abs=1e-6)


def test_shards_are_read_in_order_and_nothing_else_is(tmp_path: Path) -> None:
    for i in (1, 0, 10):
        save_atomically({"step": torch.tensor([i])}, tmp_path / f"shard-{i:05d}.pt")
    (tmp_path / ".shard-00002.pt.partial").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("x")
    assert [int(part["step"]) for part in read_shards(tmp_path)] == [0, 1, 10]


def test_columns_are_of_the_rows_that_values_are_of(tmp_path: Path) -> None:
    """A row with one infinite column counts in none; one of a step that was not taken counts as zero."""
    log, columns = ScoreLog(tmp_path), [Column("attn", 0, ""), Column("mlp", 0, "")]
    inf = float("inf")
    one = torch.ones(())
    rows = [
        (torch.tensor([[1.0, 2.0], [4.0, inf]]), one),
        (torch.tensor([[inf, 1.0], [0.5, -0.25]]), one * 0),
        (torch.tensor([[8.0, 1.0], [0.5, -0.25]]), one),
    ]
    for step, (score, clip) in enumerate(rows):
        log.append(step, torch.tensor([step, 3]), score, torch.tensor([0.1, 0.1]), clip, columns)
    log.flush()
    whole, parts = accumulate(read_shards(tmp_path)), accumulate_columns(tmp_path)
    for found in parts.values():
        assert found.sample.tolist() == whole.sample.tolist() == [0, 1, 2, 3]
        assert found.times_seen.tolist() == whole.times_seen.tolist() == [1, 1, 1, 2]
    total = sum(found.value for found in parts.values())
    assert total.tolist() == pytest.approx(whole.value.tolist())
    assert whole.value.tolist() == pytest.approx([0.3, 0, 0.9, 0.025])
