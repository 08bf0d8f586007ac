"""A test set apart from validation: who is in it, and that nothing else changes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conf.command import MISTAKE
from runners.data import build_data
from runners.data.apart import test_positions as positions
from runners.data.base import DataBundle
from tests.runners.conftest import Line, data_config
from tests.runners.test_data_listed import DIGITS
from tests.runners.test_train import DIGITS as DIGITS_RUN
from tests.runners.test_train import Run, run, series, values

__all__ = ["run"]


def build(**keys: object) -> DataBundle:
    return build_data(data_config(**DIGITS | keys))


def test_validation_and_test_part_the_held_out_samples() -> None:
    whole, apart = build(), build(test_samples=100)
    assert whole.test is None
    assert apart.test is not None
    assert (len(apart.val), len(apart.test)) == (197, 100)
    assert sorted([*apart.val.sample_ids, *apart.test.sample_ids]) == sorted(whole.val.sample_ids)
    assert apart.train.sample_ids == whole.train.sample_ids
    assert apart.fingerprint != whole.fingerprint
    assert "100 held-out samples are a test set" in apart.description
    indices = [samples[i][2] for samples in (apart.val, apart.test) for i in range(len(samples))]
    assert indices == list(range(1500, 1797))
    place = {name: i for i, name in enumerate(whole.val.sample_ids)}
    for i, name in enumerate(apart.test.sample_ids):
        assert torch.equal(apart.test[i][0], whole.val[place[name]][0])
        assert apart.test[i][1] == whole.val[place[name]][1]


def test_the_choice_depends_on_ids_alone_and_grows_with_the_number() -> None:
    ids, domains = [f"n{i}" for i in range(60)], ["x", "y", "z"] * 20
    small, large = positions(ids, domains, 12), positions(ids, domains, 30)
    assert set(small) < set(large)
    order = np.random.default_rng(0).permutation(60)
    moved = positions([ids[i] for i in order], [domains[i] for i in order], 12)
    assert {ids[order[i]] for i in moved} == {ids[i] for i in small}


@pytest.mark.parametrize("wanted", [1, 7, 20, 49])
def test_every_domain_gives_its_share(wanted: int) -> None:
    domains = ["x"] * 30 + ["y"] * 15 + ["z"] * 5
    chosen = positions([f"n{i}" for i in range(50)], domains, wanted)
    assert len(chosen) == wanted
    for domain, size in (("x", 30), ("y", 15), ("z", 5)):
        given = sum(domains[i] == domain for i in chosen)
        assert abs(given - wanted * size / 50) < 1


def test_at_most_one_document_a_domain_is_on_both_sides() -> None:
    ids = [f"{domain}/file{i}#{k}" for domain in "xy" for i in range(10) for k in range(4)]
    domains = [name[0] for name in ids]
    chosen = set(positions(ids, domains, 30))
    for domain in "xy":
        own = {name.partition("#")[0] for i, name in enumerate(ids) if i in chosen and name[0] == domain}
        other = {
            name.partition("#")[0] for i, name in enumerate(ids) if i not in chosen and name[0] == domain
        }
        assert len(own & other) == 1  # 15 windows are three documents and three windows of a fourth


def test_a_run_logs_the_loss_of_both_and_scores_with_one(run: Run) -> None:
    keys = [*DIGITS_RUN, "data.val_samples=80", "engine.val_batch_size=40", "trainer.eval_every=2"]
    whole, apart = run(*keys), run(*keys, "data.test_samples=40")
    for steps in (series(apart, "val/loss"), series(apart, "test/loss")):
        assert list(steps) == [0, 2, 4]
    assert series(whole, "test/loss") == {}
    # At the start both runs' models are the same: the halves' losses make the whole's.
    means = (series(apart, "val/loss")[0] + series(apart, "test/loss")[0]) / 2
    assert means == pytest.approx(series(whole, "val/loss")[0], rel=1e-6)
    assert values(whole) != values(apart)


def test_evaluation_alone_logs_both(run: Run) -> None:
    folder = run("experiment=digits", "tracking=none", "trainer.eval_only=true", "data.test_samples=40")
    assert list(series(folder, "test/loss")) == [0]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            ["data.test_samples=297"],
            "data.test_samples=297 leaves none of data.val_samples=297 to score with",
        ),
        (["data.test_samples=-1"], "data.test_samples=-1 is too small"),
        (
            ["data.test_samples=240"],
            "engine.val_batch_size=64 is more than data.val_samples=297 less data.test_samples=240: type 57",
        ),
        (
            ["data.test_samples=9", "engine=gradprojlora"],
            "data.test_samples=9 has no effect where nothing is trained",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    line: Line, tmp_path: Path, keys: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    start = ["model=mlp", "data=digits"] if "engine=gradprojlora" in keys else ["experiment=digits"]
    assert line(*start, *keys) == MISTAKE
    assert said in capfd.readouterr().err
