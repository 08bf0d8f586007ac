"""Projection runs: what they leave, how they go on after a kill, how ranks make one store, refusals."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from omegaconf import OmegaConf
from torch._guards import detect_fake_mode

from conf.command import FAILED, INTERRUPTED, MISTAKE
from conf.errors import ConfigError
from ghost import GradProjLoRAEngine, ProjectionStore
from ghost.loss import IGNORED_LABEL
from runners.data import build_data
from runners.data.base import Inputs
from runners.data.loader import collate
from runners.losses import Task, build_task
from runners.models import build_model
from runners.project import part_of, projection_config
from runners.projection_store import read_facts
from tests.runners.conftest import Line
from tests.runners.test_train import TOKENS, saved_config, series, write_tokens

ROOT = Path(__file__).resolve().parents[2]
PROJECT = [*TOKENS, "engine=gradprojlora", "engine.rank_total=16", "engine.rank_min=2", "engine.save_every=2"]
BATCHES, SAMPLES = 11, 41
# What a store holds beside its rows and its manifest.
BESIDE = {"config.yaml", "samples.parquet", "facts.json"}

Run = Callable[..., Path]


@pytest.fixture
def run(line: Line, tmp_path: Path) -> Run:
    """Runs a projection in this process and returns the store's folder."""
    write_tokens(tmp_path / "tokens")
    numbers = iter(range(100))

    def run_line(*overrides: str) -> Path:
        folder = tmp_path / f"run{next(numbers)}"
        assert line(*PROJECT, *overrides, f"hydra.run.dir={folder}") == 0
        named = [o.partition("=")[2] for o in overrides if o.startswith("engine.store=")]
        return Path(named[0]) if named else folder / "projections"

    return run_line


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Makes the next run end by an exception at its nth batch."""

    def die(batch: int, error: BaseException) -> None:
        project, calls = GradProjLoRAEngine.project, iter(range(100))

        def projected(self: GradProjLoRAEngine, *arguments: object) -> torch.Tensor:
            rehearsed = detect_fake_mode(list(self.model.parameters())) is not None
            if not rehearsed and next(calls) == batch:
                monkeypatch.setattr(GradProjLoRAEngine, "project", project)
                raise error
            return project(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(GradProjLoRAEngine, "project", projected)

    return die


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a store by name, but for locks, which are empty."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def rows(folder: Path) -> np.ndarray:
    return np.asarray(ProjectionStore.open(folder).matrix())


# ---------------------------------------------------------------- what a run leaves


def test_a_run_leaves_a_whole_store_and_a_report(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    store = ProjectionStore.open(folder)
    store.verify()
    assert store.complete
    assert store.sample_ids.tolist() == list(range(SAMPLES))
    assert len([name for name in contents(folder) if name.startswith("shard-")]) == 6
    assert set(contents(folder)) >= BESIDE
    samples = pq.read_table(folder / "samples.parquet")
    assert samples["split"].to_pylist() == ["train"] * SAMPLES
    cfg = saved_config(folder)
    assert cfg.data.path == str(folder.parents[1] / "tokens")
    assert "${" not in (folder / "config.yaml").read_text()
    names = {path.name for path in folder.parent.iterdir()} - {"git.diff"}
    files = {"config.yaml", "coverage.json", "run.log", "samples.parquet", "metrics.jsonl"}
    files |= {".run.lock", "finished.json", "tracking.json"}
    assert names == {".hydra", "projections", "environment.json", "report.html"} | files
    assert json.loads((folder.parent / "coverage.json").read_text())["left_out"] == []
    out = capsys.readouterr().out
    for part in (
        "Nearest training samples",
        "cosine",
        "rms error",
        str(folder),
        f"{SAMPLES} samples",
        "runners.search",
    ):
        assert part in out


def test_a_row_is_the_projection_of_the_samples_own_gradient(run: Run) -> None:
    """The last window is shorter than the others, and shares its batch with none."""
    folder = run("dtype=fp64")
    store, cfg = ProjectionStore.open(folder), saved_config(folder)
    data, task = build_data(cfg.data), build_task(cfg, torch.device("cpu"))
    torch.manual_seed(cfg.seed)
    model = build_model(cfg.model, data.vocab_size, None, None).double().eval()
    engine = GradProjLoRAEngine(model, projection_config(cfg, task))
    assert engine.layout == store.layout
    assert engine.projection == store.projection
    assert store.fingerprints["data"] == data.fingerprint
    engine.attach()
    for i in (0, 7, SAMPLES - 1):
        alone = collate([data.train[i]], data.train.layout)
        expected = engine.project(alone.inputs, alone.labels, task.mean)
        assert expected.abs().max() > 0
        torch.testing.assert_close(torch.tensor(store.matrix()[[i]]), expected.float(), rtol=1e-6, atol=1e-9)


def test_metrics_and_files_are_tracked_and_the_rows_are_not(line: Line, tracked_cwd: Path) -> None:
    write_tokens(tracked_cwd / "tokens")
    assert line(*PROJECT, "tracking=mlflow", "hydra.run.dir=run") == 0
    client = MlflowClient(f"sqlite:///{tracked_cwd / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ghostrunner")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    for metric in ("samples_per_second", "gb_written", "samples", "gb_stored"):
        assert found.data.metrics[f"projection/{metric}"] > 0
    assert found.data.metrics["distortion/rms"] > 0
    assert {item.path for item in client.list_artifacts(found.info.run_id)} >= {"config.yaml", "projections"}
    kept = client.list_artifacts(found.info.run_id, "projections")
    assert [item.path for item in kept] == ["projections/manifest.json"]
    steps = list(series(tracked_cwd / "run", "projection/gb_written"))
    assert steps == [2, 4, 6, 8, 10, BATCHES]


def test_tables_are_projected_too(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "model=mlp",
        "model.hidden=[8]",
        "data=digits",
        "engine=gradprojlora",
        "engine.storage=float16",
    ]
    assert line(*options, "trainer.batch_size=500", "tracking=none", "hydra.run.dir=run") == 0
    store = ProjectionStore.open(tmp_path / "run" / "projections")
    assert len(store) == 1797 - 297
    assert store.dtype == "float16"
    assert read_facts(store.directory).data.num_classes == 10
    shown = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("Search it"))
    assert shown.split()[-1] == f"store={store.directory}"  # no text: these are no words
    assert "model=mlp: these are gradients at a random start" in (tmp_path / "run" / "run.log").read_text()


def test_dropout_and_shuffling_change_nothing(run: Run) -> None:
    plain = rows(run())
    for option in ("model.config.resid_pdrop=0.5", "data.shuffle=false", "data.num_workers=1"):
        np.testing.assert_array_equal(rows(run(option)), plain)


def test_layers_are_selected_and_the_rest_is_named(run: Run) -> None:
    folder = run("layers=attn")
    names = ProjectionStore.open(folder).layout.parameters
    assert all(".attn." in name for name in names)
    assert "trainable parameters are not projected, such as" in (folder.parent / "run.log").read_text()


def test_samples_without_a_counted_label_are_counted_and_are_no_example(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Task.place

    def unlabelled(self: Task, X: Inputs, Y: torch.Tensor) -> tuple[Inputs, torch.Tensor]:
        return place(self, X, Y.index_fill(0, torch.tensor([0]), IGNORED_LABEL))

    monkeypatch.setattr(Task, "place", unlabelled)
    folder = run("engine.distortion_samples=0")
    assert (rows(folder) == 0).all(axis=1).nonzero()[0].tolist() == list(range(0, SAMPLES, 4))
    log = (folder.parent / "run.log").read_text()
    assert f"{BATCHES} samples have no label that the loss counts: their rows are zeros" in log
    assert "walk#0" not in capsys.readouterr().out


def test_a_dry_run_tells_the_sizes_that_come_out(
    line: Line, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    store = ProjectionStore.open(run())
    capsys.readouterr()
    assert line(*PROJECT, "dry_run=true", "hydra.run.dir=dry") == 0
    out = capsys.readouterr().out
    assert f"{store.layout.width:,} numbers of {len(store.layout.slices)} parameters" in out
    (told,) = [
        int(row.split("│")[2].split()[0].replace(",", "")) for row in out.splitlines() if "a sample" in row
    ]
    assert told * SAMPLES == pytest.approx(store.nbytes, rel=0.05)
    assert not Path("dry/projections").exists()


# ---------------------------------------------------------------- going on


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on_and_ends_with_the_same_bytes(
    run: Run, line: Line, dies: Callable[[int, BaseException], None], tmp_path: Path
) -> None:
    whole = run()
    dies(5, KeyboardInterrupt())
    store = tmp_path / "elsewhere" / "store"
    assert line(*PROJECT, f"engine.store={store}", "hydra.run.dir=dead") == INTERRUPTED
    log = (tmp_path / "dead" / "run.log").read_text()
    command = shlex.split(log.splitlines()[-2].partition("Go on with: ")[2])
    assert command[2:] == [*PROJECT, f"engine.store={store}"]
    assert not ProjectionStore.open(store).complete
    assert len(ProjectionStore.open(store)) == 16  # two shards of two batches of four
    assert line(*command[2:], "hydra.run.dir=again") == 0
    assert "4 of 11 batches are in the store" in (tmp_path / "again" / "run.log").read_text()
    assert contents(store) == contents(whole)


def test_a_failure_keeps_what_is_written_and_the_record_says_so(
    run: Run, line: Line, dies: Callable[[int, BaseException], None], tmp_path: Path
) -> None:
    dies(3, RuntimeError("out of luck"))
    assert line(*PROJECT, "hydra.run.dir=dead") == FAILED
    log = (tmp_path / "dead" / "run.log").read_text()
    assert "RuntimeError: out of luck" in log
    assert f"engine.store={tmp_path / 'dead' / 'projections'}" in log
    store = ProjectionStore.open(tmp_path / "dead" / "projections")
    assert len(store) == 8
    run(f"engine.store={store.directory}")
    assert ProjectionStore.open(store.directory).complete


REFUSED = {
    "trainer.batch_size=8": ["trainer.batch_size=8", "begun with trainer.batch_size=4"],
    "engine.rank_total=9": ["engine.rank_total=9", "begun with engine.rank_total=16"],
    "engine.storage=int8": ["engine.storage=int8", "float32"],
    "layers=attn": ["layers.families=[attn]", "begun with layers.families=[]"],
    "seed=3": ["seed=3", "begun with seed=0"],
    "model.config.n_embd=8": ["model.config.n_embd=8", "model.config.n_embd=16"],
    "model.path=other": ["model"],
    "data.path=others": ["data"],
}


@pytest.mark.parametrize("override", REFUSED)
def test_another_run_does_not_go_on_with_a_store(
    override: str, run: Run, line: Line, dies: Callable[[int, BaseException], None], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_tokens(tmp_path / "others", bad_window=None)
    damaged = np.fromfile(tmp_path / "others" / "walk.bin", "<u2")
    damaged[-1] = (damaged[-1] + 1) % 50
    damaged.tofile(tmp_path / "others" / "walk.bin")
    dies(3, KeyboardInterrupt())
    assert line(*PROJECT, "engine.store=store", "hydra.run.dir=dead") == INTERRUPTED
    if override == "model.path=other":
        torch.manual_seed(1)
        build_model(saved_config(tmp_path / "dead").model, 50, None, None).save_pretrained("other")  # type: ignore[operator]
    before = contents(tmp_path / "store")
    capsys.readouterr()
    words = [*PROJECT, override, "engine.store=store", "hydra.run.dir=more"]
    kept = [word for word in words if word == override or word.split("=")[0] != override.split("=")[0]]
    assert line(*kept) == MISTAKE
    last = capsys.readouterr().err.splitlines()[-1]
    for part in [*REFUSED[override], str(tmp_path / "store")]:
        assert part in last
    assert contents(tmp_path / "store") == before


def test_a_complete_store_is_refused_by_name(
    run: Run, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run()
    capsys.readouterr()
    assert line(*PROJECT, f"engine.store={folder}", "hydra.run.dir=more") == MISTAKE
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"engine.store={folder} is complete" in last
    assert f"python -m runners.search store={folder}" in last


def test_a_folder_of_other_files_is_refused_untouched(
    run: Run, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run().parent
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert line(*PROJECT, f"engine.store={other}", "hydra.run.dir=more") == MISTAKE
    assert f"engine.store={other} has config.yaml and no manifest.json" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("store", "says"),
    [
        ("tokens/walk.bin", "cannot be made a folder (File exists): choose another"),
        ("tokens/walk.bin/store", "cannot be made a folder (Not a directory): choose another"),
        ("more/store", "is in the run directory"),
    ],
)
def test_a_folder_that_cannot_be_the_stores_is_refused(
    store: str, says: str, line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of the run directory are uploaded, and a store's rows are not."""
    write_tokens(tmp_path / "tokens")
    assert line(*PROJECT, f"engine.store={store}", "hydra.run.dir=more") == MISTAKE
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / store} {says}" in last
    assert not (tmp_path / "more" / "store").exists()


def test_a_description_that_cannot_be_written_is_one_sentence(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("runners.projection_store.write_samples", full)
    write_tokens(tmp_path / "tokens")
    assert line(*PROJECT, "hydra.run.dir=run") == MISTAKE
    last = capsys.readouterr().err.splitlines()[-1]
    assert "samples.parquet cannot be written (No space left on device" in last
    assert "make room" in last


def test_a_disk_that_is_too_small_is_told_before_the_pass(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runners.project.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    folder = run()
    log = (folder.parent / "run.log").read_text()
    assert f"The store takes 0.1 MiB more, and {folder} has 0.0 MiB left: make room" in log


@pytest.mark.slow
def test_killed_processes_end_with_the_bytes_of_an_uninterrupted_one(run: Run, tmp_path: Path) -> None:
    """SIGKILL comes once there are some more shards: while the next one is computed or written."""
    options = ["data.train_samples=null", "trainer.batch_size=1", "engine.save_every=1"]
    words = [word for word in PROJECT if not word.startswith(("trainer.batch_size", "engine.save_every"))]
    whole = tmp_path / "whole" / "projections"
    command = [sys.executable, str(ROOT / "run.py"), *words, *options]
    subprocess.run([*command, "hydra.run.dir=whole"], check=True, capture_output=True, cwd=tmp_path)
    store, kills = tmp_path / "store", 0
    for number in range(30):
        process = subprocess.Popen(
            [*command, f"engine.store={store}", f"hydra.run.dir=try{number}"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        ready = len(list(store.glob("shard-*")))
        while process.poll() is None and len(list(store.glob("shard-*"))) < ready + 12:
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM if number == 1 else signal.SIGKILL)
        said = process.communicate()[1].decode()
        if process.returncode == 0:
            break
        kills += 1
        if number == 1:
            assert process.returncode == 128 + signal.SIGTERM
            assert f"engine.store={store}" in said.splitlines()[-1]
    assert kills >= 3
    assert contents(store) == contents(whole)


# ---------------------------------------------------------------- ranks


@pytest.mark.slow
def test_ranks_make_the_store_of_one_run(run: Run, line: Line, tmp_path: Path) -> None:
    whole, store = run(), tmp_path / "shared"
    options = ["engine.world_size=3", f"engine.store={store}", "hydra.sweep.dir=sweep"]
    assert line("-m", *PROJECT, *options, "engine.rank=2,0,1") == 0
    found = ProjectionStore.open(store)
    assert found.complete
    assert found.sample_ids.tolist() == list(range(SAMPLES))
    np.testing.assert_array_equal(rows(store), rows(whole))
    assert set(contents(store)) >= BESIDE
    assert "rms error" not in (tmp_path / "sweep" / "0" / "run.log").read_text()


@pytest.mark.slow
def test_a_rank_goes_on_by_itself(
    run: Run, line: Line, dies: Callable[[int, BaseException], None], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store = tmp_path / "shared"
    options = ["engine.world_size=2", f"engine.store={store}"]
    dies(3, KeyboardInterrupt())
    assert line(*PROJECT, *options, "engine.rank=1", "hydra.run.dir=dead") == INTERRUPTED
    run(*options, "engine.rank=0")
    assert "the store is complete once all are" in capsys.readouterr().out
    assert not ProjectionStore.open(store).complete
    run(*options, "engine.rank=1")
    assert "rms error" in capsys.readouterr().out
    np.testing.assert_array_equal(rows(store), rows(run()))


@pytest.mark.parametrize(
    ("samples", "batch_size", "world_size"), [(41, 4, 3), (41, 4, 11), (8, 8, 1), (9, 2, 2)]
)
def test_parts_follow_each_other(samples: int, batch_size: int, world_size: int) -> None:
    parts = [part_of(samples, batch_size, rank, world_size) for rank in range(world_size)]
    assert [number for part in parts for number in part] == list(range(-(-samples // batch_size)))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_more_ranks_than_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine.world_size=12 is more than the 11 batches .* type 11"):
        part_of(41, 4, 0, 12)


# ---------------------------------------------------------------- the record of the store


def test_the_stores_own_files_do_not_depend_on_the_run(run: Run, tmp_path: Path) -> None:
    first, second = run(), run()
    assert contents(first) == contents(second)
    cfg = OmegaConf.load(first / "config.yaml")
    assert (cfg.output_dir, cfg.engine.store, cfg.engine.rank) == (None, None, 0)
    assert json.loads((first / "manifest.json").read_text())


@pytest.mark.slow
def test_the_whole_command_shows_its_progress_and_previews_on_request(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *PROJECT, "preview=true", "hydra.run.dir=run"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "150"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sample 41/41" in done.stderr
    assert "GB written" in done.stderr
    data = build_data(saved_config(tmp_path / "run" / "projections").data)
    assert any(data.train.preview(i)[:20] in done.stdout for i in range(SAMPLES))
