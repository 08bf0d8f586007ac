"""`python -m runners.distortion`: what it measures, what it leaves behind, and what it refuses."""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.command import MISTAKE
from ghost import GhostConfig, GradProjLoRAEngine
from ghost.distortion import measured_distortion
from runners import cli, distortion
from runners.data import build_data
from runners.data.loader import train_batches
from runners.distortion_report import metrics
from runners.losses import build_task
from runners.models import build_model
from tests.ghost.reference import gradient
from tests.runners.conftest import Line
from tests.runners.test_train import TOKENS as TRAINED_ON_TOKENS
from tests.runners.test_train import saved_config, write_tokens

ROOT = Path(__file__).resolve().parents[2]

IDLE = ("trainer.", "engine.", "tracking")
TOKENS = [key for key in TRAINED_ON_TOKENS if not key.startswith(IDLE)]
DIGITS = ["model=mlp", "data=digits", "model.hidden=[16]", "hardware.threads=1"]
FEW = ["distortion.samples=9", "distortion.batch_size=4", "distortion.seeds=[0,1]"]

Measure = Callable[..., Path]


@pytest.fixture
def command(line: Line, monkeypatch: pytest.MonkeyPatch) -> Line:
    """Runs the command's own line in this process and returns the exit code."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(cli, "main", distortion.main)
    return line


@pytest.fixture
def measure(command: Line, tmp_path: Path) -> Measure:
    """Runs a line to its end and returns the run directory."""
    write_tokens(tmp_path / "tokens")
    numbers = iter(range(100))

    def run(*overrides: str) -> Path:
        folder = tmp_path / f"run{next(numbers)}"
        assert command(*overrides, "tracking=none", f"hydra.run.dir={folder}") == 0
        return folder

    return run


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "distortion.json").read_text())
    return content


def test_a_measurement_leaves_a_report_a_plot_and_a_table(
    measure: Measure, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = measure(*DIGITS, *FEW, "distortion.ranks=[16,64]", "distortion.kinds=[gaussian,orthonormal]")
    found = report(folder)
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "distortion.json", "plots", "metrics.jsonl", "run.log", "samples.parquet",
    }  # fmt: skip
    assert (folder / "plots/distortion.png").stat().st_size > 10_000
    assert (found["samples"], found["seeds"], len(set(found["sample_ids"]))) == (9, 2, 9)
    shown = [(one["rank"], one["kind"]) for one in found["measurements"]]
    assert shown == [(16, "gaussian"), (16, "orthonormal"), (64, "gaussian"), (64, "orthonormal")]
    out = capsys.readouterr().out
    for one in found["measurements"]:
        assert f"{one['rms']:.4f}" in out
        assert one["ratio"] == pytest.approx(one["rms"] / one["dense_rms"])
        assert set(one["parameters"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert sum(part["share"] for part in one["parameters"].values()) == pytest.approx(1)
        assert one["columns"] == sum(math.prod(part["kept"]) for part in one["parameters"].values())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [16, 64]
    assert lines[1]["orthonormal/rms"] == found["measurements"][3]["rms"]


def test_the_numbers_are_those_of_plain_gradients(measure: Measure) -> None:
    folder = measure(*TOKENS, *FEW, "dtype=fp64", "distortion.ranks=[16]", "distortion.kinds=[rademacher]")
    cfg = saved_config(folder)
    torch.manual_seed(cfg.seed)
    data = build_data(cfg.data)
    model = build_model(cfg.model, data.vocab_size, data.input_shape, data.num_classes, cfg.data.seq_len)
    model, task = model.double().eval(), build_task(cfg, torch.device("cpu"))
    batch = next(train_batches(data.train, 9, cfg.seed, cfg.data.shuffle, 0))
    X, Y = task.place(batch.inputs, batch.labels)
    assert isinstance(X, dict)
    grads = [
        gradient(model, task.mean(model, {key: x[i : i + 1] for key, x in X.items()}, Y[i : i + 1]))  # type: ignore[index]
        for i in range(9)
    ]
    gram = {}
    for name in grads[0]:
        flat = torch.stack([grad[name].flatten() for grad in grads])
        gram[name] = flat @ flat.T
    (found,) = report(folder)["measurements"]
    for seed, rms in enumerate(found["rms_by_seed"]):
        config = GhostConfig(
            engine="gradprojlora", loss_reduction=task.reduction, proj_rank_total=16, proj_seed=seed,
            proj_kind="rademacher",  # type: ignore[arg-type]
        )  # fmt: skip
        engine = GradProjLoRAEngine(model, config)
        engine.attach()
        rows = engine.project(X, Y, task.mean)
        engine.detach()
        assert rms == pytest.approx(measured_distortion(rows, engine.layout, gram).rms, rel=1e-7)


def test_everything_kept_has_no_error(measure: Measure) -> None:
    folder = measure(*DIGITS, *FEW, "dtype=fp64", "distortion.ranks=[2000]")
    for one in report(folder)["measurements"]:
        assert one["rms"] < 1e-10
        assert (one["dense_rms"], one["ratio"], one["recall_at_1"]) == (0, None, 1)
        assert one["spearman"] == pytest.approx(1)


@pytest.mark.parametrize(
    "choice",
    [
        ["model=bert-tiny", "data=interpreter", "data.task=text_classes", "data.seq_len=16"],
        ["model=cnn", "data=digits", "data.as_image=true", "model.channels=[4,6]"],
    ],
    ids=["bert", "cnn"],
)
def test_other_models_are_measured(measure: Measure, choice: list[str]) -> None:
    folder = measure(
        *choice, *FEW, "hardware.threads=1", "distortion.ranks=[16]", "distortion.kinds=[gaussian]"
    )
    (found,) = report(folder)["measurements"]
    assert 0 < found["dense_rms"] < 1
    assert found["spearman"] > 0


def test_layers_and_embeddings_are_chosen_as_for_projections(measure: Measure) -> None:
    few = [*TOKENS, *FEW, "distortion.ranks=[16]", "distortion.kinds=[gaussian]"]
    attention = report(measure(*few, "layers=attn"))["measurements"][0]["parameters"]
    assert attention
    assert all(".attn." in name for name in attention)
    everything = report(measure(*few))["measurements"][0]["parameters"]
    without = report(measure(*few, "distortion.include_embeddings=false"))["measurements"][0]["parameters"]
    assert set(everything) - set(without) == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_the_seed_decides_everything(measure: Measure) -> None:
    few = [*DIGITS, *FEW, "distortion.ranks=[16]"]
    first, again, other = (report(measure(*few, f"seed={seed}")) for seed in (1, 1, 2))
    assert first == again
    assert first["sample_ids"] != other["sample_ids"]


def test_dropout_is_off(measure: Measure) -> None:
    few = [*TOKENS, *FEW, "distortion.ranks=[16]", "distortion.kinds=[gaussian]"]
    assert report(measure(*few, "model.config.resid_pdrop=0.5")) == report(measure(*few))


def test_few_digits_are_said(measure: Measure) -> None:
    folder = measure(*DIGITS, *FEW, "dtype=bf16_mixed", "distortion.ranks=[16]")
    assert "dtype.autocast=bfloat16: errors include" in (folder / "run.log").read_text()


def test_left_out_samples_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        distortion._say_left_out(0)
        assert not caplog.text
        distortion._say_left_out(2)
    assert "2 samples are left out" in caplog.text


REFUSED = {
    "distortion.ranks=[8]": ["distortion.ranks=[8]", "distortion.rank_min=4 keeps 16"],
    "distortion.ranks=[]": ["distortion.ranks=[]", "one or more values"],
    "distortion.seeds=[1,1]": ["distortion.seeds=[1,1]", "each once"],
    "distortion.kinds=[gausian]": ["distortion.kinds", "gausian", "did you mean gaussian?"],
    "distortion.samples=2": ["distortion.samples=2", "distortion.samples=3 or more"],
    "distortion.samples=2000": ["distortion.samples=2000", "more than the 1500 training samples"],
    "distortion.batch_size=0": ["distortion.batch_size=0"],
    "distortion.rank=3": ["distortion.rank=3", "did you mean distortion.rank"],
    "+distortion.depth=3": ["distortion.depth: there is no such key"],
    "trainer.max_steps=3": ["trainer.max_steps=3", "there is no key trainer"],
    "dtype.score=float64": ["dtype.score=float64", "dtype.score=float32"],
    "dtype.storage=bfloat16": ["dtype.storage=bfloat16", "dtype.storage=float32"],
    "debug=smoke": ["debug is no group of this command"],
    "dtype=fp16_mixed": ["dtype.autocast=float16", "dtype=bf16_mixed"],
    "data=interpreter": ["model=mlp learns from table_classes samples"],
    "layers.include=[nowhere]": ["nowhere"],
    "layers.include=[]": ["layers.include=[]"],
    "hydra.run.dir=.": ["hydra.run.dir=. holds an earlier run"],
    "seed=-1": ["seed=-1 is too small"],
}


@pytest.mark.parametrize("override", REFUSED)
def test_mistakes_are_said_in_one_sentence(
    command: Line, override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    assert command(*DIGITS, "tracking=none", override) == MISTAKE
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    for part in REFUSED[override]:
        assert part in errors.splitlines()[-1]


def test_a_sweep_has_a_folder_for_each_job(command: Line) -> None:
    few = [*DIGITS, *FEW, "distortion.ranks=[16]", "tracking=none"]
    assert command("-m", *few, "seed=0,1", "hydra.sweep.dir=sweep") == 0
    assert report(Path("sweep/0")) != report(Path("sweep/1"))


def test_the_tracking_store_has_it_too(command: Line, tracked_cwd: Path) -> None:
    from mlflow import MlflowClient

    assert command(*DIGITS, *FEW, "distortion.ranks=[16,64]", "hydra.run.dir=out") == 0
    client = MlflowClient(f"sqlite:///{tracked_cwd / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "ghostrunner"]
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    history = client.get_metric_history(tracked.info.run_id, "gaussian/rms")
    by_rank = {m.step: m.value for m in history}
    found = report(tracked_cwd / "out")["measurements"]
    assert by_rank == {one["rank"]: one["rms"] for one in found if one["kind"] == "gaussian"}
    names = {item.path for item in client.list_artifacts(tracked.info.run_id)}
    assert {"distortion.json", "plots", "config.yaml"} <= names
    assert "Open MLflow" in (tracked_cwd / "out/run.log").read_text()


def test_help_says_what_every_key_means(command: Line, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    out = capsys.readouterr().out
    for part in (
        "distortion.ranks=[16,64,256]",
        "(gaussian | rademacher | orthonormal)",
        "seeds of the matrices",
    ):
        assert part in out


def test_metrics_leave_out_what_is_not_known() -> None:
    assert metrics([]) == {}


@pytest.mark.slow
def test_the_command_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runners.distortion", *DIGITS, *FEW, "tracking=none", "hydra.run.dir=out"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "orthonormal" in done.stdout
    assert len(report(tmp_path / "out")["measurements"]) == 9
