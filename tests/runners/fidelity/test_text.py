"""Planted text: the measures on values made by hand, the whole experiment in small, and what is refused."""

import math
from pathlib import Path

import pytest
import torch

from conf.errors import ConfigError
from runners.errors import DataError
from runners.fidelity.experiment import Point
from runners.fidelity.language import language_model, mean_loss, rows_of, token_loss, tokens_of, width
from runners.fidelity.planting import plant
from runners.fidelity.settings import samples_of
from runners.fidelity.text import DroppingConfig, Text, TextConfig, Trial
from runners.fidelity.text_measures import bad_in_lowest, negative_share, saved, value_of_copies
from runners.tokenizer import load_tokenizer
from tests.runners.fidelity.composed import TINY_LANGUAGE, composed

CPU = torch.device("cpu")
TINY = [
    *TINY_LANGUAGE, "data.val_samples=48", "val_samples=6", "test_samples=6", "steps=12", "eval_every=4",
    "bad_share=0.13", "originals=4",
]  # fmt: skip


def experiment(*overrides: str) -> Text:
    return Text(composed(TextConfig, "text", *TINY, *overrides), CPU)


def test_bad_samples_are_counted_among_the_lowest() -> None:
    values = torch.tensor([5.0, -3.0, 0.5, 9.0, -1.0, 8.0, 7.0, 6.0])
    found = bad_in_lowest(values, {"shuffled": [1, 3], "repeated": [4, 2]})
    assert found == {"bad_in_lowest": 0.75, "shuffled_in_lowest": 0.5, "repeated_in_lowest": 1.0}
    assert negative_share(values) == {"negative_share": 0.25}


def test_copies_are_held_against_their_originals_alone() -> None:
    values, alone = torch.tensor([1.0, 2.0, 3.0, 10.0, 6.0]), torch.tensor([4.0, 9.0, 8.0, 9.0, 9.0])
    assert value_of_copies(values, alone, [[0, 1], [2, 4]]) == pytest.approx(3.0 / 6.0)


def test_what_is_saved_is_counted_at_a_loss_that_every_run_reaches() -> None:
    curves = {
        "all": {0: 4.0, 10: 3.0, 20: 2.0},
        "first_order": {0: 4.0, 10: 2.0, 20: 1.0},
        "random_as_first_order": {0: 4.0, 10: 3.5, 20: 2.5},
    }
    found = saved(curves)
    assert found["target_loss"] == 2.5
    assert found["iterations_saved/first_order"] == pytest.approx(1 - 7.5 / 15)
    assert found["iterations_saved/random_as_first_order"] == pytest.approx(1 - 20 / 15)
    assert found["best_loss_change/first_order"] == -1.0
    assert "iterations_saved/all" not in found


@pytest.mark.parametrize("bad", [{0: 4.0, 10: 4.5}, {0: math.nan, 10: math.nan}])
def test_a_run_that_never_learns_is_refused(bad: dict[int, float]) -> None:
    with pytest.raises(DataError, match="never falls below its first"):
        saved({"all": {0: 4.0, 10: 3.0}, "first_order": bad})


def test_points_are_optimizers_and_seeds() -> None:
    names = [point.name for point in experiment("seeds=[0,1]").points()]
    assert names == ["sgd-seed0", "adamw-seed0", "sgd-seed1", "adamw-seed1"]


def test_dropping_sees_every_sample_once() -> None:
    settings = composed(DroppingConfig, "dropping")
    assert settings.steps * settings.batch_size == settings.data.train_samples
    assert [point.name for point in Text(settings, CPU).points()][:2] == ["adamw-seed1", "adamw-seed2"]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["optimizers=[]"], r"fidelity\.optimizers=\[\] leaves nothing to measure"),
        (["sgd_lr=0"], r"fidelity\.sgd_lr=0\.0 is not above 0"),
        (["adamw_lr=-1"], r"fidelity\.adamw_lr=-1\.0 is not above 0"),
        (["bad_share=1.5"], r"fidelity\.bad_share=1\.5 is no share"),
        (["copies=8"], r"fidelity\.copies=8 and an original do not go into one batch: type less than 8"),
        (["eval_every=13"], r"fidelity\.eval_every=13 is more than fidelity.steps=12"),
        (["test_samples=0"], r"fidelity\.test_samples=0 is too small"),
        (["data.task=text_classes"], "gives text_classes samples, and fidelity=text takes language samples"),
        (["data.num_workers=2"], r"fidelity\.data\.num_workers=2 has no use here"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        experiment(*overrides)


@pytest.fixture(scope="module")
def trial() -> Trial:
    settings = composed(TextConfig, "text", *TINY)
    data = samples_of(settings, 0)
    planted = plant(tokens_of(data.train), load_tokenizer("bytes"), bad=2, originals=4, copies=3, seed=0)
    return Trial(settings, CPU, data, planted, 0)


def test_training_without_none_is_training_on_all(trial: Trial) -> None:
    _, scored = trial.scored(trial.planted.tokens, "adamw", {})
    again = trial.without(torch.tensor([], dtype=torch.int64))
    assert scored.keys() == again.keys() == {0, 4, 8, 12}
    for step, loss in scored.items():
        assert again[step] == pytest.approx(loss, rel=1e-4)
    assert scored[12] < scored[0]


def test_a_loss_in_parts_is_the_loss() -> None:
    settings = composed(TextConfig, "text", *TINY)
    data = samples_of(settings, 0)
    model = language_model(settings, data, 0, CPU)
    tokens = tokens_of(data.val)
    rows = rows_of([tokens[0][:5], *tokens[1:]], width(settings), CPU)  # a short row counts by its tokens
    whole = token_loss(model, rows.X, rows.Y).item()
    for batch_size in (1, 4, 100):
        assert mean_loss(model, rows, batch_size) == pytest.approx(whole, rel=1e-5)


def test_nothing_left_to_train_on_is_refused(trial: Trial) -> None:
    with pytest.raises(DataError, match="every training sample has a negative value"):
        trial.without(torch.arange(48))


@pytest.mark.slow
def test_sgd_values_copies_under_both_orders(tmp_path: Path) -> None:
    measured = experiment().measure(Point.at(optimizer="sgd", seed=0), tmp_path)
    for order in ("first_order", "second_order"):
        for measure in ("bad_in_lowest", "negative_share", "duplicate_together", "duplicate_apart"):
            assert math.isfinite(measured.metrics[f"{measure}/{order}"])
    assert set(measured.tables["curves"]["run"]) == {"all", "without_copies"}
    table = measured.tables["values"]
    assert len(table["second_order_without_copies"]) == 48
    assert len(table["sample_id"]) == 48
    assert sum(kind != "" for kind in table["planted"]) == 6
    assert sum(group >= 0 for group in table["group"]) == 16


@pytest.mark.slow
def test_adamw_trains_again_without_negative_values(tmp_path: Path) -> None:
    point = Point.at(optimizer="adamw", seed=0)
    measured = experiment().measure(point, tmp_path)
    for method in ("first_order", "optimizer_aware"):
        assert 0 <= measured.metrics[f"bad_in_lowest/{method}"] <= 1
        assert f"iterations_saved/{method}" in measured.metrics
        assert f"iterations_saved/random_as_{method}" in measured.metrics
    assert "iterations_saved/planted" in measured.metrics
    assert len(measured.tables["curves"]["loss"]) == 6 * 4
    assert experiment().measure(point, tmp_path).metrics == measured.metrics
