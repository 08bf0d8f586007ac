"""Trained weights as a folder that `model.path` of later runs takes."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from runners.world import ALONE, World
from runners.wrapping import whole_state


def save_model(model: nn.Module, folder: Path, world: World = ALONE) -> None:
    """Write a Hugging Face model's weights (safetensors) and configuration; the folder appears complete or
    not at all. Of several processes the main one writes, and a model that is split is gathered to it, so all
    of them call this.
    """
    assert isinstance(model, PreTrainedModel)
    state = whole_state(model) if isinstance(model, FSDPModule) else None
    if world.is_main:
        _write(model, folder, state)


def _write(model: PreTrainedModel, folder: Path, state: dict[str, Any] | None) -> None:
    # Beside the target, so that the rename at the end stays on one file system.
    with TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        model.save_pretrained(partial, state_dict=state)
        partial.replace(folder)
