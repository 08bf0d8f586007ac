"""Whole runs: what they leave behind, what their numbers are, and that they can be repeated exactly."""

import copy
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from analysis.aggregate.command import aggregate_runs
from analysis.runs import load_run, score_note
from conf.command import FAILED, MISTAKE
from ghost.batch import take_rows
from runners import train
from runners.data import build_data
from runners.data.digits import DigitSet
from runners.data.loader import collate
from runners.losses import build_task
from runners.models import build_model
from tests.ghost.reference import curvatures as reference_curvatures
from tests.ghost.reference import scores as reference_scores
from tests.runners.conftest import Line

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, SEQ_LEN = 50, 12

# A GPT-2 and a corpus of so few tokens that a run takes a moment.
TOKENS = [
    "model=gpt2-tiny", "model.config.n_embd=16", f"model.config.vocab_size={VOCABULARY}",
    "data=tokens", "data.path=tokens", "data.dtype=uint16", f"data.vocab_size={VOCABULARY}",
    f"data.seq_len={SEQ_LEN}", "data.val_samples=6", "hardware.threads=1", "tracking=none",
    "trainer.max_steps=4", "trainer.batch_size=4", "trainer.eval_every=2", "trainer.warmup_steps=0",
    "trainer.lr_schedule=constant", "trainer.clip_grad_norm=null",
]  # fmt: skip
DIGITS = ["experiment=digits", "hardware.threads=1", "tracking=none", "trainer.max_steps=4"]

Run = Callable[..., Path]
Steps = dict[int, float]


@pytest.fixture
def run(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in this process, with `tokens/` beside it, and returns the run directory."""
    monkeypatch.setattr(train, "plot_run", lambda _: [])
    monkeypatch.setattr(train, "leave_report", lambda *_: None)
    write_tokens(tmp_path / "tokens")
    numbers = iter(range(100))

    def run_line(*overrides: str) -> Path:
        folder = tmp_path / f"run{next(numbers)}"
        assert line(*overrides, f"hydra.run.dir={folder}") == 0
        return folder

    return run_line


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models of the runs that follow, as training leaves them."""
    built: list[nn.Module] = []

    def build(*arguments: Any) -> nn.Module:
        built.append(build_model(*arguments))
        return built[-1]

    monkeypatch.setattr(train, "build_model", build)
    return built


def write_tokens(folder: Path, bad_window: int | None = None) -> None:
    """41 windows to train on, the last one short, and 8 for validation; one can hold an impossible token."""
    folder.mkdir(exist_ok=True)
    # A walk around the vocabulary: there is something to learn.
    steps = np.random.default_rng(0).choice([1, 1, 1, 2, 7], size=SEQ_LEN * 48 + 5)
    tokens = (np.cumsum(steps) % VOCABULARY).astype("<u2")
    tokens[SEQ_LEN * 8 :].tofile(folder / "walk.bin")
    tokens[: SEQ_LEN * 8].tofile(folder / "val.bin")
    if bad_window is not None:
        damaged = np.fromfile(folder / "walk.bin", dtype="<u2")
        damaged[bad_window * SEQ_LEN] = VOCABULARY
        damaged.tofile(folder / "walk.bin")


def shards(folder: Path) -> dict[str, torch.Tensor]:
    """The score rows of a run, `[rows]` by column."""
    parts = [torch.load(path, weights_only=True) for path in sorted((folder / "scores").glob("shard-*.pt"))]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def values(folder: Path) -> dict[str, float]:
    table = pq.read_table(folder / "values.parquet").to_pydict()
    return dict(zip(table["sample_id"], table["value"], strict=True))


def series(folder: Path, name: str) -> Steps:
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def saved_config(folder: Path) -> DictConfig:
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    return config


# ---------------------------------------------------------------- what a run leaves behind


def test_the_command_leaves_everything_behind_and_the_tracking_store_has_it_too(tracked_cwd: Path) -> None:
    from mlflow import MlflowClient

    write_tokens(tracked_cwd / "tokens")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *TOKENS, "tracking=mlflow", "preview=true"],
        cwd=tracked_cwd, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = tracked_cwd.glob("outputs/*/*")
    for part in ("Most helpful samples", "Value by domain", "walk", str(folder), "mlflow ui", "run.py"):
        assert part in done.stdout

    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {
        *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")),
        *("config.yaml", "run.log", "coverage.json", "samples.parquet", "scores/shard-00000.pt"),
        *("values.parquet", "metrics.jsonl", "environment.json", "report.html", "tracking.json"),
        *(f"plots/{name}.png" for name in ("value_histogram", "top_bottom", "domain_value", "loss")),
    }
    assert {".run.lock", "finished.json"} <= names
    names -= {".run.lock", "finished.json"}  # of no use elsewhere, and written last of all
    assert names - {"git.diff"} == expected

    client = MlflowClient(f"sqlite:///{tracked_cwd / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ghostrunner")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == f"{folder.name[:8]} gpt2-tiny tokens"
    params = found.data.params
    assert (params["model.config.n_embd"], params["engine.val_mode"], params["seed"]) == ("16", "concat", "0")
    for tag in ("git.commit", "git.dirty", "version.torch", "version.python", "device", "data.fingerprint"):
        assert found.data.tags[tag]
    assert found.data.tags["seed"] == "0"
    for metric in (
        *("train/loss", "val/loss", "train/lr", "train/tokens_per_second"),
        *("scoring/overhead", "memory/peak_gb", "scores/mean"),
    ):
        assert metric in found.data.metrics
    artifacts = tracked_cwd / "mlartifacts"
    (root,) = [path.parent for path in artifacts.rglob("values.parquet")]
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == names - {
        "tracking.json"
    }


def test_files_have_their_columns_and_hold_only_what_was_scored(run: Run) -> None:
    folder = run(*TOKENS)
    samples = pq.read_table(folder / "samples.parquet")
    assert samples.schema.names == ["index", "sample_id", "domain", "split"]
    assert samples.schema.field("index").type == pa.int64()
    rows = shards(folder)
    assert {name: column.dtype for name, column in rows.items()} == {
        "step": torch.int64, "sample": torch.int64, "score": torch.float32, "lr": torch.float64,
        "clip": torch.float64,
    }  # fmt: skip
    assert rows["step"].tolist() == [step for step in range(4) for _ in range(4)]
    table = pq.read_table(folder / "values.parquet")
    assert table.schema == train.VALUES_SCHEMA
    ids = dict(zip(samples["index"].to_pylist(), samples["sample_id"].to_pylist(), strict=True))
    assert set(table["sample_id"].to_pylist()) == {ids[i] for i in rows["sample"].tolist()}
    assert len(samples) == 41 + 6
    assert table.num_rows == 16
    assert set(table["times_seen"].to_pylist()) == {1}
    coverage = json.loads((folder / "coverage.json").read_text())
    assert coverage["scored_parameter_share"] == 1.0
    assert OmegaConf.load(folder / ".hydra/overrides.yaml") == TOKENS


def test_the_saved_config_is_resolved(run: Run) -> None:
    folder = run(*TOKENS)
    text = (folder / "config.yaml").read_text()
    assert "${" not in text
    assert "???" not in text
    assert saved_config(folder).output_dir == str(folder)


def test_scores_are_flushed_every_so_many_steps(run: Run) -> None:
    folder = run(*TOKENS, "trainer.max_steps=5", "trainer.flush_every=2")
    steps = [
        torch.load(path, weights_only=True)["step"].unique().tolist()
        for path in sorted((folder / "scores").iterdir())
    ]
    assert steps == [[0, 1], [2, 3], [4]]


def test_plain_training_scores_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(*TOKENS, "engine=regular")
    names = {path.name for path in folder.iterdir()}
    files = {"config.yaml", "run.log", "samples.parquet", "metrics.jsonl", "environment.json"}
    files |= {".run.lock", "finished.json", "tracking.json"}
    assert names - {"git.diff"} == {".hydra"} | files
    assert list(series(folder, "train/loss")) == [1, 2, 3, 4]
    assert not series(folder, "scoring/overhead")
    assert "helpful" not in capsys.readouterr().out


def test_metrics_are_of_the_step_they_stand_at(run: Run) -> None:
    folder = run(
        *TOKENS, "optimizer=sgd", "optimizer.lr=0.5", "trainer.lr_schedule=cosine", "trainer.warmup_steps=1"
    )
    rows = shards(folder)
    used = {int(step) + 1: float(lr) for step, lr in zip(rows["step"], rows["lr"], strict=True)}
    assert series(folder, "train/lr") == used
    assert list(series(folder, "val/loss")) == [0, 2, 4]
    assert series(folder, "val/loss")[4] < series(folder, "val/loss")[0]
    log = (folder / "run.log").read_text()
    assert log.count("Dot products by algebra, for these batches: ") == 1
    assert " matrices" in log


def test_an_evaluation_alone_trains_and_values_nothing(run: Run) -> None:
    folder = run(*TOKENS, "trainer.eval_only=true")
    (loss,) = series(folder, "val/loss").values()
    assert f"Validation loss {loss:.4f} over 6 samples" in (folder / "run.log").read_text()
    names = {path.name for path in folder.iterdir()}
    assert not names & {"scores", "values.parquet", "coverage.json", "plots"}
    assert series(folder, "val/loss") == {0: series(run(*TOKENS), "val/loss")[0]}


def test_an_evaluation_alone_is_a_finished_tracked_run_with_its_files(run: Run, tracked_cwd: Path) -> None:
    run(*TOKENS, "trainer.eval_only=true", "tracking=mlflow")
    (root,) = [path.parent for path in (tracked_cwd / "mlartifacts").rglob("metrics.jsonl")]
    assert (root / "config.yaml").is_file()


# ---------------------------------------------------------------- runs that fail


def failed_run(cwd: Path) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{cwd / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ghostrunner")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id)}
    return found, artifacts


def test_a_run_that_fails_in_training_keeps_what_was_scored(
    line: Line, tracked_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokens(tracked_cwd / "tokens")
    taken = iter(range(100))

    def explode(*_: Any) -> None:
        if next(taken) == 2:
            raise RuntimeError("the third update is too much")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", explode)
    ended = line(*TOKENS, "tracking=mlflow", "trainer.clip_grad_norm=1", "hydra.run.dir=failed")
    assert ended == FAILED
    folder = tracked_cwd / "failed"
    for name in ("run.log", "traceback.txt"):
        text = (folder / name).read_text()
        assert "Traceback" in text
        assert "RuntimeError: the third update is too much" in text
    rows = shards(folder)
    assert rows["step"].unique().tolist() == [0, 1, 2]
    # The third step was scored, but its update never came, so it is credited nothing.
    assert [float(clip) for clip in rows["clip"]] == pytest.approx(8 * [1.0] + 4 * [0.0])
    found, artifacts = failed_run(tracked_cwd)
    assert found.info.status == "FAILED"
    assert "traceback.txt" in artifacts
    assert "the third update is too much" in found.data.tags["error"]
    assert not (folder / "values.parquet").exists()


def test_a_bad_token_in_a_late_window_is_one_sentence(
    line: Line, tracked_cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokens(tracked_cwd / "tokens", bad_window=9)
    assert line(*TOKENS, "tracking=mlflow", "data.shuffle=false", "hydra.run.dir=failed") == MISTAKE
    last = capsys.readouterr().err.splitlines()[-1]
    assert "walk.bin holds the token 50 between the tokens 108 and 120, and the vocabulary has 50" in last
    rows = shards(tracked_cwd / "failed")
    assert rows["sample"].tolist() == list(range(8))
    found, artifacts = failed_run(tracked_cwd)
    assert found.info.status == "FAILED"
    assert "traceback.txt" in artifacts


def test_a_directory_with_an_earlier_run_is_refused_untouched(
    run: Run, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*TOKENS)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert line(*TOKENS, "seed=1", f"hydra.run.dir={folder}") == MISTAKE
    assert "holds an earlier run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_jobs_of_a_sweep_do_not_share_a_directory(
    run: Run, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["seed=0,1", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=same"]
    assert line("-m", *TOKENS, *options) == MISTAKE
    assert "hydra.sweep.subdir=same is the directory of job 0" in capsys.readouterr().err


# ---------------------------------------------------------------- numbers


def test_values_are_the_sums_of_score_times_rate_times_clipping(run: Run) -> None:
    folder = run(
        *TOKENS, "trainer.max_steps=25", "trainer.clip_grad_norm=0.5", "trainer.lr_schedule=linear",
        "trainer.warmup_steps=2",
    )  # fmt: skip
    rows = shards(folder)
    assert float(rows["clip"].max()) < 1  # clipping was at work
    ids = pq.read_table(folder / "samples.parquet")["sample_id"].to_pylist()
    expected: dict[str, list[float]] = {}
    for sample, score, lr, clip in zip(
        *(rows[name].double().tolist() for name in ("sample", "score", "lr", "clip")), strict=True
    ):
        expected.setdefault(ids[int(sample)], []).append(score * lr * clip)
    assert values(folder) == pytest.approx({name: sum(parts) for name, parts in expected.items()}, rel=1e-12)
    seen = pq.read_table(folder / "values.parquet").to_pydict()
    assert dict(zip(seen["sample_id"], seen["times_seen"], strict=True)) == {
        name: len(parts) for name, parts in expected.items()
    }


@pytest.mark.parametrize(("optimizer", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_values_of_the_optimizers_own_step(
    run: Run, optimizer: str, kind: type[torch.optim.Optimizer]
) -> None:
    """Each step is replayed as below, of one sample each: it is credited with what it adds to the step, and
    over all steps to come with the whole effect that momentum spreads over them.
    """
    found = {}
    for credit in ("step", "trajectory"):
        folder = run(
            *TOKENS, "dtype=fp64", f"optimizer={optimizer}", "optimizer.weight_decay=0.2",
            "trainer.batch_size=1", "engine.val_mode=separate", "engine.preconditioner=auto",
            f"engine.credit={credit}",
        )  # fmt: skip
        found[credit] = shards(folder)
    cfg, rows = saved_config(folder), found["step"]
    data, task = build_data(cfg.data), build_task(cfg, torch.device("cpu"))
    torch.manual_seed(cfg.seed)
    model = build_model(cfg.model, data.vocab_size, None, None).double()
    settings = {"lr": cfg.optimizer.lr, "weight_decay": 0.2, "eps": cfg.optimizer.eps}
    real = kind(model.parameters(), betas=tuple(cfg.optimizer.betas), **settings)
    val = collate([data.val[i] for i in range(6)], data.val.layout)
    for step, sample in enumerate(rows["sample"].tolist()):
        params = list(model.parameters())
        val_grad = torch.autograd.grad(task.mean(model, val.inputs, val.labels), params)
        batch = collate([data.train[sample]], data.train.layout)
        grads = torch.autograd.grad(task.mean(model, batch.inputs, batch.labels), params)
        ends = []
        for share in (0.0, 1.0):
            other, its = copy.deepcopy((model, real))
            for p, grad in zip(other.parameters(), grads, strict=True):
                p.grad = share * grad
            its.step()
            ends.append([p.detach() for p in other.parameters()])
        fall = sum((g * (idle - moved)).sum() for g, idle, moved in zip(val_grad, *ends, strict=True))
        value = rows["score"][step] * rows["lr"][step] * rows["clip"][step]
        torch.testing.assert_close(value, fall, rtol=1e-8, atol=0)
        whole = rows["score"][step] * (1 - 0.9 ** (step + 1)) / (1 - 0.9)
        torch.testing.assert_close(found["trajectory"]["score"][step], whole, rtol=1e-12, atol=0)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        real.step()


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_logged_scores_are_those_of_plain_autograd_for_the_logged_samples(run: Run, val_mode: str) -> None:
    """Each step is replayed from the saved config: the samples by their logged ids, the weights by SGD."""
    folder = run(
        *TOKENS, "dtype=fp64", "optimizer=sgd", "optimizer.lr=0.5", f"engine.val_mode={val_mode}", "seed=3"
    )
    cfg, rows = saved_config(folder), shards(folder)
    data, task = build_data(cfg.data), build_task(cfg, torch.device("cpu"))
    torch.manual_seed(cfg.seed)
    model = build_model(cfg.model, data.vocab_size, None, None).double()
    assert rows["sample"].tolist() != sorted(rows["sample"].tolist())  # shuffled
    for step in range(cfg.trainer.max_steps):
        here = rows["step"] == step
        batch = collate([data.train[i] for i in rows["sample"][here].tolist()], data.train.layout)
        per_step = cfg.engine.val_batch_size
        used = [(step * per_step + k) % 6 for k in range(per_step)] if val_mode == "concat" else range(6)
        val = collate([data.val[i] for i in used], data.val.layout)
        expected = reference_scores(
            model, task.mean, (batch.inputs, batch.labels), (val.inputs, val.labels), task.reduction
        )
        torch.testing.assert_close(rows["score"][here], expected, rtol=1e-9, atol=1e-15)
        grads = torch.autograd.grad(task.mean(model, batch.inputs, batch.labels), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= cfg.optimizer.lr * g


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_a_policy_trains_on_what_it_keeps(run: Run, val_mode: str) -> None:
    """Each step is replayed: the best half by plain autograd's scores, and their mean loss's gradient."""
    folder = run(
        *TOKENS, "dtype=fp64", "optimizer=sgd", "optimizer.lr=0.5", f"engine.val_mode={val_mode}",
        "engine.val_batch_size=6", "policy=top_k", "trainer.gradient_accumulation_steps=2",
    )  # fmt: skip
    cfg, rows = saved_config(folder), shards(folder)
    data, task = build_data(cfg.data), build_task(cfg, torch.device("cpu"))
    torch.manual_seed(cfg.seed)
    model = build_model(cfg.model, data.vocab_size, None, None).double()
    val = collate([data.val[i] for i in range(6)], data.val.layout)
    expected: dict[str, float] = {}
    for step in range(cfg.trainer.max_steps):
        here = rows["step"] == step
        samples = rows["sample"][here].tolist()
        batch = collate([data.train[i] for i in samples], data.train.layout)
        scores = reference_scores(
            model, task.mean, (batch.inputs, batch.labels), (val.inputs, val.labels), task.reduction
        )
        torch.testing.assert_close(rows["score"][here], scores, rtol=1e-9, atol=1e-15)
        kept = scores.topk(4).indices
        weights = torch.zeros_like(scores)
        weights[kept] = 2.0  # all samples have as many tokens
        torch.testing.assert_close(rows["weight"][here], weights, rtol=1e-12, atol=0)
        for i, value in zip(samples, 0.5 * weights * scores, strict=True):
            expected[data.train.sample_ids[i]] = expected.get(data.train.sample_ids[i], 0.0) + float(value)
        chosen = take_rows(batch.inputs, kept), batch.labels[kept]
        grads = torch.autograd.grad(task.mean(model, *chosen), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= cfg.optimizer.lr * g
    assert values(folder) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert set(series(folder, "policy/kept").values()) == {4.0}
    assert series(folder, "policy/effective_samples")[1] == pytest.approx(4.0)
    assert "as policy top_k weighed them" in score_note(load_run(folder).config)


def test_steps_that_a_policy_empties_move_nothing(run: Run) -> None:
    folder = run(
        *TOKENS, "policy=threshold", "policy.above=1e9", "trainer.clip_grad_norm=1.0",
        "optimizer.weight_decay=0.5",
    )  # fmt: skip
    assert set(series(folder, "policy/kept").values()) == {0.0}
    assert set(series(folder, "policy/effective_samples").values()) == {0.0}
    assert len(set(series(folder, "val/loss").values())) == 1
    assert set(values(folder).values()) == {0.0}


def test_second_order_values_are_those_of_plain_autograd(run: Run) -> None:
    """Each step is replayed as above, with an accumulated step and a clipped one; the tables over runs and
    the run's own have the same values.
    """
    folder = run(
        *TOKENS, "dtype=fp64", "optimizer=sgd", "optimizer.lr=0.5", "engine.val_mode=separate",
        "engine.order=2", "trainer.gradient_accumulation_steps=2", "trainer.clip_grad_norm=0.8",
    )  # fmt: skip
    cfg, rows = saved_config(folder), shards(folder)
    data, task = build_data(cfg.data), build_task(cfg, torch.device("cpu"))
    torch.manual_seed(cfg.seed)
    model = build_model(cfg.model, data.vocab_size, None, None).double()
    val = collate([data.val[i] for i in range(6)], data.val.layout)
    held_out = val.inputs, val.labels
    expected: dict[str, float] = {}
    clips = []
    for step in range(cfg.trainer.max_steps):
        here = rows["sample"][rows["step"] == step].tolist()
        batch = collate([data.train[i] for i in here], data.train.layout)
        train_rows = batch.inputs, batch.labels
        what = model, task.mean, train_rows, held_out, task.reduction
        scores, curvatures = reference_scores(*what), reference_curvatures(*what)
        torch.testing.assert_close(rows["curvature"][rows["step"] == step], curvatures, rtol=1e-9, atol=1e-15)
        model.zero_grad()
        task.mean(model, *train_rows).backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.8))
        moved = 0.5 * min(1.0, 0.8 / (norm + 1e-6))  # torch adds 1e-6
        clips.append(norm > 0.8)
        for i, value in zip(here, scores * moved - curvatures * moved**2 / 2, strict=True):
            sample_id = data.train.sample_ids[i]
            expected[sample_id] = expected.get(sample_id, 0.0) + float(value)
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert any(clips)
    assert values(folder) == pytest.approx(expected, rel=1e-7)
    (table,) = aggregate_runs([load_run(folder)], steps=None, points=10)["values"]
    over_runs = dict(zip(table["sample_id"].to_pylist(), table["value"].to_pylist(), strict=True))
    assert over_runs == pytest.approx(expected, rel=1e-7)


def test_the_seed_decides_everything(run: Run, models: list[nn.Module]) -> None:
    first, again, other = (run(*TOKENS, f"seed={seed}") for seed in (4, 4, 5))
    assert values(first) == values(again)
    assert series(first, "val/loss") == series(again, "val/loss")
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert values(first).keys() != values(other).keys()
    assert not torch.equal(weights(models[0]), weights(models[2]))


def test_workers_change_nothing(run: Run) -> None:
    assert values(run(*TOKENS)) == values(run(*TOKENS, "data.num_workers=1"))


HARD = [
    "trainer.max_steps=6", "trainer.clip_grad_norm=0.5", "trainer.lr_schedule=cosine",
    "trainer.warmup_steps=2", "trainer.overhead_probes=3", "engine.val_mode=separate",
    "engine.val_batch_size=4",
]  # fmt: skip


@pytest.mark.parametrize(
    "extra", [[], ["model.config.resid_pdrop=0.2"], ["trainer.gradient_accumulation_steps=2"]]
)
def test_scoring_beside_the_backward_leaves_training_bit_identical(
    run: Run, models: list[nn.Module], extra: list[str]
) -> None:
    scored = run(*TOKENS, *HARD, "engine.bitwise=true", *extra)
    plain = run(*TOKENS, *HARD[:-2], "engine=regular", *extra)
    assert series(scored, "scoring/overhead")  # probes were at work
    for name in ("train/loss", "val/loss", "train/lr"):
        assert series(scored, name) == series(plain, name)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert len(set(series(plain, "train/loss").values())) == 6


def test_joint_training_agrees_with_plain_training_to_rounding(run: Run, models: list[nn.Module]) -> None:
    scored, plain = run(*TOKENS, "dtype=fp64"), run(*TOKENS, "dtype=fp64", "engine=regular")
    for name in ("train/loss", "val/loss"):
        assert series(scored, name) == pytest.approx(series(plain, name), rel=1e-10)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_accumulation_equals_one_large_batch(run: Run, models: list[nn.Module], val_mode: str) -> None:
    options = [
        *TOKENS, "dtype=fp64", "optimizer=sgd", "optimizer.lr=0.5", "trainer.clip_grad_norm=0.5",
        f"engine.val_mode={val_mode}", "engine.val_batch_size=2", "trainer.max_steps=6",
    ]  # fmt: skip
    small = run(*options, "trainer.batch_size=4", "trainer.gradient_accumulation_steps=2")
    large = run(*options, "trainer.batch_size=8")
    assert shards(small)["sample"].tolist() == shards(large)["sample"].tolist()
    torch.testing.assert_close(shards(small)["score"], shards(large)["score"], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=0, atol=1e-12)
    for name in ("train/loss", "val/loss"):
        assert series(small, name) == pytest.approx(series(large, name), rel=1e-12)
    assert values(small) == pytest.approx(values(large), rel=1e-9)


def test_the_validation_gradient_does_not_depend_on_its_micro_batches(run: Run) -> None:
    options = [*TOKENS, "dtype=fp64", "engine.val_mode=separate"]
    parts, whole = (run(*options, f"engine.val_batch_size={size}") for size in (4, 6))
    torch.testing.assert_close(shards(parts)["score"], shards(whole)["score"], rtol=1e-9, atol=1e-15)


def test_layers_that_are_not_scored_are_trained_all_the_same(run: Run, models: list[nn.Module]) -> None:
    part = run(*TOKENS, "dtype=fp64", "layers=attn")
    whole = run(*TOKENS, "dtype=fp64")
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=0, atol=1e-9)
    assert not torch.allclose(shards(part)["score"], shards(whole)["score"])
    assert json.loads((part / "coverage.json").read_text())["scored_parameter_share"] < 1


def test_a_pattern_that_no_layer_has_is_refused(
    run: Run, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line(*TOKENS, "layers.include=[nowhere.*]") == MISTAKE
    assert "nowhere.*" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- models, data, formats


def test_wrong_labels_get_lower_values_than_right_ones(run: Run) -> None:
    folder = run("experiment=digits", "hardware.threads=1", "tracking=none")
    cfg = saved_config(folder)
    samples = build_data(cfg.data).train
    found = values(folder)
    assert isinstance(samples, DigitSet)
    value = np.array([found[name] for name in samples.sample_ids])  # [1500]
    assert value[samples.noisy].mean() < 0 < value[~samples.noisy].mean()
    lowest = np.argsort(value)[:150]
    assert samples.noisy.sum() == 150
    assert samples.noisy[lowest].mean() > 0.6  # 0.1 by chance


def test_plain_json_lines_need_no_fields_and_unread_ones_are_logged(run: Run, tmp_path: Path) -> None:
    rows = [{"text": f"{i} bottles of beer on the wall " * 4, "domain": "songs"} for i in range(12)]
    (tmp_path / "beer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["data=text", "data.path=beer.jsonl", "data.seq_len=16", "data.val_samples=2"]
    tiny = ["model=gpt2-tiny", "model.config.n_embd=8", "trainer.max_steps=1", "trainer.warmup_steps=0"]
    tiny += ["engine.val_batch_size=2", "hardware.threads=1"]
    plain = run(*options, *tiny, "tracking=none")
    assert set(pq.read_table(plain / "values.parquet")["domain"].to_pylist()) == {"beer"}
    assert "Fields that are not read: domain (data.domain_field" in (plain / "run.log").read_text()
    named = run(*options, *tiny, "tracking=none", "data.domain_field=domain")
    assert set(pq.read_table(named / "values.parquet")["domain"].to_pylist()) == {"songs"}
    assert "not read" not in (named / "run.log").read_text()


@pytest.mark.parametrize("val_mode", ["concat", "separate"])
def test_images(run: Run, val_mode: str) -> None:
    folder = run(
        *DIGITS, "model=cnn", "data.as_image=true", "model.channels=[4,6]", f"engine.val_mode={val_mode}"
    )
    assert len(values(folder)) == 64
    assert series(folder, "train/samples_per_second")
    assert json.loads((folder / "coverage.json").read_text())["unscored_parameters"] == []


@pytest.mark.parametrize("base", [TOKENS, DIGITS], ids=["tokens", "digits"])
@pytest.mark.parametrize("dtype", ["fp64", "bf16", "bf16_mixed", "fp16_mixed"])
def test_number_formats_do_what_they_say(
    run: Run, models: list[nn.Module], dtype: str, base: list[str]
) -> None:
    folder = run(*base, f"dtype={dtype}")
    cfg = saved_config(folder)
    assert {p.dtype for p in models[0].parameters()} == {getattr(torch, cfg.dtype.model)}
    score = shards(folder)["score"]
    assert score.dtype == getattr(torch, cfg.dtype.storage)
    reference = shards(run(*base, "dtype=fp64"))["score"]
    close = torch.nn.functional.cosine_similarity(score[:4].double(), reference[:4], dim=0)
    assert float(close) > (1 - 1e-12 if dtype == "fp64" else 0.98)


@pytest.mark.slow
def test_compiled_training_agrees_with_eager(run: Run) -> None:
    compiled = run(*TOKENS, "trainer.compile=true", "model.config.n_layer=1")
    eager = run(*TOKENS, "model.config.n_layer=1")
    torch.testing.assert_close(shards(compiled)["score"], shards(eager)["score"], rtol=1e-3, atol=1e-6)
    assert series(compiled, "val/loss") == pytest.approx(series(eager, "val/loss"), rel=1e-4)


def test_a_saved_model_is_trained_on(run: Run, models: list[nn.Module]) -> None:
    run(*TOKENS)
    models[0].save_pretrained("saved")  # type: ignore[operator]
    more = run(*TOKENS, "model.path=saved")
    first = evaluate_directly(more, models[0])
    assert series(more, "val/loss")[0] == pytest.approx(first, rel=1e-6)


def evaluate_directly(folder: Path, model: nn.Module) -> float:
    cfg = saved_config(folder)
    val = build_data(cfg.data).val
    batch = collate([val[i] for i in range(len(val))], val.layout)
    with torch.no_grad():
        inputs = take_rows(batch.inputs, slice(None))
        return float(build_task(cfg, torch.device("cpu")).mean(model.eval(), inputs, batch.labels))


@pytest.mark.slow
def test_the_main_job_runs_on_the_real_gpt2(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "run.py"), "engine=graddotprod", "model=gpt2", "tracking=none",
            "trainer.max_steps=2", "trainer.batch_size=2", "data.train_samples=12", "data.val_samples=3",
            "data.seq_len=32", "hydra.run.dir=out",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/coverage.json").read_text())["parameters"] == 124_439_808
    assert len(values(tmp_path / "out")) == 4


# ---------------------------------------------------------------- again


def test_the_printed_command_gives_the_same_values(
    run: Run, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    tricky = [
        "layers.include=[transformer.h.*, '*wte*']",
        "model.name='two words'",
        "optimizer.betas=[0.8, 0.9]",
    ]
    folder = run(*TOKENS, *tricky)
    (command,) = [
        row.removeprefix("Run it again").strip()
        for row in capsys.readouterr().out.splitlines()
        if row.startswith("Run it again")
    ]
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "run.py")
    assert line(*arguments, "hydra.run.dir=again") == 0
    assert values(Path("again")) == values(folder)
    assert saved_config(Path("again")).model.name == "two words"


@pytest.mark.parametrize(
    "overrides",
    [
        [*TOKENS, "optimizer=sgd", "trainer.clip_grad_norm=0.5", "engine.val_mode=separate"],
        ["model=cnn", "data=digits", "data.as_image=true", "engine=regular", "tracking=none", "debug=short"],
    ],
    ids=["tokens", "digits"],
)
def test_a_saved_config_starts_the_run_again(run: Run, overrides: list[str]) -> None:
    first = run(*overrides)
    again = run(f"experiment={first}/config.yaml")
    assert saved_config(again).output_dir == str(again)
    left, right = (
        {
            key: value
            for key, value in OmegaConf.to_container(saved_config(folder)).items()
            if key != "output_dir"
        }  # type: ignore[union-attr]
        for folder in (first, again)
    )
    assert left == right
    assert series(first, "train/loss") == series(again, "train/loss")
    if "engine=regular" not in overrides:
        assert values(first) == values(again)


def test_a_tracked_run_starts_again_by_its_id(
    line: Line, tracked_cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def started_in(folder: str, *arguments: str) -> Path:
        assert line(f"hydra.run.dir={folder}", *arguments) == 0
        return tracked_cwd / folder

    first = started_in("first", *[key for key in DIGITS if key != "tracking=none"])
    (run_id,) = [folder.name for folder in (tracked_cwd / "mlartifacts").iterdir()]
    again = started_in("again", f"experiment=runs:/{run_id}")
    assert values(first) == values(again)
    capsys.readouterr()
    assert line("experiment=runs:/nothing") == MISTAKE
    assert "runs:/nothing/config.yaml is not in sqlite:///" in capsys.readouterr().err


def test_keys_beside_a_saved_config_win_and_groups_are_refused(
    run: Run, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(*DIGITS)
    again = run(f"experiment={first}/config.yaml", "trainer.max_steps=2", "seed=7")
    assert (saved_config(again).trainer.max_steps, saved_config(again).seed) == (2, 7)
    assert saved_config(again).optimizer.name == "sgd"
    capsys.readouterr()
    for argument in ("model=gpt2", "tracking=mlflow", "debug=smoke"):
        assert line(f"experiment={first}/config.yaml", argument) == MISTAKE
        assert f"{argument} has no effect with experiment=" in capsys.readouterr().err


def test_a_saved_config_beats_the_machines_own_settings(run: Run, tmp_path: Path) -> None:
    first = run(*DIGITS)
    (tmp_path / "more/local").mkdir(parents=True)
    (tmp_path / "more/local/default.yaml").write_text(
        "# @package _global_\ndefaults: [{override /optimizer: adamw}]\nseed: 9\npreview: true\n"
    )
    machine = f"--config-dir={tmp_path / 'more'}"
    assert saved_config(run(machine, "debug=short", "tracking=none", *TOKENS)).seed == 9
    again = run(machine, f"experiment={first}/config.yaml")
    assert (saved_config(again).optimizer.name, saved_config(again).seed) == ("sgd", 0)
    assert values(again) == values(first)


def test_a_part_of_a_saved_config_is_refused(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("output_dir: x\nmodel: {kind: mlp}\n")
    assert line("experiment=config.yaml") == MISTAKE
    assert "data.kind is missing" in capsys.readouterr().err


def test_a_dry_run_builds_nothing(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("dry_run=true", "debug=smoke") == 0
    (folder,) = tmp_path.glob("outputs/*/*")
    assert {path.name for path in folder.iterdir()} == {".hydra", ".run.lock", "run.log"}
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    out = capsys.readouterr().out
    for part in ("parameters", "memory: total", "output directory"):
        assert part in out


def test_a_sweep_runs_each_seed_in_a_directory_of_its_own(run: Run, line: Line) -> None:
    assert line("-m", *TOKENS, "seed=0,1", "hydra.sweep.dir=sweep") == 0
    assert values(Path("sweep/0")) == values(run(*TOKENS, "seed=0"))
    assert values(Path("sweep/1")) != values(Path("sweep/0"))


def test_runs_of_the_same_second_have_directories_of_their_own(line: Line, tmp_path: Path) -> None:
    for _ in range(2):
        assert line("dry_run=true", "model=mlp", "data=digits") == 0
    names = [path.name for path in tmp_path.glob("outputs/*/*")]
    assert len(names) == 2
    assert all(len(name.split("-")) == 4 for name in names)  # microseconds come last


def test_a_run_leaves_a_report_without_text(line: Line, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    assert line(*TOKENS, f"hydra.run.dir={tmp_path / 'run'}") == 0
    page = (tmp_path / "run" / "report.html").read_text()
    values = pq.read_table(tmp_path / "run" / "values.parquet").to_pylist()
    assert max(values, key=lambda row: row["value"])["sample_id"] in page
    assert "<q>" not in page
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["device"] in page
    assert environment["version.torch"] == torch.__version__


def test_the_report_has_first_words_where_asked_for(line: Line, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    assert line(*TOKENS, "report_text=true", f"hydra.run.dir={tmp_path / 'run'}") == 0
    assert (tmp_path / "run" / "report.html").read_text().count("<q>") > 4


def test_a_report_that_cannot_be_written_ends_no_run(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Path:
        raise OSError("no space left")

    write_tokens(tmp_path / "tokens")
    monkeypatch.setattr("runners.report.write_run_report", refuse)
    assert line(*TOKENS, f"hydra.run.dir={tmp_path / 'run'}") == 0
    assert "The report could not be written: no space left" in (tmp_path / "run" / "run.log").read_text()
    assert (tmp_path / "run" / "values.parquet").is_file()


@pytest.mark.parametrize("overrides", [["engine=regular"], ["trainer.eval_only=true"]])
def test_runs_without_values_leave_a_report_too(line: Line, tmp_path: Path, overrides: list[str]) -> None:
    write_tokens(tmp_path / "tokens")
    assert line(*TOKENS, *overrides, f"hydra.run.dir={tmp_path / 'run'}") == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Validation loss" in page
    assert "Not in this report" not in page
