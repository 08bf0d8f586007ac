"""A run in several processes is the run of one on the whole batch: values, weights, metrics, files."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from ghost import ProjectionStore
from tests.runners.test_train import TOKENS, saved_config, series, shards, values, write_tokens

ROOT = Path(__file__).resolve().parents[2]
EXACT = 1e-10
# Float64, clipped, with samples of unequal length, and three validation batches to share. Adam divides by the
# gradient's size: where that is nothing but rounding, only a larger eps keeps it from the weights.
LINE = [
    *TOKENS, "dtype=fp64", "trainer.max_steps=5", "trainer.batch_size=2", "trainer.clip_grad_norm=0.3",
    "trainer.eval_batch_size=2", "trainer.save_model=true", "optimizer.lr=0.01", "optimizer.eps=1e-4",
    "trainer.flush_every=2",
]  # fmt: skip
DIGITS = [
    "experiment=digits", "hardware.threads=1", "tracking=none", "trainer.max_steps=3", "dtype=fp64",
    "trainer.batch_size=4",
]  # fmt: skip
# What is trained, by name; every run takes 4 micro-batches a step.
CASES = {
    "concat": [],
    "separate": ["engine.val_mode=separate", "trainer.activation_checkpointing=true"],
    "regular": ["engine=regular"],
    "pairs": ["engine.pairwise=true", "engine.val_batch_size=3", "engine.resolution=layer"],
}
STRATEGIES = ("ddp", "fsdp")
LEFT = "Rank 1 has failed, see run-rank00001.log"


@dataclass(frozen=True)
class Ended:
    """How a process has ended."""

    code: int
    said: str


def start(
    lines: Sequence[Sequence[str]], world_size: int, folder: Path, *faults: str
) -> list[subprocess.Popen[str]]:
    """So many processes that run the lines, as torchrun would start them, without its own seconds."""
    name = folder / f"lines{len(list(folder.glob('lines*')))}.json"
    name.write_text(json.dumps(lines))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.runners.distributed_worker", str(name), *faults],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {
                "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "COLUMNS": "200",
            },
        )
        for rank in range(world_size)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[Ended]:
    return [
        Ended(process.wait(), said) for process in processes for _, said in [process.communicate(timeout=300)]
    ]


def run_all(lines: Sequence[Sequence[str]], world_size: int, folder: Path) -> None:
    for process in ended(start(lines, world_size, folder)):
        assert process.code == 0, process.said


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Values, weights and metrics of two runs agree to rounding, and both know the same of their samples."""
    for name in ("train/loss", "val/loss", "train/lr", "scores/mean", "scores/negative_share"):
        assert series(ours, name) == pytest.approx(series(theirs, name), rel=EXACT, abs=1e-14), name
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (ours, theirs))
    assert weights.keys() == expected.keys()
    assert all(relative_error(weights[name], expected[name]) < EXACT for name in expected)
    assert pq.read_table(ours / "samples.parquet").equals(pq.read_table(theirs / "samples.parquet"))
    if not (theirs / "values.parquet").exists():
        assert not (ours / "values.parquet").exists()
        return
    assert values(ours) == pytest.approx(values(theirs), rel=EXACT)
    mine, wanted = (by_sample(folder) for folder in (ours, theirs))
    assert mine == wanted


def by_sample(folder: Path) -> list[tuple[int, int]]:
    """Which sample was scored in which step."""
    rows = shards(folder)
    return sorted(zip(rows["step"].tolist(), rows["sample"].tolist(), strict=True))


# ---------------------------------------------------------------- as users start it


@pytest.mark.slow
def test_torchrun_trains_one_run_in_one_directory(tmp_path: Path) -> None:
    line = [*DIGITS, "hydra.job.name=run"]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "run.py"),
            *line, "hardware=ddp", "hardware.device=cpu",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("outputs/*/*")
    assert {path.name for path in (folder / ".hydra").iterdir()} == {
        "config.yaml",
        "hydra.yaml",
        "overrides.yaml",
    }
    assert {path.name for path in (folder / "scores").iterdir()} == {
        "shard-00000-rank00000.pt", "shard-00000-rank00001.pt",
    }  # fmt: skip
    assert saved_config(folder).hardware.processes == 2
    for name in ("run.log", "run-rank00001.log"):
        assert "step 3/3" in (folder / name).read_text()
    assert done.stderr.count("step 3/3") == 1
    assert done.stdout.count("Most helpful samples") == 1
    assert re.search(r"Run it again +torchrun --nproc-per-node 2 .*run.py .*hardware=ddp", done.stdout)
    assert list(series(folder, "train/loss")) == [1, 2, 3]
    assert len(values(folder)) == 3 * 2 * 4


# ---------------------------------------------------------------- the same numbers


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, by name."""
    folder = tmp_path_factory.mktemp("runs")
    write_tokens(folder / "tokens")
    alone = [
        [*LINE, *keys, "trainer.gradient_accumulation_steps=4", f"hydra.run.dir=alone-{name}"]
        for name, keys in CASES.items()
    ]
    together = [
        [
            *LINE, *keys, "trainer.gradient_accumulation_steps=2", f"hydra.run.dir={strategy}-{name}",
            f"hardware={strategy}", "hardware.device=cpu", "hardware.threads=1",
        ]
        for name, keys in CASES.items() for strategy in STRATEGIES
    ]  # fmt: skip
    run_all(alone, 1, folder)
    run_all(together, 2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_on_the_whole_batch(runs: Path, case: str, strategy: str) -> None:
    assert_same_run(runs / f"{strategy}-{case}", runs / f"alone-{case}")


@pytest.mark.slow
def test_four_processes_are_one_on_the_whole_batch(runs: Path) -> None:
    keys = ["hardware=fsdp", "hardware.device=cpu", "hydra.run.dir=four"]
    run_all([[*LINE, *keys]], 4, runs)
    assert_same_run(runs / "four", runs / "alone-concat")


@pytest.mark.slow
def test_several_processes_write_one_store(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    line = [key for key in TOKENS if not key.startswith(("trainer.", "optimizer."))]
    line += ["dtype=fp64", "trainer.batch_size=4", "engine=gradprojlora", "engine.save_every=2"]
    run_all([[*line, "hydra.run.dir=alone"]], 1, tmp_path)
    run_all([[*line, "hydra.run.dir=together"]], 2, tmp_path)
    ours, theirs = (ProjectionStore.open(tmp_path / name / "projections") for name in ("together", "alone"))
    assert ours.complete
    assert ours.sample_ids.tolist() == theirs.sample_ids.tolist()
    assert np.array_equal(ours.matrix(), theirs.matrix())


# ---------------------------------------------------------------- runs that fail


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "codes", "first", "second"),
    [
        ("crash", (1, 1), f"{LEFT}: RuntimeError: the third update is too much", "Traceback"),
        ("mistake", (2, 2), f"{LEFT}: data.path=x is gone", "rank 1: data.path=x is gone"),
        ("kill", (1, -9), "Another process of the run has ended without a word", ""),
    ],
)  # fmt: skip
def test_no_process_waits_for_one_that_has_failed(
    fault: str, codes: tuple[int, int], first: str, second: str, tmp_path: Path
) -> None:
    line = [*DIGITS, "hardware=ddp", "hardware.device=cpu", "trainer.max_steps=6", "trainer.clip_grad_norm=1"]
    main, other = ended(start([[*line, "hydra.run.dir=run"]], 2, tmp_path, fault))
    assert (main.code, other.code) == codes
    assert first in main.said.splitlines()[-1]
    assert second in other.said
    log = (tmp_path / "run" / "run-rank00001.log").read_text()
    assert ("RuntimeError: the third update is too much" in log) == (fault == "crash")
    # What was scored before is kept by every process that could.
    assert set(shards(tmp_path / "run")["step"].tolist()) >= {0, 1}


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_said_once(tmp_path: Path) -> None:
    line = ["data=text", "data.path=nowhere", "hardware=ddp", "tracking=none", "hydra.run.dir=run"]
    main, other = ended(start([line], 2, tmp_path))
    assert (main.code, other.code) == (2, 2)
    assert "nowhere" in main.said.splitlines()[-1]
    assert "nowhere" not in other.said
    for arguments, part in (
        (["nokey=1"], "there is no key nokey"),
        (["debug=smoke"], "hardware.strategy=none is for"),
    ):
        main, other = ended(start([arguments], 2, tmp_path))
        assert (main.code, other.code) == (2, 2)
        assert part in main.said
        assert part not in other.said
        assert len(main.said.splitlines()) == 1
