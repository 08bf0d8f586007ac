"""The Triton kernel alone: whether it is right on this GPU, and its time against a plain matrix product.

A part of `python -m benchmarks.gpu`.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import Ratio, report
from ghost import algebra, kernels

log = logging.getLogger(__name__)

Scores = Callable[[Tensor, Tensor, Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layer:
    """A weight `[m, n]` with `b` training and `v` validation rows of `tokens` tokens."""

    name: str
    b: int
    tokens: int
    v: int
    m: int
    n: int

    def factors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`left [b, T, m]`, `right [b, T, n]`, and the validation rows', as parts of joint batches."""
        left = torch.randn(self.b + self.v, self.tokens, self.m, device=device, dtype=dtype)
        right = torch.randn(self.b + self.v, self.tokens, self.n, device=device, dtype=dtype)
        return left[: self.b], right[: self.b], left[self.b :], right[self.b :]


CHECKED = (
    Layer("c_attn", 16, 1024, 1, 768, 2304),
    Layer("c_proj", 16, 1024, 16, 768, 768),
    Layer("head", 4, 1024, 1, 50257, 768),
    Layer("one sample", 1, 77, 1, 768, 768),
    Layer("one token", 8, 1, 2, 768, 768),
    Layer("odd tokens", 3, 1000, 2, 768, 3072),
    Layer("small and odd", 5, 33, 3, 17, 31),
)
"""The last three in every dtype, all in bfloat16."""


def timed_layers(v: int) -> tuple[Layer, ...]:
    """GPT-2 small's matrices at 16 rows of 1024 tokens; `Conv1D` has its inputs on the left."""
    shapes = {
        "c_attn": (768, 2304), "c_proj": (768, 768), "mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768),
        "head": (50257, 768), "head, padded": (50304, 768),
    }  # fmt: skip
    return tuple(Layer(name, 16, 1024, v, *shape) for name, shape in shapes.items())


def errors(layer: Layer, device: torch.device, dtype: torch.dtype, function: Scores) -> tuple[float, float]:
    """How far a function is from float64 on the same factors: the sum, relative to its norm, and the worst
    inner product, relative to its two gradients' norms.
    """
    torch.manual_seed(0)
    sides = layer.factors(device, dtype)
    total, dots = function(*sides, [layer.v])
    left, right, val_left, val_right = (side.double() for side in sides)
    target = val_left.flatten(0, 1).T @ val_right.flatten(0, 1)  # [m, n]
    expected, worst = torch.zeros_like(target), 0.0
    for i in range(layer.b):
        gradient = left[i].T @ right[i]
        expected += gradient
        error = (dots[i, 0].double() - (gradient * target).sum()).abs()
        worst = max(worst, float(error / (gradient.norm() * target.norm())))
    return float((total.double() - expected).norm() / expected.norm()), worst


def by_pytorch(*given: Tensor | list[int]) -> tuple[Tensor, Tensor]:
    """The fused sums without the kernel."""
    with patch.object(kernels, "serves", return_value=False):
        found: tuple[Tensor, Tensor] = algebra.fused_sum_and_scores(*given)
    return found


TOLERANCES = {torch.bfloat16: (4e-3, 1e-5), torch.float16: (5e-4, 1e-5), torch.float32: (1e-3, 1e-3)}
"""Of the sum, which is rounded to the factors' dtype, and of the inner products, which are not. float32 is
multiplied as TF32.
"""


def check_all(device: torch.device) -> None:
    """Hold the kernel against float64, and ask for the same bits twice; ends the process if it is wrong."""
    rows, wrong = [], []
    for dtype, (of_sum, of_dots) in TOLERANCES.items():
        for layer in CHECKED if dtype is torch.bfloat16 else CHECKED[-3:]:
            sides = (*layer.factors(device, dtype), [layer.v])
            if not kernels.serves(device.type, dtype, 1):
                sys.exit(f"The kernel does not take {dtype} here: is Triton installed?")
            first, second = kernels.sum_and_scores(*sides), kernels.sum_and_scores(*sides)
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            found = errors(layer, device, dtype, kernels.sum_and_scores)
            plain = errors(layer, device, dtype, by_pytorch)
            rows.append({
                "layer": layer.name, "dtype": str(dtype).removeprefix("torch."), "same bits": same,
                "kernel sum": f"{found[0]:.1e}", "kernel dots": f"{found[1]:.1e}",
                "PyTorch sum": f"{plain[0]:.1e}", "PyTorch dots": f"{plain[1]:.1e}",
            })  # fmt: skip
            if not (same and found[0] <= of_sum and found[1] <= of_dots):
                wrong.append(f"{layer.name} in {dtype}")
    report("gpu_check", list(rows[0]), rows)
    if wrong:
        sys.exit(f"The kernel is wrong on this GPU for {', '.join(wrong)}: nothing was timed.")


def product(left: Tensor, right: Tensor) -> Tensor:
    """The summed gradient `[m, n]` as a plain backward takes it."""
    return left.flatten(0, 1).T @ right.flatten(0, 1)


def measure_all(rounds: int = 5) -> None:
    """Time each layer's weight gradient with and without scores."""
    from triton.testing import do_bench

    rows = []
    for v in (1, 16):
        for layer in timed_layers(v):
            sides = layer.factors(torch.device("cuda"), torch.bfloat16)
            joint = [torch.cat([sides[0], sides[2]]), torch.cat([sides[1], sides[3]])]
            targets = product(sides[2], sides[3])[None]
            calls: dict[str, Callable[[], object]] = {
                "plain": lambda joint=joint: product(*joint),
                "train": lambda sides=sides: product(*sides[:2]),
                "scores": lambda sides=sides, v=v: kernels.sum_and_scores(*sides, [v]),
                "dots": lambda sides=sides, targets=targets: kernels.sum_and_dots(*sides[:2], targets),
            }
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    times[name].append(do_bench(call, warmup=5, rep=20, return_mode="median"))
            flops = 2 * layer.b * layer.tokens * layer.m * layer.n
            rows.append({
                "layer": layer.name, "m": layer.m, "n": layer.n, "v": v,
                "scores / plain product": Ratio.of(times["scores"], times["plain"]),
                "dots / training product": Ratio.of(times["dots"], times["train"]),
                "dots TFLOP/s": round(flops / min(times["dots"]) / 1e9),
                "training product TFLOP/s": round(flops / min(times["train"]) / 1e9),
            })  # fmt: skip
    report("gpu_kernel", list(rows[0]), rows)
