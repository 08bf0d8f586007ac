"""Steps whose numbers are not finite: stopped before, skipped, or marked."""

import math
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from conf.command import MISTAKE
from runners import train
from runners.data.base import Item
from runners.data.digits import DigitSet
from runners.nonfinite import non_finite
from runners.world import ALONE
from tests.runners.conftest import Line
from tests.runners.resume.harness import last_checkpoint, metrics

Run = Callable[..., int]

DIGITS = [
    "experiment=digits", "model.hidden=[4]", "trainer.max_steps=5", "trainer.batch_size=4",
    "data.shuffle=false", "hardware.threads=1", "tracking=none",
]  # fmt: skip
BAD = 9  # of steps of four samples in order, the third has it


@pytest.fixture
def run(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line over digits of which one is so bright that its loss overflows."""
    monkeypatch.setattr(train, "plot_run", lambda _: [])
    monkeypatch.setattr(train, "leave_report", lambda *_: None)
    plain = DigitSet.__getitem__

    def bright(self: DigitSet, i: int) -> Item:
        inputs, label, number = plain(self, i)
        return (inputs + math.inf if number == BAD else inputs), label, number

    monkeypatch.setattr(DigitSet, "__getitem__", bright)
    return lambda *arguments: line(*DIGITS, *arguments)


def values(run: Path) -> dict[str, float]:
    table = pq.read_table(run / "values.parquet").to_pydict()
    return dict(zip(table["sample_id"], table["value"], strict=True))


def bad_sample(run: Path) -> str:
    table = pq.read_table(run / "samples.parquet").to_pydict()
    return table["sample_id"][table["index"].index(BAD)]


def test_stop_names_the_step_and_the_samples_and_keeps_the_state_before_it(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("hydra.run.dir=stopped") == MISTAKE
    stopped = tmp_path / "stopped"
    said = capsys.readouterr().err.splitlines()
    assert (
        "step 2 is not taken, since the training loss and the gradients and the scores are not finite"
        in said[-1]
    )
    assert bad_sample(stopped) in said[-1]
    assert "resume=" in said[-2]
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-00000002"]
    assert [line["step"] for line in metrics(stopped)] == [0, 1, 2]

    assert run("hydra.run.dir=stopped", "trainer.non_finite=skip") == 0
    assert run("hydra.run.dir=skipped", "trainer.non_finite=skip") == 0
    assert metrics(stopped) == metrics(tmp_path / "skipped")
    assert values(stopped) == values(tmp_path / "skipped")


def test_a_skipped_step_credits_nothing_and_is_counted(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("hydra.run.dir=skipped", "trainer.non_finite=skip", "trainer.checkpoint_every=5") == 0
    skipped = tmp_path / "skipped"
    assert "Step 2 is skipped: the training loss" in capsys.readouterr().err
    lines = {line["step"]: line for line in metrics(skipped)}
    assert [lines[step].get("train/skipped_steps") for step in range(1, 6)] == [None, None, 1, 1, 1]
    assert lines[3]["non_finite"].keys() >= {"train/loss"}
    assert math.isfinite(lines[5]["train/loss"])
    found = list(values(skipped).values())
    assert all(map(math.isfinite, found))
    assert sum(value == 0 for value in found) == 4
    saved = torch.load(last_checkpoint(skipped) / "training.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_marked_samples_have_no_value(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("hydra.run.dir=marked", "trainer.non_finite=mark", "trainer.max_steps=3") == 0
    marked = tmp_path / "marked"
    found = values(marked)
    assert len(found) == 12
    assert [name for name, value in found.items() if math.isnan(value)] == [bad_sample(marked)]
    said = capsys.readouterr()
    assert f"1 samples have no value, since a score is not finite: {bad_sample(marked)}." in said.err
    assert "val/loss is nan." in said.err
    assert "1 samples have no finite value and are left out above." in said.out


@pytest.mark.parametrize(
    ("losses", "grad", "score", "scaled", "found"),
    [
        ([1.0, 2.0], 1.0, 1.0, False, []),
        ([1.0, math.nan], 1.0, 1.0, False, ["training loss"]),
        ([1.0, 2.0], math.inf, 1.0, False, ["gradients"]),
        ([1.0, 2.0], 1.0, -math.inf, False, ["scores"]),
        ([math.inf, 2.0], math.nan, math.nan, False, ["training loss", "gradients", "scores"]),
        ([1.0, 2.0], math.inf, math.nan, True, []),  # the scaler's own business
        ([1.0, 2.0], 1.0, math.nan, True, ["scores"]),
    ],
)
def test_what_is_not_finite_is_named(
    losses: list[float], grad: float, score: float, scaled: bool, found: list[str]
) -> None:
    grads = [torch.ones(3), torch.tensor([[1.0, grad]]), torch.zeros(0)]
    scores = torch.tensor([0.5, score])
    assert non_finite(torch.tensor(losses), grads, scores, scaled, ALONE) == found
