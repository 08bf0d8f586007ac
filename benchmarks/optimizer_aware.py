"""Scores of AdamW's own step against the exact Shapley values of that step.

`python -m benchmarks.optimizer_aware [--seeds 3] [--lr 3e-4 1e-3 3e-3] [--steps 2 30 150] [--rows 10]`
trains a small GPT-2 with GPT-2's own vocabulary on the running Python's code, documentation and licences. At
each of the steps every subset of the batch takes the real step of `torch.optim.AdamW` from the same weights
and moments, and the fall in validation loss gives exact Shapley values (2¹⁰ evaluations for ten rows). Beside
the engine's scores stand other forms of weighing the validation gradient, from per-sample gradients:

* `plain`: the gradient for the step;
* `second moment`: `1 / (sqrt(v_t) + eps)`, this step's gradient in it;
* `earlier moment`: the same without this step's gradient;
* `derivative`: of the update at the batch's gradient;
* `path`: the derivative averaged along the straight path from no batch to the batch (Aumann–Shapley);
* `chord`: `engine.preconditioner=auto`;
* `linear game`: exact Shapley values of the update times the validation gradient before the step: as near as
  any first-order score can come.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import report
from ghost import GhostEngineManager
from runners.data.corpus import code_documents, docs_documents, legal_documents
from runners.tokenizer import encode, load_gpt2_tokenizer

TOKENS, VAL_ROWS, VAL_TOKENS = 48, 4, 32


def text_rows(seed: int) -> Tensor:
    """Windows of text `[N, TOKENS]` int64, shuffled."""
    tokenizer, windows = load_gpt2_tokenizer(), []
    for documents in (code_documents(), docs_documents(), legal_documents()):
        for document in documents[:60]:
            ids = torch.from_numpy(encode(tokenizer, document.read()[:6000])).long()
            windows.append(ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS))
    rows = torch.cat(windows)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """The model's own mean loss."""
    loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss


@dataclass(frozen=True)
class Point:
    """A model and its optimizer just before a step, and what the step's rows do to it.

    Attributes:
        parts: Each row's part of the batch's gradient `[n, K]`, all K parameters in one vector.
        val_grad: `[K]`.
    """

    model: nn.Module
    optimizer: torch.optim.AdamW
    X: Tensor
    val: Tensor
    parts: Tensor
    val_grad: Tensor

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.AdamW, X: Tensor, val: Tensor) -> "Point":
        """The gradients, row by row."""
        params = list(model.parameters())
        parts = [flat(torch.autograd.grad(loss_of(model, row[None]), params)) / len(X) for row in X]
        return cls(
            model, optimizer, X, val, torch.stack(parts),
            flat(torch.autograd.grad(loss_of(model, val), params)),
        )  # fmt: skip


def flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """All entries in one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def shapley(point: Point) -> tuple[Tensor, Tensor]:
    """Exact values `[n]` of the real step, and of the game that is linear in the weights."""
    n, params = len(point.X), list(point.model.parameters())
    saved = [p.detach().clone() for p in params]
    state = {p: {k: v.clone() for k, v in point.optimizer.state[p].items()} for p in params}
    sizes = [p.numel() for p in params]
    worth = torch.zeros(2**n, 2, dtype=torch.float64)
    for subset in range(2**n):
        chosen = torch.tensor([subset >> i & 1 for i in range(n)], dtype=torch.float32)
        for p, grad in zip(params, (chosen @ point.parts).split(sizes), strict=True):
            p.grad = grad.view_as(p)
        point.optimizer.step()
        with torch.no_grad():
            worth[subset, 0] = -loss_of(point.model, point.val).double()
            moved = flat(params) - flat(saved)
            worth[subset, 1] = -(point.val_grad.double() @ moved.double())
            for p, before in zip(params, saved, strict=True):
                p.copy_(before)
                for key, value in point.optimizer.state[p].items():
                    value.copy_(state[p][key]) if state.get(p) else value.zero_()
    real, linear = values_of(worth, n).unbind(1)
    return real, linear


def values_of(worth: Tensor, n: int) -> Tensor:
    """Shapley values `[n, …]` of a game `[2ⁿ, …]`, by their definition."""
    weight = [math.factorial(s) * math.factorial(n - s - 1) / math.factorial(n) for s in range(n)]
    found = torch.zeros(n, *worth.shape[1:], dtype=torch.float64)
    for i in range(n):
        without = torch.tensor([subset for subset in range(2**n) if not subset >> i & 1])
        each = torch.tensor([weight[int(subset).bit_count()] for subset in without], dtype=torch.float64)
        found[i] = torch.tensordot(each, worth[without | 1 << i] - worth[without], dims=1)
    return found


def forms(point: Point) -> dict[str, Tensor]:
    """Scores `[n]` by form, times the learning rate."""
    group = point.optimizer.param_groups[0]
    (first, second), eps, lr = group["betas"], group["eps"], group["lr"]
    state = [point.optimizer.state.get(p, {}) for p in point.model.parameters()]
    nothing = [torch.zeros_like(p) for p in point.model.parameters()]
    m = flat([s.get("exp_avg", z) for s, z in zip(state, nothing, strict=True)]).double()
    v = flat([s.get("exp_avg_sq", z) for s, z in zip(state, nothing, strict=True)]).double()
    number = int(state[0].get("step", 0)) + 1
    unbiased, unbiased_square = 1 - first**number, 1 - second**number
    parts, val_grad = point.parts.double(), point.val_grad.double()
    whole = parts.sum(0)

    def denominator(h: Tensor) -> Tensor:
        return ((second * v + (1 - second) * h * h) / unbiased_square).sqrt() + eps

    def derivative(h: Tensor) -> Tensor:
        bottom = denominator(h)
        bend = (1 - second) * h / (unbiased_square * (bottom - eps).clamp(min=1e-300))
        return (1 - first) / (unbiased * bottom) - (first * m + (1 - first) * h) / unbiased * bend / bottom**2

    earlier = (1 - first) / unbiased / ((v / (1 - second ** max(1, number - 1))).sqrt() + eps)
    nodes = [(i + 0.5) / 5 for i in range(5)]
    weights = {
        "plain": torch.ones_like(whole),
        "second moment": (1 - first) / unbiased / denominator(whole),
        "earlier moment": earlier,
        "derivative": derivative(whole),
        "path": torch.stack([derivative(s * whole) for s in nodes]).mean(0),
    }
    return {name: lr * (parts @ (weight * val_grad)) for name, weight in weights.items()}


def engine_scores(point: Point) -> Tensor:
    """What `engine.preconditioner=auto` gives, times the learning rate."""
    config = {"preconditioner": "auto", "credit": "step"}
    manager = GhostEngineManager(config, point.model, point.optimizer, val_data=(point.val, point.val))
    point.optimizer.zero_grad()
    with manager.step(point.X, point.X, batch_idx=range(len(point.X)), iteration=0) as step:
        step.backward(point.model(**step.inputs).loss)
    manager.cleanup()
    point.optimizer.zero_grad()
    return point.optimizer.param_groups[0]["lr"] * manager.scores.double()


def compare(seed: int, lr: float, steps: list[int], rows: int) -> list[dict[str, object]]:
    """Train, and look at each of the steps."""
    torch.manual_seed(seed)
    text = text_rows(seed)
    val, train = text[:VAL_ROWS, :VAL_TOKENS], text[VAL_ROWS:]
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, use_cache=False)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    found: list[dict[str, object]] = []
    for number in range(1, max(steps) + 1):
        X = train[torch.randperm(len(train))[:rows]]
        if number in steps:
            point = Point.of(model, optimizer, X, val)
            scores = forms(point) | {"chord": engine_scores(point)}
            real, linear = shapley(point)
            for name, score in (scores | {"linear game": linear}).items():
                error = (score - real).abs() / real.std()
                found.append({
                    "lr": lr, "step": number, "seed": seed, "form": name,
                    "Spearman": round(float(spearmanr(score, real)[0]), 3),
                    "RMSE / spread": round(float(error.square().mean().sqrt()), 3),
                    "worst / spread": round(float(error.max()), 3),
                })  # fmt: skip
        optimizer.zero_grad()
        loss_of(model, X).backward()
        optimizer.step()
    return found


def main() -> None:
    """Compare the forms at all points and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 30, 150])
    parser.add_argument("--rows", type=int, default=10)
    args = parser.parse_args()
    rows = [
        row
        for seed in range(args.seeds)
        for lr in args.lr
        for row in compare(seed, lr, args.steps, args.rows)
    ]
    report("optimizer_aware", list(rows[0]), rows)


if __name__ == "__main__":
    main()
