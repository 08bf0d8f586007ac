"""What of a model can be scored exactly: its layers, its tied matrices, and what must be refused by name."""

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ghost.distributed import plain_type
from ghost.errors import GhostConfigError, UnsupportedModelError
from ghost.layers import Layer, WholeRule, rule_for


def find_layers(model: nn.Module) -> list[Layer]:
    """All modules with trainable parameters to account for, in the model's order; one without a rule of its
    own is scored by running it once more.

    Raises:
        UnsupportedModelError: A layer has a rule, but settings that cannot be handled exactly.
    """
    layers: list[Layer] = []
    claimed: set[str] = set()  # qualified names that an enclosing module accounts for
    for name, module in model.named_modules():
        rule = rule_for(module) or _WHOLE
        params = {key: p for key, p in rule.owned(module).items() if p.requires_grad}
        layer = Layer(name, module, rule, params)
        layer = replace(layer, params={k: p for k, p in params.items() if layer.qualified(k) not in claimed})
        if layer.params:
            _refuse_hidden_parameters(layer)
            rule.check(name, module)
            layers.append(layer)
            claimed |= {layer.qualified(key) for key in layer.params}
    return layers


_WHOLE = WholeRule()


def _refuse_hidden_parameters(layer: Layer) -> None:
    """Raise `UnsupportedModelError` where a layer's parameters are not what it computes with."""
    module, kind = layer.module, type(layer.module).__name__
    by_hook = module._forward_pre_hooks and any(key.endswith(("_orig", "_g", "_v")) for key in layer.params)
    if by_hook or isinstance(module, ParametrizationList):
        raise UnsupportedModelError(
            f"layer {layer.name!r} ({kind}) computes a weight from {sorted(layer.params)}: remove the "
            "parametrization, or freeze the layer."
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        _refuse_table_options(layer.name, module)
    own = [id(p) for _, p in module.named_parameters(recurse=False, remove_duplicate=False)]
    if len(own) != len(set(own)):
        raise UnsupportedModelError(
            f"layer {layer.name!r} ({kind}) has one parameter under several names: give it one name."
        )
    for key, parameter in layer.params.items():
        if parameter.is_complex():
            raise UnsupportedModelError(
                f"the parameter {layer.qualified(key)!r} is {parameter.dtype}: scores are of real parameters."
            )


def _refuse_table_options(name: str, module: nn.Embedding | nn.EmbeddingBag) -> None:
    for option, why in (
        (module.max_norm is not None, "max_norm rewrites the table during the forward"),
        (module.scale_grad_by_freq, "scale_grad_by_freq makes a sample's gradient depend on its batch"),
        (module.sparse, "sparse=True yields sparse gradients"),
    ):
        if option:
            raise UnsupportedModelError(
                f"layer {name!r} is an nn.Embedding whose {why}: set it to its default."
            )


def uncovered_parameters(model: nn.Module, layers: list[Layer]) -> list[str]:
    """Qualified names of the trainable parameters that no layer accounts for."""
    covered = {id(p) for layer in layers for p in layer.params.values()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]


@dataclass(frozen=True)
class Tie:
    """An embedding and a later bias-free linear layer that share one matrix."""

    table: Layer
    head: Layer


def shared_parameters(layers: list[Layer]) -> dict[int, list[tuple[Layer, str]]]:
    """Parameters that several layers have, by `id`, with the layers and their names in them."""
    uses: dict[int, list[tuple[Layer, str]]] = defaultdict(list)
    for layer in layers:
        for key, param in layer.params.items():
            uses[id(param)].append((layer, key))
    return {key: shared for key, shared in uses.items() if len(shared) > 1}


def find_ties(layers: list[Layer]) -> list[Tie]:
    """Matrices shared by one embedding and one bias-free linear layer."""
    ties = []
    for shared in shared_parameters(layers).values():
        tables = [layer for layer, _ in shared if plain_type(layer.module) is nn.Embedding]
        heads = [
            layer
            for layer, _ in shared
            if plain_type(layer.module) is nn.Linear and layer.module.bias is None
        ]
        if len(shared) == 2 and len(tables) == 1 and len(heads) == 1:
            ties.append(Tie(tables[0], heads[0]))
    return ties


def refuse_mixing_layers(model: nn.Module) -> None:
    """Raise `UnsupportedModelError`, naming the layer, where a layer mixes the samples of a batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.training:
            if module.track_running_stats:
                raise UnsupportedModelError(
                    f"layer {name!r} is a {type(module).__name__} that tracks running statistics, into which "
                    "validation rows would go: put it in eval mode (layer.eval()), or make it with "
                    "track_running_stats=False."
                )
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise UnsupportedModelError(
                f"layer {name!r} is a {type(module).__name__} that takes its statistics from the batch, so a "
                "sample's gradient depends on the other samples: give it running statistics and put it in "
                "eval mode (layer.eval())."
            )


def refuse_half(model: nn.Module) -> None:
    """Raise `GhostConfigError`, naming the parameter, where float16 weights are trained."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype is torch.float16:
            raise GhostConfigError(
                f"the parameter {name!r} is float16, in which gradients underflow and which a GradScaler "
                "refuses: use float32 weights under autocast float16 with a GradScaler, or bfloat16."
            )
