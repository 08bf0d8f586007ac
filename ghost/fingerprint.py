"""A model's weights in one number, to tell checkpoints apart."""

import hashlib

import torch
from torch import Tensor, nn

from ghost.distributed import gathered


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of all parameters and saved buffers by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):  # a module's extra state
            continue
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(gathered(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
