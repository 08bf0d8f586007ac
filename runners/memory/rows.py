"""Batches of the shapes that a run's data has, full rows all of them."""

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ghost.batch import Inputs, Items
from runners.choices import TaskName
from runners.models.hf_config import DataFacts
from runners.tasks import model_task


def empty_rows(cfg: DictConfig, facts: DataFacts, rows: int) -> tuple[Inputs, Tensor]:
    """Inputs and labels of so many rows, zeros in float32 and int64, as the data source would collate them.

    Rows of text have `seq_len` tokens, and with images one image each.
    """
    classes = torch.zeros(rows, dtype=torch.int64)
    task = model_task(cfg.model) if cfg.model.kind == "hf" else None
    if task is None or task == TaskName.image_classes:
        return torch.zeros(rows, *(facts.input_shape or ())), classes
    ids = torch.zeros(rows, facts.seq_len or 0, dtype=torch.int64)
    if task == TaskName.text_classes:
        return {"input_ids": ids}, classes
    if task == TaskName.seq2seq:
        length = OmegaConf.select(cfg, "data.target_len") or ids.shape[1]
        return {"input_ids": ids}, torch.zeros(rows, length, dtype=torch.int64)
    if task == TaskName.image_text:
        return _with_images(cfg, ids), torch.zeros_like(ids)
    return {"input_ids": ids}, torch.zeros_like(ids)


def _with_images(cfg: DictConfig, ids: Tensor) -> Inputs:
    """The rows `[b, T]` with an image at the beginning of each."""
    side, rows = cfg.data.image_size, len(ids)
    ids[:, : (side // cfg.data.patch_size) ** 2] = cfg.data.image_token_id
    return {"input_ids": ids, "pixel_values": Items(torch.zeros(rows, 3, side, side), torch.arange(rows))}
