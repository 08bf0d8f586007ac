"""What the library must know of a kind of layer: how to run it without its parameters' own gradients, and
what those are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ghost.distributed import plain_type
from ghost.errors import UnsupportedModelError
from ghost.gradients import SampleGradients


def with_parameters(module: nn.Module, params: Mapping[str, Tensor]) -> nn.Module:
    """A stand-in for the module that shares everything with it but has `params` among its parameters.

    Call its class's `forward` on it; what that assigns to `self` does not reach the module. The module itself
    is not touched, since `torch.compile` cannot trace a change of it within a backward.
    """
    stand_in = object.__new__(type(module))
    stand_in.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, **params}}
    return stand_in


def sum_rows_to(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Each sample's sum over the axes along which a parameter was broadcast.

    Args:
        values: `[b, …]`, output gradient times the output's derivative by the parameter.
        shape: The parameter's; it ends where `values` ends, and a leading 1 may stand for the batch.

    Returns:
        `[b, *shape]`.
    """
    rows, inner = values.shape[0], values.dim() - 1
    own = tuple(shape)[max(0, len(shape) - inner) :]
    return values.sum_to_size(rows, *(1,) * (inner - len(own)), *own).reshape(rows, *shape)


def leading_ones(shape: torch.Size) -> int:
    """How many axes of size 1 come first."""
    return next((axis for axis, size in enumerate(shape) if size != 1), len(shape))


class Rule(ABC):
    """One kind of layer. Stateless: one object serves all layers of its kind.

    Attributes:
        inputs_first: Whether the first axis of its matrices is that of the layer's inputs, not of its
            outputs.
    """

    inputs_first: ClassVar[bool] = False

    def as_matrix(self, shape: torch.Size) -> tuple[int, int]:
        """A parameter of this shape as a matrix: its first axis, and all others as one."""
        return (shape.numel(), 1) if len(shape) < 2 else (shape[0], shape[1:].numel())

    def check(self, name: str, module: nn.Module) -> None:
        """Raise `UnsupportedModelError`, naming the layer, where its settings cannot be handled exactly."""
        del name, module

    @abstractmethod
    def owned(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that the rule accounts for, by their names in the module."""


class LayerRule(Rule):
    """A layer with one input, one output and a formula for its per-sample gradients.

    Attributes:
        any_rank: Whether `gradients` takes inputs with any number of axes between the samples' and the last.
    """

    any_rank: ClassVar[bool] = False

    def owned(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return dict(module.named_parameters(recurse=False))

    def smallest_rank(self, module: nn.Module) -> int:
        """How many axes an input has at least, the batch's among them. With fewer the layer would take the
        samples for channels or features.
        """
        del module
        return 1

    def rows_first(self, x: Tensor, rows: int) -> Tensor:
        """The layer's input with one leading entry per sample: an input shared by all samples (leading size
        1) is expanded.
        """
        return x.expand(rows, *x.shape[1:]) if x.shape[0] == 1 else x

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The layer's own computation with `params` in place of its parameters: by default that of its class.

        Must return a new tensor that its own backward does not need again (as `tanh` and `exp` need theirs):
        the tap marks it as changed in place. By default it is a copy of what the module's own forward gives.
        """
        output: Tensor = plain_type(module).forward(with_parameters(module, params), x)
        return output.clone()  # whatever the module ends in

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
    rule: Rule
    params: dict[str, nn.Parameter]

    def live(self) -> dict[str, nn.Parameter]:
        """The parameters as the module has them now: under FSDP2 whole ones take the place of the shards
        within its forward and backward.

        Raises:
            UnsupportedModelError: One is no parameter now.
        """
        found = {}
        for key in self.params:
            owner, _, own = key.rpartition(".")
            value = getattr(self.module.get_submodule(owner), own)
            if not isinstance(value, nn.Parameter):
                raise UnsupportedModelError(
                    f"layer {self.name!r} has a {type(value).__name__} for its parameter {key!r}, as under "
                    "torch.func.functional_call: give it an nn.Parameter, or the model its own parameters."
                )
            found[key] = value
        return found

    def qualified(self, param: str) -> str:
        """The parameter's qualified name."""
        return f"{self.name}.{param}" if self.name else param


_RULES: dict[str, Rule] = {}
"""By qualified type name, so that a rule for another library's layer does not import that library."""


def type_name(module_type: type[nn.Module] | str) -> str:
    """The qualified name under which registers keep a type; a name is its own."""
    if isinstance(module_type, str):
        return module_type
    return f"{module_type.__module__}.{module_type.__qualname__}"


Gradients = Callable[[nn.Module, Tensor, Tensor], dict[str, SampleGradients]]
"""`gradients(module, x, grad)`, as in `LayerRule.gradients`."""


class _FunctionRule(LayerRule):
    """A rule that is one function; the module's own forward does the rest."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        return self._gradients(module, x, grad)


RuleOrFunction = TypeVar("RuleOrFunction", type[Rule], Gradients)


def register_layer(
    *module_types: type[nn.Module] | str,
) -> Callable[[RuleOrFunction], RuleOrFunction]:
    """Decorator of a rule class, or of a function `gradients(module, x, grad)` as in `LayerRule.gradients`:
    it handles modules whose type is exactly one of `module_types` (types or qualified names).

    Exactly, since a subclass may compute something else: it is registered on its own, or scored by running it
    once more (`ghost.layers.whole`).
    """

    def register(rule: RuleOrFunction) -> RuleOrFunction:
        handler = rule() if isinstance(rule, type) else _FunctionRule(rule)
        for module_type in module_types:
            _RULES[type_name(module_type)] = handler
        return rule

    return register


def rule_for(module: nn.Module) -> Rule | None:
    """The rule registered for the module's type, if any."""
    return _RULES.get(type_name(plain_type(module)))
