"""What the library must know of a kind of layer: how to run it without its parameters' own gradients, and
what those are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ghost.gradients import SampleGradients


class LayerRule(ABC):
    """One kind of layer. Stateless: one object serves all layers of its kind."""

    def check(self, name: str, module: nn.Module) -> None:
        """Raise `UnsupportedModelError`, naming the layer, where its settings cannot be handled exactly."""
        del name, module

    def rows_first(self, x: Tensor, rows: int) -> Tensor:
        """The layer's input with one leading entry per sample: an input shared by all samples (leading size
        1) is expanded.
        """
        return x.expand(rows, *x.shape[1:]) if x.shape[0] == 1 else x

    @abstractmethod
    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The layer's own computation with `params` in place of its parameters.

        Must return a new tensor that its own backward does not need again (as `tanh` and `exp` need theirs):
        the tap marks it as changed in place.
        """

    @abstractmethod
    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        """The per-sample gradients of every parameter, by its name in the module.

        Args:
            x: The layer's input `[b, …]`.
            grad: The gradient at the layer's output `[b, …]`.
        """


@dataclass(frozen=True)
class Layer:
    """A module of the model together with its rule and the parameters of it that are trained.

    Attributes:
        name: The module's qualified name.
        params: Trainable parameters by their names in the module.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    params: dict[str, nn.Parameter]

    def qualified(self, param: str) -> str:
        """The parameter's qualified name."""
        return f"{self.name}.{param}" if self.name else param


_RULES: dict[str, LayerRule] = {}
"""By qualified type name, so that a rule for another library's layer does not import that library."""


def _type_name(module_type: type[nn.Module]) -> str:
    return f"{module_type.__module__}.{module_type.__qualname__}"


def register_layer(*module_types: type[nn.Module] | str) -> Callable[[type[LayerRule]], type[LayerRule]]:
    """Class decorator: the rule handles modules whose type is exactly one of `module_types` (types or
    qualified names).

    Exactly, since a subclass may compute something else: it is registered on its own, or refused by name.
    """

    def register(rule: type[LayerRule]) -> type[LayerRule]:
        for module_type in module_types:
            name = module_type if isinstance(module_type, str) else _type_name(module_type)
            _RULES[name] = rule()
        return rule

    return register


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule registered for the module's type, if any."""
    return _RULES.get(_type_name(type(module)))


def registered_types() -> list[str]:
    """Names of the module types that have a rule, for messages."""
    return sorted(name.rsplit(".", 1)[-1] for name in _RULES)
