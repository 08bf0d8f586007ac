"""Choosing samples while training: cost and course by hand, each run in small, and what is refused."""

import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from conf.errors import ConfigError
from runners.errors import DataError
from runners.fidelity.experiment import Point
from runners.fidelity.in_run import epochs, train
from runners.fidelity.language import adamw, language_model, mean_loss, token_loss, tokens_of
from runners.fidelity.planting import plant
from runners.fidelity.selection import Selection, SelectionConfig, SelectionTrial
from runners.fidelity.selection_course import (
    Checkpoint,
    Tally,
    check_finite,
    gram_rows,
    loss_at,
    scored_rows,
)
from runners.fidelity.settings import samples_of
from runners.tokenizer import load_tokenizer
from tests.runners.fidelity.composed import TINY_LANGUAGE, composed

CPU = torch.device("cpu")
TINY = [
    *TINY_LANGUAGE, "data.val_samples=48", "val_samples=6", "test_samples=6", "kept=4", "steps=4",
    "budget=40", "eval_every=2", "bad_share=0.2",
]  # fmt: skip
SCORED = 6 + 8  # validation rows and candidates of TINY


def experiment(*overrides: str) -> Selection:
    return Selection(composed(SelectionConfig, "selection", *TINY, *overrides), CPU)


def trial(made: Selection) -> SelectionTrial:
    data = samples_of(made.settings, 0)
    planted = plant(tokens_of(data.train), load_tokenizer("bytes"), bad=3, originals=0, copies=0, seed=0)
    return SelectionTrial(made.settings, CPU, data, planted, 0)


def test_compute_is_counted_in_plain_rows() -> None:
    assert scored_rows(candidates=16, val=12, kept=0) == 28
    assert scored_rows(candidates=16, val=12, kept=9) == 31
    assert gram_rows(candidates=16, tokens=32) == 8


def test_the_loss_at_a_budget_lies_between_test_losses() -> None:
    course = [Checkpoint(0, 0.0, 0.0, 9.0), Checkpoint(2, 10.0, 1.0, 5.0), Checkpoint(4, 20.0, 2.0, 4.0)]
    assert [loss_at(course, rows) for rows in (0, 5, 10, 15, 20)] == [9.0, 7.0, 5.0, 4.5, 4.0]


def test_corrupted_samples_count_by_their_weights() -> None:
    tally = Tally(torch.tensor([True, False, False, True]))
    tally.add(torch.tensor([0, 1]), torch.tensor([0.0, 2.0]))
    tally.add(torch.tensor([3, 2]), torch.tensor([0.5, 1.5]))
    assert tally.shares() == {"kept_share": 0.75, "bad_in_batch": 0.5, "bad_in_kept": 0.125}


def test_runs_without_samples_or_with_infinite_losses_are_refused() -> None:
    tally = Tally(torch.tensor([True, False]))
    tally.add(torch.tensor([0, 1]), torch.zeros(2))
    with pytest.raises(DataError, match="none of 2 candidates was kept"):
        tally.shares()
    with pytest.raises(DataError, match="the test loss is nan after 2 steps"):
        check_finite([Checkpoint(2, 1.0, 1.0, math.nan)])


def test_points_are_policies_and_seeds() -> None:
    names = [point.name for point in experiment("seeds=[0,1]", "policies=[uniform,top_k]").points()]
    assert names == ["uniform-seed0", "top_k-seed0", "uniform-seed1", "top_k-seed1"]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["policies=[]"], r"fidelity\.policies=\[\] leaves nothing to measure"),
        (["kept=9"], r"fidelity\.kept=9 is more than fidelity\.batch_size=8"),
        (["budget=0"], r"fidelity\.budget=0 is too small"),
        (["eval_every=3"], r"fidelity\.eval_every=3 does not divide fidelity\.steps=4"),
        (["bad_share=1.5"], r"fidelity\.bad_share=1\.5 is no share"),
        (["test_samples=0"], r"fidelity\.test_samples=0 is too small"),
        (["data.task=text_classes"], "fidelity=selection takes language samples"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        experiment(*overrides)


def test_scoring_without_selection_is_plain_training() -> None:
    made = experiment()
    one = trial(made)
    course, _ = one.run("all")
    model = language_model(made.settings, one._data, 0, CPU)
    batches = islice(epochs(48, 8, 0), course[-1].step)
    train(model, adamw(model, made.settings.adamw_lr), one._rows, batches, token_loss, lambda step: None)
    assert course[-1].test_loss == pytest.approx(mean_loss(model, one._test, 8), rel=1e-5)
    assert course[-1].test_loss < course[0].test_loss


@pytest.mark.parametrize(
    ("policy", "rows", "kept"),
    [
        ("uniform", 4.0, 1.0),
        ("all", SCORED + 8 / 3, 1.0),
        ("top_k", SCORED + 4 / 3, 0.5),
        ("softmax", SCORED + 8 / 3, 1.0),
        ("greedy", SCORED + 4 / 3 + 8 * 1.5 / 3, 0.5),
    ],
)
def test_every_policy_has_its_cost(policy: str, rows: float, kept: float, tmp_path: Path) -> None:
    measured = experiment().measure(Point.at(policy=policy, seed=0), tmp_path)
    assert measured.metrics["rows_per_step"] == pytest.approx(rows)
    assert measured.metrics["kept_share"] == kept
    course = measured.course
    last, seconds = max(course), [numbers["seconds"] for numbers in course.values()]
    assert last >= 4
    assert course[last]["rows"] >= 40
    assert seconds == sorted(seconds)
    assert measured.metrics["test_loss"] == course[4]["test_loss"]


def test_a_threshold_pays_for_what_it_keeps_and_losses_come_again(tmp_path: Path) -> None:
    first, again = (experiment().measure(Point.at(policy="threshold", seed=0), tmp_path) for _ in range(2))
    kept = first.metrics["kept_share"]
    assert first.metrics["rows_per_step"] == pytest.approx(SCORED + 8 * kept / 3)
    losses = [[numbers["test_loss"] for numbers in one.course.values()] for one in (first, again)]
    assert losses[0] == losses[1]
