"""Synthetic run directories: what a run leaves, without running one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ghost.values import accumulate
from tests.analysis.command_line import in_process

__all__ = ["in_process"]
from tests.analysis.aggregates import build_aggregate

MakeRun = Callable[..., Path]
MakeAggregate = Callable[..., Path]

CONFIG = "engine:\n  name: graddotprod\noptimizer:\n  name: adamw\n  lr: 1.0e-05\nseed: 0\n"


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(
        name: str = "run",
        domains: Sequence[str] = ("code", "docs", "legal"),
        samples: int = 60,
        steps: int = 12,
        batch: int = 10,
        constant: float | None = None,
        heavy: bool = False,
        groups: int | None = None,
        parts: Sequence[str] = ("total",),
        seed: int = 0,
    ) -> Path:
        run = tmp_path / name
        (run / "scores").mkdir(parents=True)
        if len(parts) > 1:
            groups = len(parts)
        (run / "config.yaml").write_text(CONFIG.replace("seed: 0", f"seed: {seed}"))
        rng = np.random.default_rng(0)
        codes = rng.integers(0, len(domains), samples)  # of the samples, whatever the seed
        rng = np.random.default_rng([seed, 1])
        # Ids as real ones are: long, and with characters that mean something to formatters.
        ids = [f"{domains[c]}:package/module_{i:03d}.py:{i}$x" for i, c in enumerate(codes)]
        offset = 5  # running indices need not start at zero
        table = {
            "index": np.arange(samples) + offset,
            "sample_id": ids,
            "domain": [domains[c] for c in codes],
        }
        pq.write_table(pa.table(table), run / "samples.parquet")

        shards = []
        for step in range(1, steps + 1):
            chosen = rng.permutation(samples)[:batch]
            noise = rng.standard_t(1.3, batch) if heavy else rng.normal(size=batch)
            score = (noise + 0.8 * (1 - codes[chosen])) / step
            if constant is not None:
                score[:] = constant
            column = torch.tensor(score, dtype=torch.float32)
            if groups is not None:
                column = (column / groups)[:, None].expand(-1, groups).contiguous()
            shards.append(
                {
                    "step": torch.full((batch,), step),
                    "sample": torch.tensor(chosen) + offset,
                    "score": column,
                    "lr": torch.full_like(column, 1e-3),
                    "clip": torch.ones(batch),
                }
            )
        for number, part in enumerate((shards[: steps // 2], shards[steps // 2 :])):
            if part:
                merged = {key: torch.cat([shard[key] for shard in part]) for key in part[0]}
                torch.save(merged, run / "scores" / f"shard-{number:05d}.pt")
                if groups is not None:
                    columns = [
                        {"part": parts[group % len(parts)], "lr_group": group // len(parts), "val": ""}
                        for group in range(groups)
                    ]
                    (run / "scores" / f"shard-{number:05d}.json").write_text(json.dumps(columns))
        if steps == 1:  # a run that short writes one shard
            (run / "scores" / "shard-00001.pt").rename(run / "scores" / "shard-00000.pt")

        found = accumulate(shards)
        rows = (found.sample - offset).tolist()
        values = {
            "sample_id": [ids[i] for i in rows],
            "domain": [domains[codes[i]] for i in rows],
            "value": found.value.numpy(),
            "times_seen": found.times_seen.numpy(),
        }
        pq.write_table(pa.table(values), run / "values.parquet")

        with (run / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                line = {"step": step, "time": 0.0, "train/loss": 8 / step**0.3 + 0.2 * rng.normal()}
                file.write(json.dumps(line) + "\n")
                if step % max(1, steps // 4) == 0:
                    file.write(json.dumps({"step": step, "time": 0.0, "val/loss": 8.2 / step**0.28}) + "\n")
        return run

    return make


@pytest.fixture
def make_aggregate(make_run: MakeRun, tmp_path: Path) -> MakeAggregate:
    """The folder of an aggregate of so many runs, which differ by their seeds."""

    def make(runs: int = 3, columns: bool = False, **shape: object) -> Path:
        parts = ("attn", "mlp") if columns else ("total",)
        made = [make_run(f"seed{seed}", seed=seed, parts=parts, **shape) for seed in range(runs)]
        return build_aggregate(tmp_path / "aggregate", made)

    return make
