"""The autograd graph around taps: which tensor to tap, gradients scaled at the outputs, parameters used
behind a tap.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ghost.errors import UnsupportedModelError


def whole(output: Tensor) -> Tensor:
    """The tensor that `output` is another shape of, or itself.

    A linear layer's output is often a reshaped matrix. A tap edits its tensor in place as far as autograd is
    concerned, and of a view autograd would then copy the whole gradient.
    """
    base = None if torch.compiler.is_compiling() else output._base
    if base is None or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base if base.numel() == output.numel() else output


class _ScaleGradient(torch.autograd.Function):
    """The identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor.to(grads[0].dtype), None


def scale_gradients(outputs: Any, factor: Tensor) -> Any:
    """The model's outputs (a tensor, mapping, sequence or nesting of them), each with its gradient multiplied
    by `factor`.

    Raises:
        UnsupportedModelError: There is no tensor to be found in them.
    """
    leaves = torch.utils._pytree.tree_leaves(outputs)
    if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        raise UnsupportedModelError(
            f"the model's output is a {type(outputs).__name__} in which no tensor with a gradient is found: "
            "return a tensor, tuple or dict, or use manager.step, which weighs the loss itself."
        )

    def scale(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            return _ScaleGradient.apply(leaf, factor)
        return leaf

    return torch.utils._pytree.tree_map(scale, outputs)


_OWN_NODES = ("TapFunction", "GenericFunction", "TiedTableFunction", "TiedHeadFunction", "CompiledFunction")
"""Graph nodes that may hold a tapped parameter: the taps', and those of compiled parts, which have taps
inside.
"""


def refuse_stray_uses(outputs: Any, names: Mapping[int, str]) -> None:
    """Raise `UnsupportedModelError` where the graph of `outputs` uses a parameter other than through its tap.

    Args:
        names: Qualified names of the tapped parameters by `id`.
    """
    leaves = torch.utils._pytree.tree_leaves(outputs)
    pending = [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        for source, _ in node.next_functions:
            if source is None or (source in seen and not hasattr(source, "variable")):
                continue
            name = names.get(id(getattr(source, "variable", None)))
            if name is not None and not node.name().startswith(_OWN_NODES):
                raise UnsupportedModelError(
                    f"the parameter {name!r} is used outside its layer (by {node.name()}), where neither its "
                    "scores nor the validation rows' part of its gradient are known: call the layer itself."
                )
            seen.add(source)
            pending.append(source)
