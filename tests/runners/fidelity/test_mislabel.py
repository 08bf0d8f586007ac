"""Finding wrong labels: what is measured, and what is refused before work starts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import ConfigError
from runners.errors import DataError
from runners.fidelity.experiment import Point
from runners.fidelity.mislabel import Mislabel, MislabelConfig, auroc_within
from tests.runners.fidelity.composed import composed

CPU = torch.device("cpu")
METHODS = {
    "first_order", "second_order", "tracin_last", "loss", "gradient_norm", "knn_shapley",
    "knn_shapley_inputs", "random",
}  # fmt: skip


def experiment(*overrides: str) -> Mislabel:
    return Mislabel(
        composed(MislabelConfig, "mislabel", "images=[digits]", "texts=[]", "image_lr=[0.1]", *overrides), CPU
    )


def test_points_are_data_sets_and_seeds() -> None:
    made = experiment("seeds=[0,2]")
    assert [point.name for point in made.points()] == ["digits-lr0.1-seed0", "digits-lr0.1-seed2"]


def test_a_point_measures_every_method_and_comes_out_the_same_again(tmp_path: Path) -> None:
    made = experiment("model.hidden=[16]", "image_epochs=2")
    point = Point.at(data="digits", lr=0.1, seed=1)
    measured = made.measure(point, tmp_path)
    for measure in ("auroc", "auroc_within_label"):
        found = {name.partition("/")[2] for name in measured.metrics if name.partition("/")[0] == measure}
        assert found == METHODS
    assert measured.metrics["wrong_share"] == pytest.approx(0.1, abs=1e-3)
    assert measured.metrics["auroc/loss"] > 0.9
    assert measured.metrics["auroc/knn_shapley_inputs"] > 0.9
    assert 0.4 < measured.metrics["auroc/random"] < 0.6
    assert measured.metrics["sum_of_values/second_order"] == pytest.approx(
        measured.metrics["loss_fall"], rel=0.1
    )
    assert set(measured.tables["suspicions"]) == METHODS | {"wrong"}
    assert measured.facts["left_out"] == "0"
    again = experiment("model.hidden=[16]", "image_epochs=2").measure(point, tmp_path)
    assert again.metrics == measured.metrics
    assert again.facts == measured.facts


def test_a_convolutional_network_sees_images(tmp_path: Path) -> None:
    made = experiment("model=cnn", "model.channels=[4]", "image_epochs=1")
    measured = made.measure(Point.at(data="digits", lr=0.1, seed=1), tmp_path)
    assert {name for name in measured.metrics if name.startswith("auroc/")} == {f"auroc/{m}" for m in METHODS}
    assert measured.metrics["auroc/knn_shapley_inputs"] > 0.9
    assert measured.metrics["sum_of_values/second_order"] == pytest.approx(
        measured.metrics["loss_fall"], rel=0.1
    )


def test_models_that_cannot_take_every_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model@fidelity.model=gpt2-tiny has no layer"):
        experiment("model=gpt2-tiny")
    with pytest.raises(
        ConfigError, match=r"fidelity\.texts=\[movies\] are no images, and .*=cnn takes nothing"
    ):
        experiment("model=cnn", "texts=[movies]", f"ratings={tmp_path}")


def test_auroc_within_a_label_does_not_see_what_labels_differ_in() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    wrong = np.array([True, False, False, True, True, False, False, False])
    told = np.array([0.3, 0.2, 0.1, 9.3, 9.2, 9.1, 0.0, 0.0])
    assert auroc_within(labels, wrong, told) == 1
    half = np.array(
        [0.1, 0.2, 0.3, 9.3, 9.2, 9.1, 0.0, 0.0]
    )  # label 0, with one wrong of three, the wrong way
    assert auroc_within(labels, wrong, half) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="no label has both right and wrong samples"):
        auroc_within(labels, labels == 2, told)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("noise=0", r"fidelity\.noise=0\.0 is no share of labels to flip"),
        ("image_lr=[]", r"fidelity\.image_lr=\[\] must name rates above 0"),
        ("text_lr=[1,-1]", r"fidelity\.text_lr=\[1\.0,-1\.0\] must name rates above 0"),
        ("model.hidden=[0]", r"In fidelity: model\.hidden=\[0\]"),
        ("image_epochs=0", r"fidelity\.image_epochs=0 is too small"),
        ("images=[]", r"fidelity\.images=\[\] and fidelity\.texts=\[\] leave no data"),
    ],
)
def test_settings_that_cannot_work_are_refused(override: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        experiment(override)


def test_ratings_that_are_not_there_are_refused_before_work_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks movieReviewSnippets_GroundTruth"):
        experiment("texts=[movies]", f"ratings={tmp_path}")
    with pytest.raises(ConfigError, match=r"fidelity\.ratings=null names no folder of rated texts"):
        experiment("texts=[movies]")


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    made = experiment("image_batch_size=2048")
    with pytest.raises(ConfigError, match=r"fidelity\.image_batch_size=2048 is more than the 1497 samples"):
        made.measure(Point.at(data="digits", lr=0.1, seed=0), tmp_path)


def test_more_neighbours_than_samples_are_refused(tmp_path: Path) -> None:
    made = experiment("neighbours=2000", "image_epochs=1")
    with pytest.raises(ConfigError, match=r"fidelity\.neighbours=2000 are more than the 1497 samples"):
        made.measure(Point.at(data="digits", lr=0.1, seed=0), tmp_path)
