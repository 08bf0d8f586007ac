"""A step over the better half of its batch, chosen in the step itself, against scoring alone and against
choosing first and training on the chosen rows in a second pass.

`python -m benchmarks.policies [--rounds 7] [--shapes 3] [--vocabulary 50257]`: random-start GPT-2s in float32
with SGD, 16 training rows and two validation rows, in both validation modes, all in one process on one model,
in turn. The second pass is a plain forward and backward over the chosen eight rows, after a scored step whose
gradients are dropped. `greedy` is the same with the Gram matrix and the greedy choice; `plain` is a step over
all rows without scores.
"""

import argparse
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Ratio, interleave, keep_freed_memory, report
from benchmarks.second_order import Shape, training
from benchmarks.steps import Step, attached_step, plain_step
from ghost import GhostEngineManager

SHAPES = [Shape(4, d, 128, v=2) for d in (256, 512, 768)]
MODES = ("concat", "separate")


def second_pass_step(
    manager: GhostEngineManager, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor
) -> Step:
    """Score `rows [b, T]`, then train on the better half by a forward and a backward of its own."""
    iteration = count()
    manager.detach_for_evaluation()

    def step() -> None:
        manager.reattach_after_evaluation()
        optimizer.zero_grad(set_to_none=True)
        with manager.step(rows, rows, batch_idx=range(len(rows)), iteration=next(iteration)) as scoring:
            scoring.backward(model(**scoring.inputs).loss)
        chosen = rows[manager.scores.topk(len(rows) // 2).indices]
        manager.detach_for_evaluation()
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=chosen, labels=chosen).loss.backward()
        optimizer.step()

    return step


def steps(shape: Shape, mode: str, vocabulary: int) -> dict[str, Step]:
    """The steps by name, all on one model."""
    model, optimizer, X, val = training(shape, vocabulary)

    def manager(policy: Any) -> GhostEngineManager:
        return GhostEngineManager({"val_mode": mode}, model, optimizer, val_data=(val, val), policy=policy)

    def weighed(policy: Any) -> Step:
        return attached_step(manager(policy), model, optimizer, X)

    return {
        "top_k": weighed({"name": "top_k", "k": 0.5}),
        "greedy": weighed({"name": "greedy", "k": 0.5}),
        "scored": weighed(None),
        "second pass": second_pass_step(manager(None), model, optimizer, X),
        "plain": plain_step(model, optimizer, X),
    }


def main() -> None:
    """Measure all shapes in both modes and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes to measure")
    parser.add_argument("--vocabulary", type=int, default=50257)
    args = parser.parse_args()
    keep_freed_memory()
    rows = []
    for shape in SHAPES[: args.shapes]:
        for mode in MODES:
            times = interleave(steps(shape, mode, args.vocabulary), args.rounds)
            rows.append(
                {
                    "layers": shape.layers, "d": shape.d, "T": shape.tokens, "b": shape.b, "v": shape.v,
                    "val_mode": mode,
                    "top_k / scored": Ratio.of(times["top_k"], times["scored"]),
                    "top_k / second pass": Ratio.of(times["top_k"], times["second pass"]),
                    "greedy / second pass": Ratio.of(times["greedy"], times["second pass"]),
                    "top_k / plain": Ratio.of(times["top_k"], times["plain"]),
                    "plain s": round(sorted(times["plain"])[args.rounds // 2], 3),
                }
            )  # fmt: skip
    report("policies", list(rows[0]), rows)


if __name__ == "__main__":
    main()
