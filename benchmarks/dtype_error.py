"""Scores in every number format against float64, on a trained model.

`python -m benchmarks.dtype_error [--steps 200] [--batches 8]`. A GPT-2 mini is trained on the interpreter's
corpus in float32. Then the same batches are scored in each format from the same weights, by the engine and by
plain autograd (a backward a row, inner products in float64), and held against plain autograd in float64 from
the format's own weights cast up. What rounding the weights to bfloat16 adds is a row of its own. No optimizer
step is taken in between.
"""

import argparse
import statistics
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common import report
from ghost import GhostEngineManager
from ghost.batch import take_rows
from ghost.loss import count
from ghost.plain import plain_uses, trainable_uses
from runners import config as _schemas  # noqa: F401  (registers what conf/ refers to)
from runners.data import build_data
from runners.data.base import Batch, DataBundle
from runners.data.loader import train_batches, val_batch
from runners.losses import build_task
from runners.models import build_model, parameter_dtype
from runners.optim import build_optimizer, build_scaler

CONF = Path(__file__).resolve().parent.parent / "conf"
FORMATS = ["fp32", "bf16_mixed", "fp16_mixed", "bf16"]
VAL_ROWS = 6
CPU = torch.device("cpu")


def composed(dtype: str, *overrides: str) -> DictConfig:
    """The config of one number format."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"dtype={dtype}", "model=gpt2-mini", "optimizer.lr=0.001", *overrides])


def trained(cfg: DictConfig, data: DataBundle, steps: int) -> nn.Module:
    """A model after so many plain steps in float32."""
    torch.manual_seed(cfg.seed)
    model = build_model(cfg.model, data.vocab_size, data.input_shape, data.num_classes)
    optimizer, task = build_optimizer(cfg.optimizer, model), build_task(cfg, CPU)
    for step, batch in enumerate(islice(batches(cfg, data), steps), start=1):
        optimizer.zero_grad(set_to_none=True)
        loss = task.mean(model, batch.inputs, batch.labels)
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            Console().print(f"step {step}: loss {loss.item():.3f}")
    return model


def batches(cfg: DictConfig, data: DataBundle, skip: int = 0) -> Iterable[Batch]:
    """The training stream from a step on."""
    return train_batches(data.train, cfg.trainer.batch_size, cfg.seed, True, 0, start_step=skip)


class Scorer:
    """Scores the same batches from the same weights in any format.

    Args:
        weights: The trained weights, float32.
        scored: The batches.
    """

    def __init__(self, data: DataBundle, weights: dict[str, Tensor], scored: list[Batch]) -> None:
        self._data, self._weights, self._scored = data, weights, scored
        rows = val_batch(data.val)
        self._val = (take_rows(rows.inputs, slice(0, VAL_ROWS)), rows.labels[:VAL_ROWS])

    def _model(self, cfg: DictConfig, rounded: DictConfig) -> nn.Module:
        """The model in a format, with weights that have been in another one before."""
        model = build_model(cfg.model, self._data.vocab_size, None, None)
        model.load_state_dict(self._weights)
        return model.to(parameter_dtype(rounded.dtype)).to(parameter_dtype(cfg.dtype))

    def engine(self, cfg: DictConfig, val_mode: str) -> Tensor:
        """The engine's scores `[batches, b]` in float64."""
        model, task = self._model(cfg, cfg), build_task(cfg, CPU)
        config = {"val_mode": val_mode, "loss_reduction": task.reduction}
        manager = GhostEngineManager(
            config, model, build_optimizer(cfg.optimizer, model), val_data=self._val, loss_fn=task.mean,
            scaler=build_scaler(cfg, CPU),
        )  # fmt: skip
        found = []
        for number, batch in enumerate(self._scored):
            model.zero_grad()
            with manager.step(batch.inputs, batch.labels, batch_idx=batch.index, iteration=number) as step:
                step.backward(task.mean(model, step.X, step.Y))
            found.append(step.scores.double())
        manager.cleanup()
        return torch.stack(found)

    def plain(self, cfg: DictConfig, rounded: DictConfig) -> Tensor:
        """The same by plain autograd, from weights rounded to a format before."""
        model, task = self._model(cfg, rounded), build_task(cfg, CPU)
        scale = build_scaler(cfg, CPU).get_scale()
        found = []
        for batch in self._scored:
            counts = [int(count(row, task.reduction)) for row in batch.labels.split(1)]
            uses = plain_uses(
                model, partial(task.mean, model), (batch.inputs, batch.labels),
                [counted / sum(counts) for counted in counts], [(1.0, self._val)],
                dict.fromkeys(trainable_uses(model)), scale, eps=0.0,
            )  # fmt: skip
            scores = torch.tensor([use.scores for use in uses.values()], dtype=torch.float64)  # [uses, b, 1]
            found.append(scores.sum((0, 2)))
        return torch.stack(found)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors without ties."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def errors(found: Tensor, exact: Tensor) -> dict[str, object]:
    """What the table shows of scores `[batches, b]` against the exact ones."""
    difference = found - exact
    spread = exact.std(1, keepdim=True)
    ranks = [spearman(a, b) for a, b in zip(found, exact, strict=True)]
    return {
        "median relative error": f"{float((difference / exact).abs().median()):.1e}",
        "rms error / spread": f"{float((difference / spread).square().mean().sqrt()):.1e}",
        "Spearman": f"{statistics.mean(ranks):.4f}",
        "lowest": f"{min(ranks):.4f}",
    }


def measure(scorer: Scorer) -> list[dict[str, object]]:
    """The table's rows."""
    double, rows = composed("fp64"), []
    exact = scorer.plain(double, rounded=composed("fp32"))
    for name in FORMATS:
        cfg = composed(name)
        own = scorer.plain(double, rounded=cfg) if name == "bf16" else exact
        found = {
            "plain autograd": scorer.plain(cfg, rounded=cfg),
            "concat": scorer.engine(cfg, "concat"),
            "separate": scorer.engine(cfg, "separate"),
        }
        rows += [{"dtype": name, "scores by": way, **errors(s, own)} for way, s in found.items()]
        if name == "bf16":
            whole = errors(found["concat"], exact)
            rows.append({"dtype": "bf16 and its rounded weights", "scores by": "concat", **whole})
    return rows


def main() -> None:
    """Train, score in all formats, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    cfg = composed("fp32")
    data = build_data(cfg.data)
    weights = trained(cfg, data, args.steps).state_dict()
    scored = list(islice(batches(cfg, data, skip=args.steps), args.batches))
    rows = measure(Scorer(data, weights, scored))
    report("dtype_error", list(rows[0]), rows)


if __name__ == "__main__":
    main()
