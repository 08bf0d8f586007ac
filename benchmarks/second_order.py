"""A step with second-order values against a plain training step, over the training rows alone.

`python -m benchmarks.second_order [--rounds 7] [--shapes 3]`: random-start GPT-2s in float32 with SGD, 16
training rows and one validation row, all in one process on one model, in turn. Beside the whole ratio stand
those of a first-order step with a validation pass of its own and of the validation pass that is
differentiated twice, by itself.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2LMHeadModel

from benchmarks.common import Ratio, interleave, keep_freed_memory, report
from benchmarks.step_overhead import gpt2
from benchmarks.steps import Step, attached_step, plain_step
from ghost import GhostEngineManager


@dataclass(frozen=True)
class Shape:
    """A GPT-2 of so many layers of width `d`, `b` training and `v` validation rows of `tokens` tokens."""

    layers: int
    d: int
    tokens: int
    b: int = 16
    v: int = 1


SHAPES = [Shape(4, 256, 128), Shape(4, 512, 128), Shape(4, 768, 128), Shape(4, 512, 256)]


def training(shape: Shape, vocabulary: int) -> tuple[GPT2LMHeadModel, torch.optim.Optimizer, Tensor, Tensor]:
    """A model with its optimizer, training rows `[b, T]` and validation rows `[v, T]`."""
    torch.manual_seed(0)
    model = gpt2(n_layer=shape.layers, n_embd=shape.d, n_head=shape.d // 64, vocab_size=vocabulary)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    X = torch.randint(0, vocabulary, (shape.b, shape.tokens))
    return model, optimizer, X, torch.randint(0, vocabulary, (shape.v, shape.tokens))


def steps(shape: Shape, vocabulary: int) -> dict[str, Step]:
    """The steps by name, all on one model."""
    model, optimizer, X, val = training(shape, vocabulary)

    def scored(order: int) -> Step:
        config = {"val_mode": "separate", "order": order}
        manager = GhostEngineManager(config, model, optimizer, val_data=(val, val))
        return attached_step(manager, model, optimizer, X)

    def hessian() -> None:
        params = list(model.parameters())
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(input_ids=val, labels=val).loss
            grads = torch.autograd.grad(loss, params, create_graph=True)
        torch.autograd.grad(grads, params, params)

    return {
        "plain": plain_step(model, optimizer, X),
        "first": scored(1),
        "second": scored(2),
        "hessian": hessian,
    }


def main() -> None:
    """Measure all shapes and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes to measure")
    parser.add_argument("--vocabulary", type=int, default=50257)
    args = parser.parse_args()
    keep_freed_memory()
    rows = []
    for shape in SHAPES[: args.shapes]:
        times = interleave(steps(shape, args.vocabulary), args.rounds)
        rows.append(
            {
                "layers": shape.layers, "d": shape.d, "T": shape.tokens, "b": shape.b, "v": shape.v,
                "second order / plain": Ratio.of(times["second"], times["plain"]),
                "first order / plain": Ratio.of(times["first"], times["plain"]),
                "Hessian product / plain": Ratio.of(times["hessian"], times["plain"]),
                "plain s": round(sorted(times["plain"])[args.rounds // 2], 3),
            }
        )  # fmt: skip
    report("second_order", list(rows[0]), rows)


if __name__ == "__main__":
    main()
