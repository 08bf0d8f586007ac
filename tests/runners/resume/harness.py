"""Runs in processes of their own, and whether two runs have left the same."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parents[3]

DIGITS = [
    "experiment=digits", "model.hidden=[16]", "hardware.threads=1", "trainer.max_steps=8",
    "trainer.eval_every=3", "trainer.checkpoint_every=2", "trainer.flush_every=3", "trainer.batch_size=8",
]  # fmt: skip
"""A run of eight steps, with four checkpoints and shards between them."""


@dataclass(frozen=True)
class Started:
    """A running command.

    Attributes:
        log: What it prints, and all before it in the test.
        wait: Waits for the exit status, negative for a signal's number.
    """

    pid: int
    log: Path
    wait: Callable[[], int]

    def send(self, number: signal.Signals) -> None:
        """Signal it and the processes that it has started."""
        os.killpg(self.pid, number)

    @property
    def changes(self) -> int:
        """How often it changed names on disk; known once it has ended by itself."""
        return int(Path(f"{self.log}.changes").read_text())

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for something that the run does."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.said
            time.sleep(0.002)


CLOCKS = ("time", "_per_second", "memory/", "scoring/overhead")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without clocks and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not any(part in name for part in CLOCKS)}
        for line in lines
    ]


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def same(a: Any, b: Any) -> bool:
    """Whether nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def assert_same_runs(whole: Path, other: Path) -> None:
    """Values, metrics, and all of the last training state but the number of shards and timings."""
    assert metrics(other) == metrics(whole)
    for table in ("values.parquet", "values_by_column.parquet"):
        assert (whole / table).exists() == (other / table).exists()
        if (whole / table).exists():
            assert pq.read_table(other / table).equals(pq.read_table(whole / table))
    mine, its = last_checkpoint(whole), last_checkpoint(other)
    assert mine.name == its.name
    names = sorted(path.name for path in mine.glob("*.pt"))
    assert names == sorted(path.name for path in its.glob("*.pt"))
    for name in names:
        a, b = (torch.load(folder / name, weights_only=True) for folder in (mine, its))
        for state in (a, b):
            state.get("loop", {}).pop("overhead", None)
            state.get("manager", {}).pop("shards", None)
        assert same(a, b), name
    assert not list(other.rglob(".*.partial"))
