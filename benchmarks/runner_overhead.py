"""The runner's step against the bare loop with the same engine: what logging, status line and tracking cost.

`python -m benchmarks.runner_overhead [--steps 20] [overrides …]`. Both loops train a model of their own on
the same batches and take
turns step by step: the runner asks an iterator for each batch, and the iterator takes the bare loop's step
before it answers.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.common import Ratio, report
from ghost import GhostEngineManager
from runners import config as _schemas  # noqa: F401  (registers what conf/ refers to)
from runners.data import build_data
from runners.data.base import Batch, DataBundle
from runners.data.loader import train_batches, val_batch
from runners.loop import TrainingLoop
from runners.losses import build_task
from runners.models import build_model
from runners.optim import build_optimizer, build_scaler, build_schedule
from runners.progress import StatusLine
from runners.resume.checkpoints import Checkpoints
from runners.resume.keeping import Keeping
from runners.resume.signals import StopSignals
from runners.resume.state import Trained
from runners.tracking import build_tracker
from runners.train import ghost_config
from runners.world import ALONE

CONF = Path(__file__).resolve().parent.parent / "conf"


class SideBySide:
    """Serves batches to the runner and takes a bare step on each before it hands it over."""

    def __init__(self, cfg: DictConfig, data: DataBundle, out: Path) -> None:
        self.bare: list[float] = []
        self.runner: list[float] = []
        self._batches = train_batches(data.train, cfg.trainer.batch_size, cfg.seed, cfg.data.shuffle, 0)
        self._task = build_task(cfg, torch.device("cpu"))
        self._model = build_model(cfg.model, data.vocab_size, data.input_shape, data.num_classes)
        self._optimizer = build_optimizer(cfg.optimizer, self._model)
        self._manager = manager(cfg, data, self._model, self._optimizer, out)

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(self._batches):
            began = time.perf_counter()
            self._bare_step(batch, step)
            handed = time.perf_counter()
            self.bare.append(handed - began)
            yield batch
            self.runner.append(time.perf_counter() - handed)

    def _bare_step(self, batch: Batch, step: int) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with self._manager.step(batch.inputs, batch.labels, batch_idx=batch.index, iteration=step) as scored:
            scored.backward(self._task.mean(self._model, scored.X, scored.Y))
        self._optimizer.step()


def manager(
    cfg: DictConfig, data: DataBundle, model: torch.nn.Module, optimizer: torch.optim.Optimizer, out: Path
) -> GhostEngineManager:
    """A manager as the runner makes it."""
    task, rows = build_task(cfg, torch.device("cpu")), val_batch(data.val)
    config = ghost_config(cfg, out, task)
    return GhostEngineManager(
        config, model, optimizer, val_data=(rows.inputs, rows.labels), loss_fn=task.mean
    )


def measure(overrides: list[str], steps: int, out: Path) -> dict[str, object]:
    """One row: the runner's steps against the bare ones, the first two left out."""
    extra = [
        f"trainer.max_steps={steps + 3}",
        "trainer.overhead_probes=0",
        f"trainer.eval_every={10**6}",
        "trainer.checkpoint_every=null",
        f"output_dir={out}",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*overrides, *extra])
    data = build_data(cfg.data)
    side = SideBySide(cfg, data, out / "bare")
    model = build_model(cfg.model, data.vocab_size, data.input_shape, data.num_classes)
    optimizer = build_optimizer(cfg.optimizer, model)
    schedule, scaler = build_schedule(cfg.trainer, optimizer), build_scaler(cfg, torch.device("cpu"))
    with build_tracker(cfg.tracking, out, out) as tracker, StatusLine(steps + 3, io.StringIO()) as status:
        tracker.start({}, {})
        trained = Trained(model, optimizer, schedule, scaler, [])
        TrainingLoop(
            cfg=cfg, model=model, task=build_task(cfg, torch.device("cpu")),
            manager=manager(cfg, data, model, optimizer, out), optimizer=optimizer,
            schedule=schedule, batches=iter(side), val=data.val, test=None,
            scaler=scaler, tracker=tracker, status=status, sample_ids=data.train.sample_ids,
            keeping=Keeping(Checkpoints(cfg, tracker, ALONE), trained, StopSignals()),
        ).run()  # fmt: skip
    runner, bare = side.runner[2 : steps + 2], side.bare[2 : steps + 2]
    return {
        "run": " ".join(overrides),
        "runner / bare": Ratio.of(runner, bare),
        "bare s": round(statistics.median(bare), 4),
    }


def main() -> None:
    """Measure a small and the main model and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    runs = [args.overrides] if args.overrides else [["model=gpt2-mini"], ["model=gpt2"]]
    rows = []
    for overrides in runs:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(overrides, args.steps, Path(folder)))
    report("runner_overhead", list(rows[0]), rows)


if __name__ == "__main__":
    main()
