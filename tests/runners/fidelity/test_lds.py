"""The linear datamodeling score: its parts against plain autograd, and its correlation against SciPy's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from conf.errors import ConfigError
from runners.fidelity.lds import (
    LDS,
    OF_MEAN,
    LDSConfig,
    Samples,
    compared,
    last_dots,
    loss_table,
    rank_correlations,
    within_reach,
)
from runners.fidelity.settings import samples_of
from tests.runners.fidelity.conftest import TINY_LDS, composed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings() -> LDSConfig:
    found: LDSConfig = composed(*TINY_LDS)
    return found


def samples(number: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return Samples(
        torch.randn(number, 5, generator=generator, dtype=torch.float64),
        torch.randint(3, (number,), generator=generator),
    )


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def gradients(model: nn.Module, side: Samples) -> Tensor:
    """Of each sample's own loss, `[n, K]`."""
    rows = [
        torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        for x, y in zip(side.X, side.Y, strict=True)
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def test_dots_are_of_each_samples_own_gradient() -> None:
    model, train, val = perceptron(), samples(300, 1), samples(4, 2)  # two passes, the last one short
    expected = gradients(model, train) @ gradients(model, val).T
    found = last_dots(model, train, val, lambda model, X, Y: F.cross_entropy(model(X), Y))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_in_run_scores_are_what_the_steps_credit(settings: LDSConfig) -> None:
    """Against a batch-size-1 loop with exact Hessian-vector products beside the same training."""
    experiment = LDS(replace(settings, batch_size=3, steps=2, lr=0.2), CPU)
    train, val = samples(8, 1), samples(2, 2)
    found = experiment._in_run(perceptron(), train, val, torch.Generator().manual_seed(7))
    model, batches = perceptron(), experiment._batches(torch.arange(8), torch.Generator().manual_seed(7))
    first, curvature = torch.zeros(8, 2).double(), torch.zeros(8, 2).double()
    for batch in batches:
        parts = gradients(model, Samples(train.X[batch], train.Y[batch])) / len(batch)
        for j in range(2):
            loss = F.cross_entropy(model(val.X[[j]]), val.Y[[j]]) / 2
            grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            flat = torch.cat([part.flatten() for part in grads])
            product = torch.autograd.grad(
                flat @ parts.sum(0), list(model.parameters()), materialize_grads=True
            )
            first[batch, j] += 0.2 * (parts @ flat.detach())
            curvature[batch, j] += 0.02 * (parts @ torch.cat([part.flatten() for part in product]))
        step, start = parts.sum(0), 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.2 * step[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
    torch.testing.assert_close(found["first_order"], first, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found["second_order"], first - curvature, rtol=1e-8, atol=1e-12)


def test_batches_are_full_and_visit_an_epoch_once(settings: LDSConfig) -> None:
    experiment = LDS(replace(settings, batch_size=3, steps=7), CPU)
    batches = list(experiment._batches(torch.arange(10, 20), torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [3] * 7
    epoch = torch.cat(batches[:3])
    assert len(epoch.unique()) == 9
    assert epoch.min() >= 10


def test_correlations_are_scipys() -> None:
    draw = np.random.default_rng(0)
    ones, others = draw.normal(size=(12, 5)), draw.integers(0, 4, size=(12, 5)).astype(float)
    expected = [spearmanr(ones[:, j], others[:, j]).statistic for j in range(5)]
    np.testing.assert_allclose(rank_correlations(ones, others), expected, rtol=0, atol=1e-12)


def test_sums_that_predict_every_loss_score_one() -> None:
    losses = np.random.default_rng(1).normal(size=(4, 9, 3))
    metrics, single = compared({"known": -losses.mean(0), "reversed": losses.mean(0)}, losses)
    assert metrics["lds/known"] == pytest.approx(1)
    assert metrics["lds_of_mean/reversed"] == pytest.approx(-1)
    expected = [spearmanr(losses[:2, :, j].mean(0), losses[2:, :, j].mean(0)).statistic for j in range(3)]
    np.testing.assert_allclose(single["retrained_half"], expected, atol=1e-12)


def test_what_perfect_predictions_would_reach() -> None:
    """Losses whose expectation is known, with as much noise: predictions by it correlate as foreseen."""
    draw = np.random.default_rng(2)
    expected = draw.normal(size=(4000, 6))
    losses = expected + 1.5 * draw.normal(size=(5, 4000, 6))
    metrics, _ = compared({"known": -expected}, losses)
    assert metrics["lds/retrained_half"] < metrics["lds/known"] - 0.1
    assert metrics["lds/perfect"] == pytest.approx(metrics["lds/known"], abs=0.02)
    assert metrics["lds_of_mean/perfect"] == pytest.approx(metrics["lds_of_mean/known"], abs=0.02)
    assert within_reach(-0.1, 2, 5) == 0
    assert within_reach(1.0, 2, 5) == pytest.approx(1)
    assert within_reach(1.0 + 2e-16, 2, 5) == pytest.approx(1)


def test_a_sample_whose_loss_never_changes_predicts_nothing() -> None:
    losses = np.random.default_rng(3).normal(size=(4, 9, 2))
    losses[:, :, 1] = 0.0
    metrics, single = compared({"known": -losses.mean(0)}, losses)
    assert single["known"].tolist() == [pytest.approx(1), 0.0]
    assert single["perfect"][1] == 0.0
    assert metrics["lds/known"] == pytest.approx(0.5)


def test_a_learning_rate_that_diverges_is_named_before_anything_is_trained_again(
    settings: LDSConfig, tmp_path: Path
) -> None:
    experiment = LDS(replace(settings, lr=1e12, steps=30), CPU)
    with pytest.raises(ConfigError, match=r"fidelity\.lr=1000000000000\.0 lets a run diverge"):
        experiment.measure(experiment.points()[0], tmp_path)


def test_scores_of_the_mean_loss_stand_for_sums_of_scores() -> None:
    losses = np.random.default_rng(1).normal(size=(4, 9, 3))
    of_mean = -losses.mean(0).sum(1, keepdims=True)
    metrics, single = compared({"a": losses.mean(0), f"a{OF_MEAN}": of_mean}, losses)
    assert metrics["lds/a"] == pytest.approx(-1)
    assert metrics["lds_of_mean/a"] == pytest.approx(1)
    assert set(single) == {"a", "retrained_half", "perfect"}


def test_every_trainings_losses_are_kept() -> None:
    losses = torch.rand(2, 3, 4, dtype=torch.float64)
    table = loss_table(losses)
    rows = zip(table["retraining"], table["subset"], table["sample"], strict=True)
    assert [losses[place].item() for place in rows] == table["loss"]
    assert len(table["loss"]) == 24


def test_a_point_is_measured_the_same_again(settings: LDSConfig, tmp_path: Path) -> None:
    experiment = LDS(settings, CPU)
    point = experiment.points()[1]
    assert point.name == "seed2"
    first = experiment.measure(point, tmp_path)
    assert first == experiment.measure(point, tmp_path)
    methods = {
        "first_order", "second_order", "exact_dots", "projected_dots", "projected_cosine", "random",
        "retrained_half", "perfect",
    }  # fmt: skip
    assert set(first.metrics) == {
        f"{measure}/{name}" for measure in ("lds", "lds_of_mean") for name in methods
    }
    assert {name: len(column) for name, column in first.tables["correlations"].items()} == dict.fromkeys(
        methods, 4
    )


def test_models_of_subsets_see_nothing_else(settings: LDSConfig) -> None:
    """Samples outside of the subset may be anything."""
    experiment = LDS(settings, CPU)
    data = samples_of(experiment.settings, 0)
    train, val = experiment._all_rows(data.train), experiment._all_rows(data.val)
    subset = torch.arange(100)
    spoiled = Samples(train.X.clone(), train.Y)
    spoiled.X[100:] = float("nan")
    losses = [
        experiment.losses(data, side, val, [subset], torch.Generator().manual_seed(0))
        for side in (train, spoiled)
    ]
    assert torch.equal(*losses)
    assert losses[0].isfinite().all()


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("fidelity.lr=0.0", "fidelity.lr=0.0 is not above 0"),
        ("fidelity.share=1.0", "fidelity.share=1.0 is no share between 0 and 1"),
        (
            "fidelity.retrainings=1",
            "fidelity.retrainings=1 is too small: type fidelity.retrainings=2 or more",
        ),
        ("fidelity.data.as_image=true", "takes table_classes samples: type data@fidelity.data=digits"),
        ("fidelity.data.val_samples=0", "In fidelity: data.val_samples=0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(override: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        LDS(composed(*TINY_LDS, override), CPU)


IMAGES = ["fidelity=lds", "fidelity.data.as_image=true", *TINY_LDS[1:2], *TINY_LDS[3:]]


@pytest.mark.parametrize(
    "model",
    [
        ["model@fidelity.model=cnn", "fidelity.model.channels=[3]"],
        ["model@fidelity.model=resnet-tiny"],
        ["model@fidelity.model=vit-tiny", "fidelity.model.attn_implementation=eager"],
    ],
)
def test_models_of_images_are_measured_as_perceptrons_are(model: list[str], tmp_path: Path) -> None:
    experiment = LDS(composed(*IMAGES, *model), CPU)
    measured = experiment.measure(experiment.points()[0], tmp_path)
    methods = {name.partition("/")[2] for name in measured.metrics}
    assert {"first_order", "second_order", "exact_dots", "projected_cosine", "perfect"} <= methods


def test_models_of_text_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpt2-tiny learns from language samples, and fidelity=lds takes"):
        LDS(composed("fidelity=lds", "model@fidelity.model=gpt2-tiny"), CPU)


def test_a_subset_smaller_than_a_batch_is_refused(settings: LDSConfig, tmp_path: Path) -> None:
    experiment = LDS(replace(settings, share=0.01), CPU)
    with pytest.raises(
        ConfigError, match=r"fidelity.share=0.01 is 18 samples, fewer than fidelity.batch_size"
    ):
        experiment.measure(experiment.points()[0], tmp_path)
