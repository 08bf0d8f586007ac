"""Trained weights as a folder that `model.path` of later runs takes."""

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn
from transformers import PreTrainedModel


def save_model(model: nn.Module, folder: Path) -> None:
    """Write a Hugging Face model's weights (safetensors) and configuration; the folder appears complete or
    not at all.
    """
    assert isinstance(model, PreTrainedModel)
    # Beside the target, so that the rename at the end stays on one file system.
    with TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        model.save_pretrained(partial)
        partial.replace(folder)
