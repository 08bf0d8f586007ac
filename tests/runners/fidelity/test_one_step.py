"""The library's values of a step against its game, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.errors import ConfigError
from runners.fidelity.one_step import LINEAR, REAL, OneStep, OneStepConfig, State, scores_of, step_game
from runners.fidelity.settings import samples_of
from runners.losses import language_loss
from tests.runners.fidelity.conftest import TINY_STEP, composed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings() -> OneStepConfig:
    found: OneStepConfig = composed(*TINY_STEP)
    return found


@pytest.fixture(scope="module")
def state(settings: OneStepConfig) -> State:
    """In float64, so that what is compared is the formulas."""
    experiment = OneStep(settings, CPU)
    found = experiment.warmed_up(samples_of(experiment.settings, 3), 3)
    model = found.model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = found.optimizer.state[parameter]
            optimizer.state[parameter] = {key: value.double() for key, value in moments.items()}
    return State(model, optimizer, found.batch, found.val)


def values(state: State, optimizer: str, lr: float) -> torch.Tensor:
    """All beginnings of an order: the last player's contribution among them, and the whole step's."""
    return step_game(state, optimizer, lr, torch.float64).walk([0, 1, 2, 3])


def test_a_games_gradients_are_parts_of_the_batchs(state: State) -> None:
    game = step_game(state, "sgd", 0.1, torch.float64)
    loss = language_loss(state.model, *state.batch).mean
    whole = torch.autograd.grad(loss, list(state.model.parameters()))
    flat = torch.cat([part.flatten() for part in whole])
    torch.testing.assert_close(game.parts.sum(0), flat, rtol=1e-10, atol=1e-14)


def test_first_order_values_are_the_linear_games(state: State) -> None:
    """With SGD the linear game adds up: a player earns its first-order value in every order."""
    found = scores_of(state, "sgd", 0.1)["first_order"]
    torch.testing.assert_close(values(state, "sgd", 0.1)[:, LINEAR].diff(), found, rtol=1e-8, atol=1e-13)


def test_second_order_values_add_up_to_the_step_where_first_order_ones_do_not(state: State) -> None:
    lr = 1e-3
    scores = scores_of(state, "sgd", lr)
    whole = values(state, "sgd", lr)[-1, REAL]
    first, second = ((scores[name].sum() - whole).abs() for name in ("first_order", "second_order"))
    assert second < 0.1 * first


def test_the_optimizers_own_values_are_nearer_to_its_step(state: State) -> None:
    lr = 1e-4
    scores = scores_of(state, "adamw", lr)
    moved = values(state, "adamw", lr)[:, REAL]
    whole = moved[-1] - moved[0]
    own, plain = (
        (scores[name].sum() - whole).abs() / whole.abs() for name in ("optimizer_aware", "first_order")
    )
    assert own < 0.1 < plain


def test_scoring_leaves_the_state_as_it_was(state: State) -> None:
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    scores_of(state, "adamw", 1e-3)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_a_point_is_measured_the_same_again(settings: OneStepConfig, tmp_path: Path) -> None:
    experiment = OneStep(replace(settings, seeds=[1], sgd_lr=[0.1], adamw_lr=[1e-3]), CPU)
    points = experiment.points()
    assert [point.name for point in points] == ["sgd-lr0.1-seed1", "adamw-lr0.001-seed1"]
    first = [experiment.measure(point, tmp_path) for point in points]
    assert first == [experiment.measure(point, tmp_path) for point in points]
    metrics = first[1].metrics
    methods = ("first_order", "second_order", "optimizer_aware", "linear_utility", "monte_carlo_half")
    assert set(metrics) == {
        "spread", "mc_error", "rounding",
        *(f"{measure}/{method}" for measure in ("spearman", "rmse", "relative_rmse") for method in methods),
    }  # fmt: skip
    assert set(first[0].tables["values"]) == {
        "first_order", "second_order", "linear_utility", "true", "true_error",
    }  # fmt: skip
    assert metrics["rounding"] < 1e-6


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("fidelity.batch_size=2", "fidelity.batch_size=2 is too small: type fidelity.batch_size=3 or more"),
        ("fidelity.permutations=1", "fidelity.permutations=1 is too small"),
        ("fidelity.warm_up_steps=0", "fidelity.warm_up_steps=0 is too small"),
        ("fidelity.sgd_lr=[0.1,0.0]", r"fidelity.sgd_lr=\[0.1,0.0\] has a learning rate that is not above 0"),
        ("fidelity.warm_up_lr=0.0", "fidelity.warm_up_lr=0.0 is not above 0"),
        ("fidelity.data.seed=3", "fidelity.data.seed=3 has no use here"),
        ("fidelity.data.shuffle=false", "fidelity.data.shuffle=false has no use here"),
        ("fidelity.data.task=text_classes", "fidelity=one_step takes language samples"),
        ("fidelity.data.seq_len=0", "In fidelity: data.seq_len=0"),
        ("model@fidelity.model=mlp", "model@fidelity.model=mlp is no language model"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(override: str, why: str) -> None:
    overrides = [one for one in TINY_STEP if "model@" not in override or ".model." not in one]
    with pytest.raises(ConfigError, match=why):
        OneStep(composed(*overrides, override), CPU)


def test_no_rate_at_all_is_refused(settings: OneStepConfig) -> None:
    with pytest.raises(ConfigError, match="leave no step"):
        OneStep(replace(settings, sgd_lr=[], adamw_lr=[]), CPU)
