"""Tensors in one number, to tell checkpoints, and the rows that ranks hold, apart."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ghost.distributed import gathered


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of all parameters and saved buffers by name."""
    state = sorted(model.state_dict().items())
    # A module's extra state may be anything.
    return tensors_fingerprint((name, tensor) for name, tensor in state if isinstance(tensor, Tensor))


def tensors_fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of tensors, in their order; of sharded ones over the
    whole.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        whole = gathered(tensor.detach()).cpu().contiguous()
        digest.update(whole.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
