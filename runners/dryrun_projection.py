"""`dry_run=true` of a projection run: how large its rows and its store would be, and what memory it needs."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from ghost import GradProjLoRAEngine
from ghost.layout import Layout
from runners.data import build_data
from runners.dryrun import LOGIT_COPIES, data_facts, itemsize, logit_itemsize
from runners.kept import kept_values
from runners.losses import build_task
from runners.models import build_on_meta
from runners.progress import readable
from runners.project import projection_config
from runners.projection_store import row_bytes, store_folder
from runners.tasks import model_task


def report_projection(cfg: DictConfig) -> None:
    """Prints the width of a row, the size of the store, a memory estimate and the output directories."""
    facts = data_facts(cfg)
    model = build_on_meta(cfg.model, facts).to(getattr(torch, cfg.dtype.model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = GradProjLoRAEngine(model, projection_config(cfg, build_task(cfg, torch.device("meta"))))
    layout, samples = engine.layout, _samples(cfg)
    row = row_bytes(layout, str(cfg.engine.storage))
    rows = cfg.trainer.batch_size
    kept, logits = kept_values(model, model_task(cfg.model), rows, facts.seq_len, facts.input_shape)
    memory = {
        "weights": parameters * itemsize(cfg.dtype.model),
        "activations": kept * itemsize(cfg.dtype.autocast or cfg.dtype.model),
        "logits": logits * LOGIT_COPIES * logit_itemsize(cfg),
        "projection matrices": 4 * matrix_values(layout),
        "rows": 4 * rows * layout.width * cfg.engine.save_every,
    }
    table = Table(title="dry run: nothing was projected", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("model", f"{cfg.model.name}, {parameters:,} parameters in {cfg.dtype.model}")
    table.add_row("row", f"{layout.width:,} numbers of {len(layout.slices)} parameters")
    table.add_row("bytes a sample", f"{row:,} ({cfg.engine.storage})")
    table.add_row("samples", f"{samples:,}")
    table.add_row("store", f"{readable(samples * row)} in {store_folder(cfg)}")
    for name, size in memory.items():
        table.add_row(f"memory: {name}", readable(size))
    table.add_row("memory: total", f"{readable(sum(memory.values()))} and PyTorch itself")
    table.add_row("output directory", str(Path(cfg.output_dir)))
    Console().print(table)


def matrix_values(layout: Layout) -> int:
    """Numbers in all projection matrices."""
    return sum(
        k * size
        for part in layout.slices
        for k, size in ((part.k_out, part.size_out), (part.k_in, part.size_in))
        if k < size
    )


def _samples(cfg: DictConfig) -> int:
    """The number of training samples; the data is read where the config does not say it."""
    number = OmegaConf.select(cfg, "data.train_samples")
    return len(build_data(cfg.data).train) if number is None else number
