"""`dry_run=true` of a projection run: how large its rows and its store would be, and what memory it needs."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from ghost import GradProjLoRAEngine
from runners.data import build_data
from runners.dryrun import data_facts, memory_rows, planned_device
from runners.losses import build_task
from runners.memory.estimate import estimate_memory
from runners.models import build_on_meta
from runners.progress import readable
from runners.project import projection_config
from runners.projection_store import row_bytes, store_folder


def report_projection(cfg: DictConfig) -> None:
    """Prints the width of a row, the size of the store, a memory estimate and the output directories."""
    facts = data_facts(cfg)
    model = build_on_meta(cfg.model, facts).to(getattr(torch, cfg.dtype.model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = GradProjLoRAEngine(model, projection_config(cfg, build_task(cfg, torch.device("meta"))))
    layout, samples = engine.layout, _samples(cfg)
    row = row_bytes(layout, str(cfg.engine.storage))
    device = planned_device(cfg)
    config = projection_config(cfg, build_task(cfg, device))
    memory = memory_rows(lambda: estimate_memory(cfg, config, facts, {}, device))
    table = Table(title="dry run: nothing was projected", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("model", f"{cfg.model.name}, {parameters:,} parameters in {cfg.dtype.model}")
    table.add_row("row", f"{layout.width:,} numbers of {len(layout.slices)} parameters")
    table.add_row("bytes a sample", f"{row:,} ({cfg.engine.storage})")
    table.add_row("samples", f"{samples:,}")
    table.add_row("store", f"{readable(samples * row)} in {store_folder(cfg)}")
    for line in memory:
        table.add_row(*line)
    table.add_row("output directory", str(Path(cfg.output_dir)))
    Console().print(table)


def _samples(cfg: DictConfig) -> int:
    """The number of training samples; the data is read where the config does not say it."""
    number = OmegaConf.select(cfg, "data.train_samples")
    return len(build_data(cfg.data).train) if number is None else number
