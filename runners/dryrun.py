"""`dry_run=true`: what a run would train, need and write, without building anything large.

The model is built on PyTorch's meta device, so its parameters are counted and not allocated, and the largest
step is rehearsed on tensors without memory.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from runners.data import build_data
from runners.losses import build_task
from runners.memory.estimate import MemoryEstimate, NoEstimateError, estimate_memory, facts_of
from runners.models import build_on_meta
from runners.models.hf_config import DataFacts
from runners.models.keys import CLASS_TASKS
from runners.progress import readable
from runners.tasks import model_task
from runners.train import ghost_config


def report(cfg: DictConfig) -> None:
    """Prints the run's size, memory estimate and output directory on the console."""
    facts = data_facts(cfg)
    model = build_on_meta(cfg.model, facts)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    table = Table(title="dry run: nothing was trained", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("model", f"{cfg.model.name}, {parameters:,} parameters in {cfg.dtype.model}")
    for name, size in _work(cfg).items():
        table.add_row(name, size)
    for row in memory_rows(lambda: planned_memory(cfg, facts)):
        table.add_row(*row)
    for remark in _remarks(cfg):
        table.add_row("", remark)
    table.add_row("output directory", cfg.output_dir)
    Console().print(table)


def data_facts(cfg: DictConfig) -> DataFacts:
    """What the data tells the model; it is read only for what the model's config leaves open."""
    seq_len = OmegaConf.select(cfg, "data.seq_len")
    if _is_complete(cfg.model):
        return DataFacts(seq_len=seq_len)
    return facts_of(cfg, build_data(cfg.data))


def planned_memory(cfg: DictConfig, facts: DataFacts) -> MemoryEstimate:
    """What a training run of this config would take of each process, on the device that it would take here.

    Raises:
        NoEstimateError: The model asks for values that nothing without memory has.
    """
    config = ghost_config(cfg, Path(cfg.output_dir), build_task(cfg, planned_device(cfg)))
    return estimate_memory(cfg, config, facts, _val_rows(cfg), planned_device(cfg))


def planned_device(cfg: DictConfig) -> torch.device:
    """The device that the run would take; the CPU for a GPU that is not here."""
    wanted = cfg.hardware.device != "cpu"
    return torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")


def _val_rows(cfg: DictConfig) -> Mapping[str, int]:
    """Validation rows of each set; which domains there are only the data tells."""
    if cfg.engine.val_sets == "domain" and cfg.engine.name != "regular":
        return Counter(build_data(cfg.data).val.domains)
    return {"": cfg.data.val_samples - cfg.data.test_samples}


def memory_rows(estimated: Callable[[], MemoryEstimate]) -> list[tuple[str, str]]:
    """The estimate as rows of a table, the total last; or the one row that says why there is none."""
    try:
        estimate = estimated()
    except NoEstimateError as error:
        return [("memory", str(error))]
    terms = [(f"memory: {name}", readable(size)) for name, size in estimate.terms.items()]
    kind = "of the GPU's memory" if estimate.on_device else "of host memory"
    return [*terms, ("memory: total", f"{readable(estimate.total)} {kind}")]


def _remarks(cfg: DictConfig) -> list[str]:
    """What to know about the numbers."""
    found = []
    if cfg.hardware.strategy != "none":
        found.append(
            f"memory is that of each of {cfg.hardware.processes} processes ({cfg.hardware.strategy})"
        )
    if cfg.hardware.device == "cuda" and planned_device(cfg).type == "cpu":
        found.append("memory is that of a run on this machine's CPU: PyTorch sees no CUDA device here")
    if cfg.trainer.compile:
        found.append("memory is that of the uncompiled model")
    return found


def _is_complete(model: DictConfig) -> bool:
    """Whether the model's config alone says how large it is."""
    reads_classes = model.kind != "hf" or model_task(model) in CLASS_TASKS
    return not reads_classes and not _leaves_vocabulary_open(model.config)


def _leaves_vocabulary_open(config: DictConfig) -> bool:
    parts = [part for part in config.values() if isinstance(part, DictConfig)]
    return config.get("vocab_size", 0) is None or any(map(_leaves_vocabulary_open, parts))


def _work(cfg: DictConfig) -> dict[str, str]:
    """Steps, samples and tokens of the run."""
    trainer = cfg.trainer
    if trainer.eval_only:
        return {"evaluation": f"{cfg.data.val_samples:,} samples"}
    micro_batches = trainer.gradient_accumulation_steps * (cfg.hardware.processes or 1)
    samples = trainer.max_steps * trainer.batch_size * micro_batches
    work = {"steps": f"{trainer.max_steps:,}", "samples": f"{samples:,}"}
    train_samples = OmegaConf.select(cfg, "data.train_samples")
    if train_samples is not None:
        work["samples"] += f" ({samples / train_samples:.2f} epochs)"
    seq_len = OmegaConf.select(cfg, "data.seq_len")
    if seq_len is not None:
        work["tokens"] = f"{samples * seq_len:,}"
    return work
