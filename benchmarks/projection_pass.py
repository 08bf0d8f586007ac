"""A projection pass against a plain forward and backward over the same rows.

`python -m benchmarks.projection_pass [--rounds 7] [--shapes 4]` on a random-start GPT-2 small, float32, all
parameters projected. The passes take turns within one process on one model. The naive loop (a backward for
each sample, then both products with its whole gradient) is given by its formula, in FLOPs of matrix products.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common import Ratio, interleave, report
from benchmarks.step_overhead import gpt2
from ghost import GhostConfig, GradProjLoRAEngine
from ghost.layout import Layout


@dataclass(frozen=True)
class Shape:
    """`b` rows of `tokens` tokens, about `rank` numbers a parameter."""

    b: int
    tokens: int
    rank: int


SHAPES = [Shape(8, 128, 256), Shape(4, 256, 256), Shape(2, 512, 256), Shape(8, 128, 4096), Shape(8, 128, 16)]


def passes(shape: Shape) -> tuple[dict[str, Callable[[], None]], Layout]:
    """A plain and a projecting pass on one model, by name, and the layout of a row."""
    torch.manual_seed(0)
    model = gpt2()
    X = torch.randint(0, 50257, (shape.b, shape.tokens))
    engine = GradProjLoRAEngine(model, GhostConfig(engine="gradprojlora", proj_rank_total=shape.rank))

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=X, labels=X).loss.backward()

    def projected() -> None:
        model.zero_grad(set_to_none=True)
        with engine.attached():
            engine.project(X, X)

    return {"plain": plain, "projected": projected}, engine.layout


def naive_ratio(layout: Layout, tokens: int) -> float:
    """FLOPs of the naive loop over those of a plain pass, for a row of `tokens` tokens; attention left out.

    A matrix of `m * n` entries takes `6 * T * m * n` in forward and backward, and `2 * k_out * m * n + 2 *
    k_out * n * k_in` to project its gradient.
    """
    matrices = [part for part in layout.slices if part.size_in > 1]
    plain = sum(6 * tokens * part.size_out * part.size_in for part in matrices)
    projecting = sum(2 * part.k_out * part.size_in * (part.size_out + part.k_in) for part in layout.slices)
    return (plain + projecting) / plain


def main() -> None:
    """Measure all shapes and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes to measure")
    args = parser.parse_args()
    rows = []
    for shape in SHAPES[: args.shapes]:
        calls, layout = passes(shape)
        times = interleave(calls, args.rounds)
        rows.append(
            {
                "b": shape.b, "T": shape.tokens, "rank": shape.rank, "K": layout.width,
                "projected / plain": Ratio.of(times["projected"], times["plain"]),
                "plain s": round(sorted(times["plain"])[args.rounds // 2], 3),
                "naive / plain (FLOPs)": round(naive_ratio(layout, shape.tokens), 2),
            }
        )  # fmt: skip
    report("projection_pass", list(rows[0]), rows)


if __name__ == "__main__":
    main()
