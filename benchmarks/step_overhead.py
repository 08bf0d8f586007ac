"""A scored step against a plain step over the same training and validation rows.

`python -m benchmarks.step_overhead [--rounds 7] [--shapes 4]` on a random-start GPT-2 small, float32, AdamW.
Both steps are zero_grad, forward, backward and optimizer step; they take turns within one process on one
model. Peak memory is measured in a process of its own for each, since a process's peak never falls.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import Ratio, interleave, keep_freed_memory, report
from benchmarks.steps import Step, attached_step, plain_step
from ghost import GhostEngineManager


@dataclass(frozen=True)
class Shape:
    """`b` training and `v` validation rows of `tokens` tokens."""

    b: int
    tokens: int
    v: int


SHAPES = [Shape(8, 128, 1), Shape(4, 256, 1), Shape(16, 128, 8), Shape(2, 512, 1), Shape(8, 128, 8)]


def gpt2(**shape: int) -> GPT2LMHeadModel:
    """A GPT-2 without dropout from a random start; small by default."""
    model = GPT2LMHeadModel(
        GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **shape)
    )
    model.loss_type = "ForCausalLM"
    return model


def training(shape: Shape) -> tuple[GPT2LMHeadModel, torch.optim.Optimizer, Tensor, Tensor]:
    """A model with its optimizer, training rows `[b, T]` and validation rows `[v, T]`."""
    torch.manual_seed(0)
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    X = torch.randint(0, 50257, (shape.b, shape.tokens))
    val = torch.randint(0, 50257, (shape.v, shape.tokens))
    return model, optimizer, X, val


def steps(shape: Shape, algebra: str) -> dict[str, Step]:
    """On one model a plain step, a scored one, and one whose scores are of AdamW's own step, by name."""
    model, optimizer, X, val = training(shape)
    found = {"plain": plain_step(model, optimizer, torch.cat([X, val]))}
    for name, config in (("scored", {"algebra": algebra}), ("own", {"preconditioner": "auto"})):
        manager = GhostEngineManager(config, model, optimizer, val_data=(val, val))
        found[name] = attached_step(manager, model, optimizer, X)
    return found


def peak_bytes(shape: Shape, which: str) -> int:
    """Peak resident memory of a fresh process that takes two steps of one kind."""
    argv = [sys.executable, "-m", "benchmarks.step_overhead", "--peak", which, json.dumps(asdict(shape))]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def write_peak(which: str, shape: Shape) -> None:
    """What `peak_bytes` runs."""
    step = steps(shape, "auto")[which]
    step()
    step()
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}\n")


def main() -> None:
    """Measure all shapes and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes to measure")
    parser.add_argument("--algebra", default="auto")
    parser.add_argument("--peak", nargs=2, metavar=("WHICH", "SHAPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        write_peak(args.peak[0], Shape(**json.loads(args.peak[1])))
        return
    keep_freed_memory()
    rows = []
    for shape in SHAPES[: args.shapes]:
        times = interleave(steps(shape, args.algebra), args.rounds, warmup=3)  # while the process grows
        gc.collect()  # the model's forwards and its manager hold each other
        memory = peak_bytes(shape, "scored") / peak_bytes(shape, "plain")
        rows.append(
            {
                "b": shape.b, "T": shape.tokens, "v": shape.v,
                "scored / plain": Ratio.of(times["scored"], times["plain"]),
                "preconditioner=auto / scored": Ratio.of(times["own"], times["scored"]),
                "plain s": round(sorted(times["plain"])[args.rounds // 2], 3),
                "peak memory ratio": round(memory, 3),
            }
        )  # fmt: skip
        report("step_overhead", list(rows[0]), rows)  # what is measured is not lost if the next shape fails


if __name__ == "__main__":
    main()
