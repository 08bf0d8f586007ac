"""How the cost of scoring grows: a scored step against a plain step on the same rows, one size at a time.

`python -m benchmarks.scaling [--rounds 5] [--values 4]` on a random-start GPT-2 of two blocks with GPT-2's
vocabulary, float32, AdamW. T tokens a row, b training rows, v validation rows and d features vary from one
shape in the middle; both steps take turns within one process on one model.
"""

import argparse
from dataclasses import dataclass, replace

import torch

from benchmarks.common import Ratio, interleave, keep_freed_memory, report
from benchmarks.step_overhead import gpt2
from benchmarks.steps import Step, plain_step, scored_step
from ghost import GhostEngineManager

HEAD_SIZE = 64


@dataclass(frozen=True)
class Size:
    """`b` training and `v` validation rows of `T` tokens, `d` features."""

    T: int = 128
    b: int = 4
    v: int = 1
    d: int = 256


VALUES = {"T": (64, 128, 256, 512), "b": (1, 4, 8, 16), "v": (1, 2, 4, 8), "d": (128, 256, 512, 768)}


def sizes(values: int) -> list[Size]:
    """The middle shape with the first so many values of each size, each shape once."""
    varied = [replace(Size(), **{name: value}) for name, few in VALUES.items() for value in few[:values]]
    return list(dict.fromkeys(varied))


def steps(size: Size) -> dict[str, Step]:
    """A plain and a scored step on one model, by name."""
    torch.manual_seed(0)
    model = gpt2(n_layer=2, n_embd=size.d, n_head=size.d // HEAD_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    X, val = (torch.randint(0, 50257, (rows, size.T)) for rows in (size.b, size.v))
    manager = GhostEngineManager({}, model, optimizer, val_data=(val, val))
    return {
        "plain": plain_step(model, optimizer, torch.cat([X, val])),
        "scored": scored_step(manager, model, optimizer, X),
    }


def main() -> None:
    """Measure all sizes and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--values", type=int, default=4, help="how many values of each size to measure")
    args = parser.parse_args()
    keep_freed_memory()
    rows = []
    for size in sizes(args.values):
        times = interleave(steps(size), args.rounds)
        rows.append(
            {
                "T": size.T, "b": size.b, "v": size.v, "d": size.d,
                "scored / plain": Ratio.of(times["scored"], times["plain"]),
                "plain s": round(sorted(times["plain"])[args.rounds // 2], 4),
            }
        )  # fmt: skip
    report("scaling", list(rows[0]), rows)


if __name__ == "__main__":
    main()
