"""Scored steps on a GPU against plain compiled ones, and the kernel that makes them.

`python -m benchmarks.gpu [check] [kernel] [steps] [sweep]`, all of them by default. No case of the sweep
begins after 8 minutes (`--minutes`); those left out are named.

* `check`: the kernel against float64 on this GPU; nothing is timed if it is wrong.
* `kernel`: each GPT-2 layer's weight gradient with scores, against PyTorch's product over the same rows.
* `steps`: GPT-2 small, 16 training rows of 1024 tokens, 1 and 16 validation rows.
* `sweep`: other tokens, rows and models.

A step is zero_grad, forward, backward and AdamW. *Plain* trains on training and validation rows alike,
*regular* on the training rows alone, *scored* is ours; each is compiled whole, in one graph, on a model of
its own. Weights are float32 and the forward runs under autocast bfloat16, which is how GPT-2 is trained;
`--weights bfloat16` has bfloat16 weights and no autocast. Times are of synchronised steps that take turns;
peak memory is a variant's own, its weights and optimizer state included. Model FLOPs are 6 for each weight of
a matrix and token, and 12 L d T for a token's attention, whether or not a kernel leaves the masked half out.
"""

import argparse
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import Ratio, interleave, report
from ghost import GhostEngineManager

log = logging.getLogger(__name__)

SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280)}
"""Layers, heads and width."""

VARIANTS = ("regular", "plain", "scored")
PARTS = ("check", "kernel", "steps", "sweep")

PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12
}  # fmt: skip
"""Dense bfloat16 products a second, by a part of the GPU's name; the first that fits."""


@dataclass(frozen=True)
class Case:
    """`b` training and `v` validation rows of `tokens` tokens."""

    model: str
    b: int
    tokens: int
    v: int
    vocabulary: int = 50257

    @property
    def config(self) -> GPT2Config:
        """Without dropout."""
        layers, heads, width = SIZES[self.model]
        return GPT2Config(
            n_layer=layers, n_head=heads, n_embd=width, n_positions=self.tokens, vocab_size=self.vocabulary,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip

    def flops(self, rows: int) -> int:
        """Of the model's forward and backward over so many rows."""
        config = self.config
        weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
        attention = 12 * config.n_layer * config.n_embd * self.tokens
        return rows * self.tokens * (6 * weights + attention)

    def rows(self, variant: str) -> int:
        """Rows that go through the model."""
        return self.b if variant == "regular" else self.b + self.v


STEPS = (Case("gpt2", 16, 1024, 1), Case("gpt2", 16, 1024, 16))
SWEEP = (
    Case("gpt2-medium", 8, 1024, 1),
    Case("gpt2", 16, 256, 1),
    Case("gpt2", 4, 1024, 1),
    Case("gpt2", 16, 1024, 4),
    Case("gpt2", 16, 1024, 1, vocabulary=50304),
    Case("gpt2", 8, 2048, 1),
    Case("gpt2", 64, 128, 8),
    Case("gpt2", 32, 1024, 1),
    Case("gpt2-large", 4, 1024, 1),
)


def build(
    case: Case, variant: str, device: torch.device, weights: torch.dtype, compiled: bool
) -> Callable[[], None]:
    """One step of a variant, on a model of its own from a random start.

    Args:
        weights: Their dtype; float32 ones compute under autocast bfloat16.
        compiled: Whether the model is compiled.
    """
    torch.manual_seed(0)
    model = GPT2LMHeadModel(case.config).to(device, weights)
    model.loss_type = "ForCausalLM"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows = torch.randint(0, case.vocabulary, (case.rows("plain"), case.tokens), device=device)
    train, val = rows[: case.b], rows[case.b :]
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=weights is torch.float32)
    if variant == "scored":
        manager = GhostEngineManager({}, model, optimizer, val_data=(val, val))
    iteration = iter(range(10**9))

    def unscored() -> None:
        given = rows[: case.rows(variant)]
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = forward(input_ids=given, labels=given).loss
        loss.backward()
        optimizer.step()

    def scored() -> None:
        optimizer.zero_grad(set_to_none=True)
        with manager.step(train, train, batch_idx=range(case.b), iteration=next(iteration)) as step:
            with autocast:
                loss = forward(**step.inputs).loss
            step.backward(loss)
        optimizer.step()

    return scored if variant == "scored" else unscored


def clean() -> None:
    """Leave neither compiled code nor memory of an earlier case."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def peak_bytes(step: Callable[[], None], before: int) -> int:
    """Peak of two steps, above what other variants held `before` this one was built."""
    for _ in range(3):  # compiles, and picks tiles
        step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, weights: torch.dtype, rounds: int) -> dict[str, object]:
    """One row of the table."""
    clean()
    steps, peaks = {}, {}
    for variant in VARIANTS:
        before = torch.cuda.memory_allocated()
        steps[variant] = build(case, variant, torch.device("cuda"), weights, compiled=True)
        peaks[variant] = peak_bytes(steps[variant], before)
    times = interleave(steps, rounds, warmup=2)
    return row(case, weights, times, peaks, torch.cuda.get_device_name())


def row(
    case: Case, weights: torch.dtype, times: dict[str, list[float]], peaks: dict[str, int], gpu: str
) -> dict[str, object]:
    """What the table says of a case.

    Args:
        times: Seconds of each variant's steps.
        peaks: Bytes.
        gpu: The GPU's name.
    """
    seconds = {variant: median(times[variant]) for variant in VARIANTS}
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    found: dict[str, object] = {
        "model": case.model, "vocabulary": case.vocabulary, "weights": str(weights).removeprefix("torch."),
        "b": case.b, "T": case.tokens, "v": case.v,
        "scored / plain": Ratio.of(times["scored"], times["plain"]),
        "scored / regular": Ratio.of(times["scored"], times["regular"]),
        "peak memory ratio": round(peaks["scored"] / peaks["plain"], 3),
        "scored GB": round(peaks["scored"] / 1e9, 2),
        "scored tokens/s": round(case.b * case.tokens / seconds["scored"]),
    }  # fmt: skip
    for variant in VARIANTS:
        found[f"{variant} ms"] = round(1e3 * seconds[variant], 2)
        share = case.flops(case.rows(variant)) / seconds[variant] / peak if peak else None
        found[f"{variant} MFU"] = "unknown GPU" if share is None else round(share, 3)
    return found


def main() -> None:
    """Measure the parts named on the command line and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=8.0, help="no case of the sweep begins later")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))} is no part: take some of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        Console().print("There is no GPU here that PyTorch can use, so nothing was measured.")
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from benchmarks import gpu_kernel  # needs Triton

    began = time.monotonic()
    parts = args.parts or PARTS
    torch.set_float32_matmul_precision("high")
    gpu_kernel.check_all(torch.device("cuda"))
    if "kernel" in parts:
        gpu_kernel.measure_all()
    rows = [measure(case, getattr(torch, args.weights), args.rounds) for case in STEPS if "steps" in parts]
    for case in SWEEP if "sweep" in parts else ():
        if time.monotonic() - began > 60 * args.minutes:
            log.warning("Left out for lack of time: %s.", case)
            continue
        try:
            rows.append(measure(case, getattr(torch, args.weights), args.rounds))
        except torch.OutOfMemoryError:
            log.warning("Left out for lack of memory: %s.", case)
    if rows:
        report("gpu", list(rows[0]), rows)


if __name__ == "__main__":
    main()
