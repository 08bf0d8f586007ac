"""Values by domain: the measures on a matrix made by hand, the experiment in small, and what is refused."""

from pathlib import Path

import pytest
import torch

from conf.errors import ConfigError
from runners.errors import DataError
from runners.fidelity.domains import COLUMNS, Domains, DomainsConfig, mean_values, metric_labels, own_domain
from runners.fidelity.experiment import Point
from runners.fidelity.settings import samples_of
from tests.runners.fidelity.composed import TINY_LANGUAGE, composed

CPU = torch.device("cpu")


def experiment(*overrides: str) -> Domains:
    held_out = ["data.val_samples=24", "val_samples=6"]
    settings = composed(DomainsConfig, "domains", *TINY_LANGUAGE, *held_out, *overrides)
    return Domains(settings, CPU)


def test_values_are_averaged_by_domain() -> None:
    values = torch.tensor([[1.0, 10.0], [3.0, 30.0], [5.0, 50.0]])
    found = mean_values(values, ["b", "a", "b"], ["a", "b"])
    assert found.tolist() == [[3.0, 30.0], [3.0, 30.0]]


def test_a_domain_is_its_own_best_or_not() -> None:
    # Rows: trained on; columns: validation sets.
    confusion = torch.tensor([[5.0, 1.0, 9.0], [4.0, 3.0, 2.0], [3.0, 2.0, 8.0]])
    assert own_domain(confusion) == {
        "own_highest": pytest.approx(2 / 3),  # the third set gets more from the first domain
        "own_rank": pytest.approx((1 + 1 + 2) / 3),
        "own_target": pytest.approx(1 / 3),  # only the third domain helps its own set the most
    }
    assert own_domain(torch.eye(4)) == {"own_highest": 1.0, "own_rank": 1.0, "own_target": 1.0}


def test_points_are_seeds() -> None:
    assert [point.name for point in experiment("seeds=[0,4]").points()] == ["seed0", "seed4"]


def test_phases_are_one_run(tmp_path: Path) -> None:
    settings = ["steps=6", "data.train_samples=12", "val_samples=3"]
    whole, parts = experiment(*settings, "phases=1"), experiment(*settings, "phases=3")
    data = samples_of(whole.settings, 0)
    (one,), several = whole.scored(data, 0, {}), parts.scored(data, 0, {})
    summed = torch.stack([phase.first_order for phase in several]).sum(0)
    torch.testing.assert_close(summed, one.first_order, rtol=1e-4, atol=1e-7)
    falls = torch.stack([phase.loss_fall for phase in several]).sum(0)
    torch.testing.assert_close(falls, one.loss_fall, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"fidelity\.phases=4 does not divide fidelity\.steps=6"):
        experiment("steps=6", "phases=4")


def test_one_domain_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give two or more domains"):
        experiment("data.domains=[code]").measure(Point.at(seed=0), tmp_path)
    with pytest.raises(ConfigError, match="fidelity=domains takes language samples"):
        experiment("data.task=seq2seq")
    with pytest.raises(ConfigError, match=r"fidelity\.data\.test_samples=3 has no use here"):
        experiment("data.test_samples=3")


def test_fewer_validation_samples_than_domains_are_refused(tmp_path: Path) -> None:
    made = experiment("val_samples=2")
    with pytest.raises(ConfigError, match=r"fidelity\.val_samples=2 gives some of the 3 domains none"):
        made.measure(made.points()[0], tmp_path)


def test_names_of_domains_stay_apart_in_metrics() -> None:
    assert metric_labels(["c++", "c##", "web/en", "docs"]) == ["c__ 0", "c__ 1", "web_en", "docs"]


@pytest.mark.slow
def test_every_domain_has_a_row_and_every_validation_set_a_column(tmp_path: Path) -> None:
    made = experiment("steps=8", "phases=2")
    measured = made.measure(Point.at(seed=0), tmp_path)
    for method in ("first_order", "optimizer_aware"):
        assert 1 <= measured.metrics[f"own_rank/{method}"] <= 3
        assert 1 <= measured.metrics[f"own_rank_last/{method}"] <= 3
    table = measured.tables["confusion"]
    rows = set(zip(*(table[name] for name in COLUMNS[:-1]), strict=True))
    assert len(rows) == len(table["value"]) == 2 * 2 * 3 * 3
    assert made.measure(Point.at(seed=0), tmp_path).metrics == measured.metrics
