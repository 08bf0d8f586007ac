"""The tiny models, built from their YAML files, and rows that they can read."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from ghost.batch import Inputs
from runners.choices import TaskName
from runners.losses import Task, build_task
from runners.models import build_model, place
from runners.tasks import model_task

CONF = Path(__file__).resolve().parents[3] / "conf"
CPU = torch.device("cpu")
VOCABULARY, CLASSES, SIDE, COLUMNS = 40, 5, 8, 12
IMAGE_TOKEN = VOCABULARY - 1
IMAGE_TOKENS = 4  # of one image

TINY = (
    *("gpt2-tiny", "pythia-tiny", "llama-tiny", "qwen2-tiny", "opt-tiny", "t5-tiny", "bert-tiny"),
    *("vit-tiny", "resnet-tiny", "llava-tiny", "mlp", "cnn"),
)
OVERRIDES = {
    "gpt2-tiny": [f"model.config.vocab_size={VOCABULARY}", "model.config.n_embd=32"],
    "llava-tiny": [
        f"model.config.image_token_index={IMAGE_TOKEN}", f"model.config.vision_config.image_size={SIDE}",
        "model.config.vision_config.patch_size=4", f"model.config.image_seq_length={IMAGE_TOKENS}",
    ],
    "mlp": ["model.hidden=[16,16]"],
    "cnn": ["model.channels=[4,4]"],
}  # fmt: skip


@cache
def composed(*overrides: str) -> DictConfig:
    """The config of a command line; composing takes longer than most of what is tested with it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def tiny(name: str, *overrides: str) -> tuple[nn.Module, Task]:
    """The model of `conf/model/<name>.yaml`, for small rows, in float64 and away from its start."""
    cfg = composed(f"model={name}", *OVERRIDES.get(name, []), "dtype=fp64", *overrides)
    is_table = model_task(cfg.model) == TaskName.table_classes
    torch.manual_seed(0)
    model = build_model(cfg.model, VOCABULARY, (COLUMNS,) if is_table else (3, SIDE, SIDE), CLASSES)
    place(model, CPU, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():  # biases are 0 and norms 1 at the start
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, build_task(cfg, CPU)


def rows(task: TaskName, count: int, seed: int, length: int = 9, masked: bool = True) -> tuple[Any, Tensor]:
    """`count` rows in float64; with `masked`, token rows are of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, CLASSES, (count,), generator=draw)
    if task == TaskName.table_classes:
        return torch.randn(count, COLUMNS, generator=draw, dtype=torch.float64), classes
    images = torch.randn(count, 3, SIDE, SIDE, generator=draw, dtype=torch.float64)
    if task == TaskName.image_classes:
        return images, classes
    ids = torch.randint(0, IMAGE_TOKEN, (count, length), generator=draw)
    lengths = torch.arange(count) % 3 if masked else torch.zeros(count)
    mask = (torch.arange(length) < length - lengths[:, None]).long()  # [b, T]
    inputs: Inputs = {"input_ids": ids * mask} | ({"attention_mask": mask} if masked else {})
    if task == TaskName.text_classes:
        return inputs, classes
    labels = torch.where(mask.bool(), ids, -100)
    if task == TaskName.seq2seq:
        return inputs, labels[:, :6].contiguous()
    if task == TaskName.image_text:
        inputs["input_ids"][:, :IMAGE_TOKENS] = IMAGE_TOKEN
        inputs["pixel_values"] = images
        labels[:, :IMAGE_TOKENS] = -100
    return inputs, labels
