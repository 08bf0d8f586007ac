"""The command, from the command line to the folder."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from analysis.aggregate import command as aggregate
from analysis.aggregate.tables import read_aggregate
from runners import cli
from tests.analysis.synthetic import SETS, write_run

Command = Callable[..., int]


@pytest.fixture
def command(in_process: Command) -> Command:
    """Runs a program's `main` with arguments, in an empty folder, and returns the exit code."""

    def run_line(*arguments: str, main: Callable[[], int] = aggregate.main) -> int:
        return in_process(main, *arguments)

    return run_line


def test_a_sweep_becomes_tables_and_a_summary(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        write_run(tmp_path / "sweep" / str(i), i, columns=SETS, first_id=i)
    assert command("runs=[sweep]", "out=found", "trajectory_points=4") == 0
    found = read_aggregate(tmp_path / "found")
    assert found.runs["run"].to_pylist() == ["0", "1", "2"]
    assert found.correlations.num_rows == 3
    assert found.columns is not None
    assert all(
        len(set(found.trajectories.filter(pc.equal(found.trajectories["run"], run))["step"].to_pylist())) <= 4
        for run in "012"
    )
    printed = capsys.readouterr().out
    for words in (
        "Runs",
        "seed",
        "Spearman",
        "Highest and lowest",
        "Value by domain",
        "first-order SGD proxy",
    ):
        assert words in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found", "sweep"]


def test_out_null_prints_only(tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    assert command("runs=[run]", "steps=[2,9]") == 0
    assert "Highest and lowest" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_agreement_is_whole_in_a_narrow_window(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for i in range(3):
        write_run(tmp_path / "sweep" / str(i), i)
    assert command("runs=[sweep]", "out=found") == 0
    printed = capsys.readouterr().out
    assert "same sign" in printed
    found = read_aggregate(tmp_path / "found").correlations
    for name in ("spearman", "kendall", "pearson", "same_sign"):
        numbers = found[name].to_numpy()
        for number in (np.median(numbers), numbers.min(), numbers.max()):
            assert f"{number:.3f}" in printed, name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "runs has no value: type runs=DIR"),
        (("runs=[]",), "runs has no value"),
        (("runs=[run]", "steps=[3]"), "steps=[3] is no range: type steps=[FIRST,LAST]"),
        (("runs=[run]", "steps=[9,2]"), "steps=[9,2] is no range"),
        (("runs=[run]", "trajectory_points=0"), "trajectory_points=0 is too small"),
        (("runs=[run]", "out=run"), "out=run has other files in it"),
        (("runs=[nothing]",), "nothing is no directory"),
        (("runs=[run]", "mean=true"), "mean"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    says: str,
) -> None:
    write_run(tmp_path / "run")
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


def test_help_lists_every_key(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    shown = capsys.readouterr().out
    for name in ("runs=???", "tracking.uri=null", "out=null", "steps=null", "trajectory_points=1000"):
        assert name in shown


def test_the_summary_fits_a_terminal(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for i in range(3):
        write_run(tmp_path / "sweep" / str(i), i, first_id=i)
    assert command("runs=sweep", "out=found") == 0
    printed = capsys.readouterr()
    assert "…" not in printed.out
    assert re.search(r"seed +│ Spearman +│ +3 │", printed.out)
    assert "samples were scored in fewer than 3 runs" in printed.out
    assert "python -m analysis.report aggregate=found" in printed.err


def test_what_lies_beside_an_aggregate_stays_and_is_named(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    assert command("runs=run", "out=found") == 0
    (tmp_path / "found" / "report.html").touch()
    assert command("runs=run", "out=found") == 0
    assert "found/report.html is of the aggregate before: write it again" in capsys.readouterr().err
    assert (tmp_path / "found" / "report.html").exists()


@pytest.mark.slow
def test_two_real_runs_read_from_mlflow(
    tmp_path: Path, command: Command, ready_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    # Every sample is seen, so that the runs share all of them.
    line = ("debug=smoke", "data.train_samples=12", "trainer.overhead_probes=0", "engine.val_sets=domain")
    line = (*line, "data.val_samples=9", "engine.val_batch_size=3", "engine.resolution=family")
    for seed in (0, 1):
        assert command(*line, f"seed={seed}", f"hydra.run.dir=out/{seed}", main=cli.main) == 0
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = next(e for e in client.search_experiments() if client.search_runs([e.experiment_id]))
    assert command(f"runs=[{experiment.name}]", "out=found") == 0
    found = read_aggregate(tmp_path / "found")
    assert sorted(found.runs["seed"].to_pylist()) == [0, 1]
    assert None not in found.runs["run_id"].to_pylist()
    own = [pq.read_table(tmp_path / "out" / str(seed) / "values.parquet") for seed in (0, 1)]
    both = pa.concat_tables(own).group_by("sample_id").aggregate([("value", "mean"), ("value", "count")])
    both, values = both.sort_by("sample_id"), found.values.sort_by("sample_id")
    assert values["sample_id"].equals(both["sample_id"])
    assert values["runs"].to_pylist() == both["value_count"].to_pylist()
    np.testing.assert_allclose(values["value"].to_numpy(), both["value_mean"].to_numpy(), rtol=1e-12)
    assert found.correlations["differ"].to_pylist() == ["seed"]
    assert found.correlations["shared"].to_pylist() == [12]
    assert found.column_values is not None
    sums = found.column_values.group_by("sample_id").aggregate([("value", "sum")]).sort_by("sample_id")
    np.testing.assert_allclose(sums["value_sum"].to_numpy(), values["value"].to_numpy(), rtol=1e-9)
    assert "Agreement" in capsys.readouterr().out
