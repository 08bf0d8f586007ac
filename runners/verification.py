"""`verify=true`: the configured engine against plain autograd on the run's own model and first samples."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from ghost import Verification, verify
from ghost.verification import HEADER
from runners.data import build_data
from runners.data.loader import train_batches
from runners.losses import build_task
from runners.optim import build_scaler
from runners.summary import print_whole
from runners.train import build_placed, ghost_config, prepare_machine, validation_data

log = logging.getLogger(__name__)

ROWS_A_MICRO_BATCH = 2
LEAST_ROWS = 4


def verify_scores(cfg: DictConfig) -> bool:
    """Check the first training samples' scores, print a table, write `verify.json`; whether all are right.

    Raises:
        ConfigError, DataError, GhostError: The config, the data or the model cannot work.
    """
    out = Path(cfg.output_dir)
    found = _verification(cfg, out)
    (out / "verify.json").write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    print_whole(_table(found))
    for remark in found.remarks():
        log.info("%s", remark)
    log.log(logging.INFO if found.passed else logging.ERROR, "%s", found.summary())
    return found.passed


def _verification(cfg: DictConfig, out: Path) -> Verification:
    device = prepare_machine(cfg)
    data = build_data(cfg.data)
    log.info("%s", data.description)
    model, task = build_placed(cfg, data, device), build_task(cfg, device)
    rows = max(LEAST_ROWS, ROWS_A_MICRO_BATCH * cfg.trainer.gradient_accumulation_steps)
    rows = min(rows, len(data.train))
    batch = next(train_batches(data.train, rows, cfg.seed, cfg.data.shuffle, num_workers=0))
    called: Any = torch.compile(model) if cfg.trainer.compile else model
    return verify(
        called, ghost_config(cfg, out, task), train=task.place(batch.inputs, batch.labels),
        val_data=validation_data(cfg, data, task), loss_fn=task.mean, scaler=build_scaler(cfg, device),
        rows=rows,
    )  # fmt: skip


def _table(found: Verification) -> Table:
    table = Table(title="Scores against plain autograd", title_justify="left")
    for heading in HEADER:
        words = heading in ("layer", "type", "verdict")
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    for layer in found.layers:
        # Text objects, since a name may hold what rich would take for markup.
        cells = [Text(cell) for cell in layer.cells()]
        table.add_row(*cells, style=None if layer.passed else "red")
    return table
