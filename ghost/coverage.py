"""What the scores speak of: each layer's share of the trainable parameters and of the validation gradient's
squared norm.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ghost.config import GhostConfig
from ghost.discovery import find_layers, uncovered_parameters
from ghost.selection import family


def coverage(model: nn.Module, config: GhostConfig, val_loss: Tensor) -> dict[str, Any]:
    """Which layers are scored and how much of the model and of `∇L_val` that is.

    Shared parameters count once: in `layers` for the first that has them, in the totals if any scored layer
    does.

    Args:
        val_loss: A validation loss with its graph; it is differentiated here and `.grad` is left alone.

    Returns:
        `parameters` and `scored_parameters` (numbers), `scored_parameter_share` and `scored_val_grad_share`
        (of `‖∇L_val‖²`),
        `layers` (name, type, family, parameters, val_grad_share, scored) and `unscored_parameters` (names
        without a layer rule).
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(val_loss, list(named.values()), allow_unused=True)
    square = {
        id(p): 0.0 if g is None else float(g.double().square().sum())
        for p, g in zip(named.values(), grads, strict=True)
    }
    norm = sum(square.values()) or 1.0
    layers = find_layers(model)
    rows, seen = [], set[int]()
    for layer in layers:
        own = [p for p in layer.params.values() if id(p) not in seen]
        seen |= {id(p) for p in own}
        rows.append(
            {
                "name": layer.name,
                "type": type(layer.module).__name__,
                "family": family(layer),
                "parameters": sum(p.numel() for p in own),
                "shared_parameters": sum(p.numel() for p in layer.params.values())
                - sum(p.numel() for p in own),
                "val_grad_share": sum(square[id(p)] for p in own) / norm,
                "scored": config.selection.matches(layer),
            }
        )
    total = sum(p.numel() for p in named.values())
    scored = {id(p): p for layer in layers if config.selection.matches(layer) for p in layer.params.values()}
    scored_parameters = sum(p.numel() for p in scored.values())
    return {
        "parameters": total,
        "scored_parameters": scored_parameters,
        "scored_parameter_share": scored_parameters / total,
        "scored_val_grad_share": sum(square[key] for key in scored) / norm,
        "layers": rows,
        "unscored_parameters": uncovered_parameters(model, layers),
    }
