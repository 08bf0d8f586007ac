"""Whether `algebra: auto` picks well: what `ghost.costs` chooses against the best algebra measured beside it.

`python -m benchmarks.algebra_choice [--shapes 30] [--rounds 7] [--threads 1] [--seed 0]` draws shapes of
layers, from MLPs' (T = 1) to a vocabulary's, takes each by all three algebras in turn, and reports each one's
median milliseconds, the choice, and what it costs over the best. With one thread the processor's time is
taken and not the clock's, so that others at work on the machine disturb little.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common import report
from ghost import Algebra
from ghost.choice import Plan, sum_and_scores
from ghost.costs import Problem, costs

MOST_NUMBERS = 1 << 26
"""Of all factors, gradients and products of a shape: 256 MiB in float32."""


@dataclass(frozen=True)
class Shape:
    """`b` training and `v` validation samples of T tokens, of a matrix `[m, n]`."""

    kind: str
    b: int
    T: int
    v: int
    m: int
    n: int

    def numbers(self) -> int:
        """Factors, gradients, and the largest product that an algebra forms."""
        train, val = self.b * self.T, self.v * self.T
        return (train + val) * (self.m + self.n) + 3 * self.m * self.n + train * min(val, self.m, self.n)

    def flops(self) -> int:
        """Of the dearest algebra."""
        pairs = self.b * self.T * self.v * self.T * (self.m + self.n)
        return 2 * (pairs + 3 * self.b * self.T * self.m * self.n)


def draw(rng: random.Random) -> Shape:
    """A shape of one of the kinds of layers that there are; none that takes minutes."""
    while True:
        kind = rng.choice(["mlp", "patches", "block", "block", "head"])
        b, v = rng.choice([1, 2, 4, 8, 16, 32, 64]), rng.choice([1, 2, 4, 8, 16])
        if kind == "mlp":
            tokens, sides = 1, rng.choices([10, 32, 64, 128, 256, 512, 1024, 2048], k=2)
        elif kind == "patches":
            tokens, sides = rng.choice([16, 49, 64, 196, 1024]), rng.choices([9, 27, 64, 144, 288, 576], k=2)
        else:
            tokens, d = rng.choice([16, 32, 64, 128, 256, 512]), rng.choice([64, 128, 256, 384, 768])
            wide = rng.choice([1024, 8192, 32000, 50257]) if kind == "head" else d * rng.choice([1, 3, 4])
            sides = rng.sample([d, wide], k=2)
        shape = Shape(kind, b, tokens, v, *sides)
        if shape.numbers() <= MOST_NUMBERS and shape.flops() <= 2e11:
            return shape


def ways(shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The summed gradient and the scores by each algebra, by name."""
    train = [torch.randn(shape.b, shape.T, side).to(dtype) for side in (shape.m, shape.n)]
    val = [torch.randn(shape.v, shape.T, side).to(dtype) for side in (shape.m, shape.n)]

    def way(name: str) -> Callable[[], object]:
        return lambda: sum_and_scores(*train, *val, [shape.v], name, Plan())

    return {kind.value: way(kind.value) for kind in Algebra if kind is not Algebra.AUTO}


def seconds(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of one call, as the mean of some."""
    began = clock()
    for _ in range(repeats):
        call()
    return (clock() - began) / repeats


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """A row of the report."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    calls = ways(shape, dtype)
    repeats = {name: max(1, int(2e-3 / max(1e-6, seconds(call, 1, clock)))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name], clock))
    problem = Problem(
        shape.b, shape.T, shape.m, shape.n, shape.v * shape.T, dtype=dtype, threads=torch.get_num_threads()
    )
    counted = costs(problem)
    choice = min(counted, key=counted.__getitem__)
    medians = {name: statistics.median(found) * 1e3 for name, found in times.items()}
    sizes = {"kind": shape.kind, "b": shape.b, "T": shape.T, "v": shape.v, "m": shape.m, "n": shape.n}
    return {
        **sizes,
        **{f"{name} ms": float(f"{median:.3g}") for name, median in medians.items()},
        **{f"{name} counted": float(f"{counted[name] / 1e6:.3g}") for name in medians},
        "choice": choice,
        "over the best": round(medians[choice] / min(medians.values()) - 1, 3),
    }


def main() -> None:
    """Measure all shapes and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    shapes = [draw(rng) for _ in range(args.shapes)]
    rows = [measure(shape, getattr(torch, args.dtype), args.rounds) for shape in shapes]
    report("algebra_choice", list(rows[0]), rows)


if __name__ == "__main__":
    main()
