"""What of a model can be scored exactly: its layers, its tied matrices, and what must be refused by name."""

from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from ghost.errors import UnsupportedModelError
from ghost.layers import Layer, registered_types, rule_for


def find_layers(model: nn.Module) -> list[Layer]:
    """All modules that have a rule and at least one trainable parameter of their own, in the model's order.

    Raises:
        UnsupportedModelError: A layer has a rule, but settings that cannot be handled exactly.
    """
    layers = []
    for name, module in model.named_modules():
        params = {key: p for key, p in module.named_parameters(recurse=False) if p.requires_grad}
        rule = rule_for(module)
        if params and rule is not None:
            rule.check(name, module)
            layers.append(Layer(name, module, rule, params))
    return layers


def uncovered_parameters(model: nn.Module, layers: list[Layer]) -> list[str]:
    """Qualified names of the trainable parameters that no layer accounts for."""
    covered = {id(p) for layer in layers for p in layer.params.values()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]


def refuse_uncovered(model: nn.Module, layers: list[Layer]) -> None:
    """Raise `UnsupportedModelError`, naming modules and parameters, where a parameter has no rule."""
    names = uncovered_parameters(model, layers)
    if names:
        owners = {name.rpartition(".")[0] for name in names}
        kinds = sorted({type(model.get_submodule(owner)).__name__ for owner in owners})
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UnsupportedModelError(
            f"no layer rule covers the trainable parameters {shown} (in {', '.join(kinds)}), so validation "
            "rows would leak into their gradients: register a rule with ghost.register_layer (there are "
            f"rules for {', '.join(registered_types())}), freeze them, or use val_mode='separate'."
        )


@dataclass(frozen=True)
class Tie:
    """An embedding and a later bias-free linear layer that share one matrix."""

    table: Layer
    head: Layer


def find_ties(layers: list[Layer]) -> list[Tie]:
    """Matrices shared by an embedding and a linear layer.

    Raises:
        UnsupportedModelError: A parameter is shared in another way, whose cross terms a joint backward does
            not have.
    """
    uses: dict[int, list[tuple[Layer, str]]] = defaultdict(list)
    for layer in layers:
        for key, param in layer.params.items():
            uses[id(param)].append((layer, key))
    ties = []
    for shared in uses.values():
        if len(shared) == 1:
            continue
        tables = [layer for layer, _ in shared if isinstance(layer.module, nn.Embedding)]
        heads = [
            layer for layer, _ in shared if isinstance(layer.module, nn.Linear) and layer.module.bias is None
        ]
        if len(shared) != 2 or len(tables) != 1 or len(heads) != 1:
            names = ", ".join(layer.qualified(key) for layer, key in shared)
            raise UnsupportedModelError(
                f"the parameters {names} are one tensor, and only an embedding tied to a bias-free linear "
                "layer can be scored in one pass: use val_mode='separate', exact for every kind of sharing."
            )
        ties.append(Tie(tables[0], heads[0]))
    return ties


def refuse_mixing_layers(model: nn.Module) -> None:
    """Raise `UnsupportedModelError`, naming the layer, where a layer mixes the samples of a batch."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if module.training or module.running_mean is None:
            raise UnsupportedModelError(
                f"layer {name!r} is a {type(module).__name__} that takes its statistics from the batch, so a "
                "sample's gradient depends on the other samples: give it running statistics and put it in "
                "eval mode (layer.eval())."
            )
