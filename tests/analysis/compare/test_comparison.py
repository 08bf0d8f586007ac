"""Groups of runs held against each other, on curves that are known."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from analysis.compare import command as command
from analysis.compare.comparison import SEEN_BY_SCORES, Comparison, Contrast, compare, reading
from analysis.compare.contrasts import Estimate, difference
from analysis.compare.outcomes import steps_to
from analysis.errors import AnalysisError
from analysis.runs import Run, load_run
from tests.analysis.command_line import Command

Curve = Mapping[int, float]
MakeCurve = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> MakeCurve:
    """A run directory with these evaluations."""
    numbers = iter(range(1000))

    def run(
        curve: Curve,
        seed: int = 0,
        metric: str = "test/loss",
        batch: int = 4,
        held: str = "t",
        lr: float = 0.1,
    ) -> Run:
        folder = tmp_path / f"run{next(numbers)}"
        folder.mkdir()
        trainer = {"max_steps": max(curve), "batch_size": batch, "gradient_accumulation_steps": 1}
        config = {"seed": seed, "trainer": trainer, "optimizer": {"lr": lr}, "engine": {"name": f"e{seed}"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [{"step": step, "time": 0.0, metric: loss} for step, loss in curve.items()]
        text = "".join(json.dumps(line).replace("NaN", "null") + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        samples = {"sample_id": ["a", held], "split": ["train", metric.split("/")[0]]}
        pq.write_table(pa.table(samples), folder / "samples.parquet")
        return load_run(folder)

    return run


def line(steps: float, end: int = 100) -> Curve:
    """From 1 down to 0 at `steps`, and on."""
    return {step: 1 - step / steps for step in range(0, end + 1, 10)}


# ---------------------------------------------------------------- one run


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        ({0: 4.0, 10: 2.0, 20: 1.0}, 2.0, 10.0),
        ({0: 4.0, 10: 2.0, 20: 1.0}, 3.0, 5.0),
        ({0: 4.0, 10: 2.0, 20: 1.0}, 1.25, 17.5),
        ({0: 4.0, 10: 2.0, 20: 1.0}, 0.9, None),
        ({0: 4.0, 10: 2.0, 20: 3.0, 30: 0.0}, 2.5, 7.5),  # the first time counts
        ({0: 4.0, 10: math.nan, 20: 1.0}, 2.0, 20.0),  # no line from a loss that is not there
        ({0: 4.0, 10: math.nan}, 2.0, None),
        ({0: 4.0, 10: 2.0}, 5.0, 0.0),
        ({20: 1.0, 0: 3.0}, 2.0, 10.0),
    ],
)
def test_steps_to_a_target_lie_on_lines_between_evaluations(
    curve: Curve, target: float, expected: float | None
) -> None:
    assert steps_to(curve, target) == expected


# ---------------------------------------------------------------- groups


def test_ratios_and_differences_are_paired_by_seed(make: MakeCurve) -> None:
    full, short = [80.0, 60.0, 50.0], [40.0, 36.0, 20.0]
    groups = {
        "full": [make(line(steps), seed) for seed, steps in enumerate(full)],
        "less": [make(line(steps), seed) for seed, steps in reversed(list(enumerate(short)))],
    }
    found = compare(groups, "full", None, 0.5)
    assert [one.steps_to_target for one in found.groups["full"]] == pytest.approx([40, 30, 25])
    (one,) = found.contrasts
    assert (one.group, one.against, one.pairs, one.censored, one.note) == ("less", "full", 3, 0, "")
    logs = [dict(enumerate(np.log(steps))) for steps in (short, full)]
    expected = difference(*logs, range(3)).exponential()
    assert one.ratio is not None
    assert (one.ratio.mean, one.ratio.low, one.ratio.high) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )
    assert one.ratio.mean == pytest.approx((0.5 * 0.6 * 0.4) ** (1 / 3))
    last = [[1 - 100 / steps for steps in of] for of in (short, full)]
    assert one.final.mean == pytest.approx(np.mean(last[0]) - np.mean(last[1]))


def test_several_runs_of_a_seed_are_averaged_within_the_seed_first(make: MakeCurve) -> None:
    groups = {
        "full": [make(line(50), seed) for seed in (0, 1)],
        "random": [make(line(steps), seed) for seed, steps in ((0, 20), (0, 80), (1, 40), (1, 40))],
    }
    (one,) = compare(groups, "full", None, 0.5).contrasts
    assert (one.pairs, one.note) == (2, "")
    assert one.ratio is not None
    assert (one.ratio.mean, one.ratio.low, one.ratio.high) == pytest.approx((0.8, 0.8, 0.8))


def test_the_default_target_is_what_every_baseline_run_reaches(make: MakeCurve) -> None:
    groups = {
        "full": [make({0: 3.0, 10: 1.0, 20: 2.0}, 0), make({0: 3.0, 10: 2.0, 20: 1.5}, 1)],
        "less": [make({0: 3.0, 10: 0.5, 20: 0.5}, 0), make({0: 3.0, 10: 0.5, 20: 0.5}, 1)],
    }
    found = compare(groups, "full", None, None)
    assert (found.target, found.target_rule) == (1.5, "the largest of the best losses of full's runs")
    assert all(one.steps_to_target is not None for one in found.groups["full"])
    best = found.groups["full"][0]
    assert (best.best_loss, best.best_step, best.final_loss) == (1.0, 10, 2.0)


def test_groups_without_common_seeds_are_two_samples(make: MakeCurve) -> None:
    groups = {"full": [make(line(50), 0), make(line(60), 1)], "less": [make(line(30), 2), make(line(20), 3)]}
    (one,) = compare(groups, "full", None, 0.5).contrasts
    assert (one.pairs, one.note) == (0, "seeds do not match: Welch's interval")
    assert one.ratio is not None
    assert one.ratio.low is not None


def test_one_pair_gives_no_interval(make: MakeCurve) -> None:
    (one,) = compare({"full": [make(line(50))], "less": [make(line(25))]}, "full", None, 0.5).contrasts
    assert one.ratio is not None
    assert (one.ratio.mean, one.ratio.low, one.pairs) == (pytest.approx(0.5), None, 1)
    assert one.note == "one pair: no interval"


def test_every_group_meets_the_baseline_and_every_other(make: MakeCurve) -> None:
    groups = {name: [make(line(50))] for name in ("dropped", "full", "random")}
    found = compare(groups, "full", None, 0.5)
    assert [(one.group, one.against) for one in found.contrasts] == [
        ("dropped", "full"), ("random", "full"), ("dropped", "random"),
    ]  # fmt: skip


# ---------------------------------------------------------------- what never got there


@pytest.fixture
def censored(make: MakeCurve) -> Comparison:
    """One of two runs of `less` never reaches a half in 100 steps."""
    groups = {
        "full": [make(line(50), 0), make(line(50), 1)],
        "less": [make(line(50), 0), make(line(400), 1)],
    }
    return compare(groups, "full", None, 0.5)


def test_a_run_that_never_got_there_bounds_the_ratio_and_is_not_made_up(censored: Comparison) -> None:
    (one,) = censored.contrasts
    assert (one.ratio, one.at_most, one.censored) == (None, None, 1)
    assert one.at_least == pytest.approx(2)  # the geometric mean of 25/25 and more than 100/25
    assert one.note == "1 of 4 runs never reaches the target: no ratio, only its bound"
    assert "1 of 2 runs of less never reaches 0.5 in their 100 steps" in censored.notes
    assert [run["steps_to_target"] for run in censored.as_dict()["groups"][1]["runs"]] == [25, None]
    assert command.ratio_text(one) == "× > 2"


def test_the_bound_is_from_above_where_the_other_group_never_got_there(make: MakeCurve) -> None:
    groups = {"full": [make(line(400))], "less": [make(line(50))], "none": [make(line(500))]}
    above, neither, _ = compare(groups, "full", None, 0.5).contrasts
    assert (above.ratio, above.at_least, above.at_most) == (None, None, pytest.approx(0.25))
    assert (neither.ratio, neither.at_least, neither.at_most, neither.censored) == (None, None, None, 2)
    assert command.ratio_text(neither) == "–"
    assert above.note.endswith("no ratio, only its bound")
    assert neither.note.endswith("2 of 2 runs never reach the target: no ratio")


def test_a_run_that_starts_at_the_target_has_no_ratio(make: MakeCurve) -> None:
    (one,) = compare({"full": [make(line(50))], "less": [make(line(25))]}, "full", None, 2.0).contrasts
    assert (one.ratio, one.at_least, one.at_most) == (None, None, None)
    assert "a run starts at the target: no ratio" in one.note


# ---------------------------------------------------------------- what does not compare, and what is said


def test_batches_of_other_sizes_compare_by_samples_seen(make: MakeCurve) -> None:
    groups = {"full": [make(line(50), batch=4)], "less": [make(line(50), batch=8)]}
    found = compare(groups, "full", None, 0.5)
    assert found.unit == "samples"
    assert found.contrasts[0].ratio is not None
    assert found.contrasts[0].ratio.mean == pytest.approx(2)
    assert "batch sizes differ: ratios are of training samples seen, not of steps" in found.notes
    assert [of["runs"][0]["samples_to_target"] for of in found.as_dict()["groups"]] == [100, 200]


def test_losses_of_the_samples_that_values_saw_carry_a_note(make: MakeCurve) -> None:
    groups = {"full": [make(line(50), metric="val/loss")], "less": [make(line(50), metric="val/loss")]}
    found = compare(groups, "full", None, None)
    assert found.metric == "val/loss"
    assert SEEN_BY_SCORES in found.notes
    clean = compare({"full": [make(line(50))], "less": [make(line(25))]}, "full", None, None)
    assert (clean.metric, list(clean.notes)) == ("test/loss", [])
    with pytest.raises(AnalysisError, match="has no val/loss"):
        compare({"full": [make(line(50))], "less": [make(line(25))]}, "full", "val/loss", None)


def test_runs_on_other_samples_or_that_ended_early_are_refused(make: MakeCurve) -> None:
    with pytest.raises(AnalysisError, match="was evaluated on other test samples"):
        compare({"full": [make(line(50))], "less": [make(line(50), held="u")]}, "full", None, None)
    cut = make(line(50))
    text = (cut.directory / "config.yaml").read_text().replace("max_steps: 100", "max_steps: 200")
    (cut.directory / "config.yaml").write_text(text)
    with pytest.raises(AnalysisError, match="ends at step 100 of 200"):
        compare({"full": [make(line(50))], "less": [load_run(cut.directory)]}, "full", None, None)
    with pytest.raises(AnalysisError, match="no finite test/loss"):
        compare({"full": [make(line(50))], "less": [make({0: math.nan, 10: math.nan})]}, "full", None, None)


def test_other_settings_are_named(make: MakeCurve) -> None:
    groups = {"full": [make(line(50), 0)], "less": [make(line(50), 1, lr=0.2)]}
    assert "the runs also differ in optimizer.lr" in compare(groups, "full", None, None).notes


def test_a_diverged_run_is_null_in_json(make: MakeCurve, tmp_path: Path) -> None:
    groups = {"full": [make(line(50))], "less": [make({0: 1.0, 10: 0.2, 20: math.nan})]}
    path = command.write_comparison(compare(groups, "full", None, 0.5), tmp_path / "new" / "folder")
    found = json.loads(path.read_text())
    assert found["groups"][1]["runs"][0]["final_loss"] is None
    assert found["contrasts"][0]["final_loss"] == {"difference": None, "low": None, "high": None}


# ---------------------------------------------------------------- the command


def test_the_command_prints_and_writes(
    make: MakeCurve, in_process: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = [str(make(line(50 + seed), seed).directory) for seed in (0, 1)]
    less = [str(make(line(25 + seed), seed).directory) for seed in (0, 1)]
    groups = [f"groups.full=[{','.join(full)}]", f"groups.less=[{','.join(less)}]", "baseline=full"]
    assert in_process(command.main, *groups, "out=made", "target_loss=0.5") == 0
    printed = capsys.readouterr().out
    assert "test/loss: target 0.5, given" in printed
    assert "less against full" in printed
    clear = "less against full: fewer steps to the target; a lower final loss"
    assert f"{clear}.\nClear: the 95 % interval" in printed
    found = json.loads((tmp_path / "made" / "comparison.json").read_text())
    assert found["contrasts"][0]["reading"] == clear
    assert found["contrasts"][0]["ratio"] == pytest.approx(math.sqrt(25 / 50 * 26 / 51))
    assert [one["run"] for one in found["groups"][0]["runs"]] == [Path(name).name for name in full]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "baseline has no value"),
        (["groups.full=[A]", "baseline=full"], "groups has 1 of the two or more groups"),
        (["groups.full=[A]", "groups.less=[]", "baseline=full"], "groups.less=[] must name one or more runs"),
        (
            ["groups.full=[A]", "groups.less=[B]", "baseline=all"],
            "baseline=all is none of the groups [full,less]",
        ),
        (
            ["groups.full=[A]", "groups.less=[B]", "baseline=full", "metric=train/loss"],
            "metric=train/loss is no loss",
        ),
        (
            ["groups.full=[A]", "groups.less=[B]", "baseline=full", "target_loss=nan"],
            "target_loss=nan is no number",
        ),
    ],
)
def test_the_command_refuses_what_cannot_work(
    in_process: Command, arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert in_process(command.main, *arguments) == 2
    assert said in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("ratio", "final", "said"),
    [
        (Estimate(0.5, 0.4, 0.6), Estimate(0.1, 0.05, 0.2), "fewer steps to the target; a higher final loss"),
        (Estimate(2, 1.5, 3), Estimate(0.1, -0.1, 0.2), "more steps to the target; no clear difference in"),
        (None, Estimate(-0.1, None, None), "steps to the target without an interval; final loss without"),
    ],
)
def test_a_contrast_in_words(ratio: Estimate | None, final: Estimate, said: str) -> None:
    one = Contrast("a", "b", ratio, None, None, final, final, 2, 0, "")
    assert reading(one, "steps").startswith(f"a against b: {said}")


def test_a_group_of_one_run_is_typed_without_brackets(
    make: MakeCurve, in_process: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (make(line(50 + seed), seed).directory for seed in (0, 1))
    assert in_process(command.main, f"groups.a={one}", f"groups.b={other}", "baseline=a") == 0
    assert "b against a: steps to the target without an interval" in capsys.readouterr().out


def test_a_run_in_two_groups_is_refused(
    make: MakeCurve, in_process: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    one = make(line(50)).directory
    assert in_process(command.main, f"groups.a=[{one}]", f"groups.b=[{one}]", "baseline=a") == 2
    assert "which groups.a has too" in capfd.readouterr().err
