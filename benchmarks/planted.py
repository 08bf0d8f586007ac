"""Do the values mean something? A planted domain of token-shuffled text must rank lowest within its steps.

`python -m benchmarks.planted [--seeds 3] [overrides …]` runs `run.py experiment=planted` once a seed and
compares domains by the mean rank (0 lowest, 1 highest) that their samples' scores have within their steps:
steps differ in scale, ranks do not.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from analysis.runs import load_run
from benchmarks.common import report

PROJECT = Path(__file__).resolve().parent.parent


def ranks_within_steps(run_dir: Path) -> dict[str, float]:
    """Mean rank of each domain's samples within their steps, in [0, 1]."""
    run = load_run(run_dir)
    domains = run.samples["domain"].to_pylist()
    found: dict[str, list[float]] = defaultdict(list)
    for shard in run.scores():
        for step in shard["step"].unique():
            rows = shard["step"] == step
            ranks = torch.argsort(torch.argsort(shard["score"][rows])).double()
            ranks /= len(ranks) - 1
            for sample, rank in zip(shard["sample"][rows].tolist(), ranks.tolist(), strict=True):
                found[domains[sample]].append(rank)
    return {domain: sum(ranks) / len(ranks) for domain, ranks in sorted(found.items())}


def main() -> None:
    """One run a seed, and a row a seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            argv = [
                sys.executable,
                str(PROJECT / "run.py"),
                "experiment=planted",
                "tracking=none",
                f"seed={seed}",
                f"data.seed={seed}",
            ]
            subprocess.run(
                [*argv, f"hydra.run.dir={folder}", *args.overrides], check=True, stdout=subprocess.DEVNULL
            )
            ranks = ranks_within_steps(Path(folder))
        planted = next(domain for domain in ranks if domain.endswith("-shuffled"))
        lowest = ranks[planted] == min(ranks.values())
        rows.append({"seed": seed, **{d: round(r, 3) for d, r in ranks.items()}, "planted is lowest": lowest})
    report("planted", list(rows[0]), rows)


if __name__ == "__main__":
    main()
