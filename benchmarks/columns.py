"""What columns cost: all pairs, or one column a validation set, against one column and against a plain step.

`python -m benchmarks.columns [--rounds 7]` on a random-start GPT-2 small, float32, AdamW, the same training
and validation rows everywhere. All steps take turns within one process on one model.
"""

import argparse
from typing import Any

import torch

from benchmarks.common import Ratio, interleave, keep_freed_memory, report
from benchmarks.step_overhead import Shape, training
from benchmarks.steps import Step, attached_step, plain_step
from ghost import GhostEngineManager

SHAPES = [Shape(8, 128, 8), Shape(4, 256, 4)]


def steps(shape: Shape) -> dict[str, Step]:
    """A plain step, and scored ones with one column, a column for each half, and one for each pair."""
    model, optimizer, X, val = training(shape)
    half = shape.v // 2
    sets = {"first": (val[:half], val[:half]), "second": (val[half:], val[half:])}

    def scored(config: dict[str, Any], val_data: Any) -> Step:
        manager = GhostEngineManager(config, model, optimizer, val_data=val_data)
        return attached_step(manager, model, optimizer, X)

    return {
        "plain": plain_step(model, optimizer, torch.cat([X, val])),
        "one column": scored({}, (val, val)),
        "two sets": scored({}, sets),
        "pairs": scored({"pairwise": True}, (val, val)),
    }


def main() -> None:
    """Measure all shapes and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    keep_freed_memory()
    rows = []
    for shape in SHAPES:
        times = interleave(steps(shape), args.rounds)
        rows.append(
            {"b": shape.b, "T": shape.tokens, "v": shape.v}
            | {
                f"{name} / plain": Ratio.of(times[name], times["plain"])
                for name in ("one column", "two sets", "pairs")
            }
        )
    report("columns", list(rows[0]), rows)


if __name__ == "__main__":
    main()
