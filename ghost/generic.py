"""Exact per-sample gradients of any module that treats samples independently.

The module runs once in the model's forward, as it is. In the backward it runs once more under
`torch.vmap(torch.func.vjp(...))`, each sample on its own as far as the module can tell, all of them in one
batched pass: what comes out is `∂⟨grad_i, f(θ, x_i)⟩/∂θ` for every sample i.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ghost.algebra import unnarrowed
from ghost.errors import UnsupportedModelError
from ghost.gradients import Materialised, SampleGradients
from ghost.layers import Layer, WholeRule
from ghost.layers.whole import substituted
from ghost.memory import is_out_of_memory
from ghost.step import StepState, Unit
from ghost.taps import Tap, wide

Leaves = list[Any]
_SAVED = object()  # stands in a packed call for a tensor


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module, as it can be run again.

    Attributes:
        original: The module's own forward.
        leaves, spec: Its arguments, samples first.
        owned: Indices of the leaves that have an entry for each of the unit's; the others are shared by all.
        outputs: Copies of the outputs that are tapped, to compare the second run with.
        autocast: Device type, dtype and whether autocast was on.
    """

    layer: Layer
    state: StepState
    unit: Unit
    original: Callable[..., Any]
    leaves: Leaves
    spec: TreeSpec
    owned: tuple[int, ...]
    outputs: tuple[Tensor, ...]
    autocast: tuple[str, torch.dtype, bool]

    def packed(self) -> tuple["ModuleCall", list[Tensor]]:
        """The call without its tensors, and these: autograd lets go of what it saves once a backward is done,
        and activation checkpointing does not keep it at all.
        """
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        empty = [_SAVED if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return replace(self, leaves=empty, outputs=()), [*tensors, *self.outputs]

    def unpacked(self, tensors: Sequence[Tensor]) -> "ModuleCall":
        """The call with the tensors of `packed`."""
        saved = iter(tensors)
        leaves = [next(saved) if leaf is _SAVED else leaf for leaf in self.leaves]
        return replace(self, leaves=leaves, outputs=tuple(saved))

    @property
    def rule(self) -> WholeRule:
        assert isinstance(self.layer.rule, WholeRule)
        return self.layer.rule

    def run(self, params: Mapping[str, Tensor], leaves: Leaves) -> list[Tensor]:
        """The module's floating-point outputs, samples first, with `params` in place of its own."""
        module, rule = self.layer.module, self.rule
        args, kwargs = rule.as_called(module, tree_unflatten(leaves, self.spec))
        device, dtype, enabled = self.autocast
        with ExitStack() as stack:
            stack.enter_context(_unchanged(module))
            stack.enter_context(rule.context_again())
            stack.enter_context(substituted(module, params))
            stack.enter_context(torch.autocast(device, dtype, enabled))
            return floating(rule.outputs_rows_first(module, self.original(*args, **kwargs)))

    def sample_gradients(self, grads: Sequence[Tensor]) -> dict[str, SampleGradients]:
        """Per-sample gradients of the layer's parameters.

        Args:
            grads: Gradients at the outputs `[size, …]`.

        Raises:
            UnsupportedModelError: The module cannot be run sample by sample.
        """
        params = {name: p.detach() for name, p in self.layer.live().items()}
        rows = [self.leaves[i] for i in self.owned]

        def one(row: list[Tensor], grad: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
            leaves = list(self.leaves)
            for i, tensor in zip(self.owned, row, strict=True):
                leaves[i] = tensor[None]
            outputs: list[Tensor]
            outputs, pull = torch.func.vjp(lambda p: self.run(p, leaves), params)  # type: ignore[misc]
            if [o.shape[1:] for o in outputs] != [g.shape for g in grad]:
                self._refuse()
            (found,) = pull([g[None].to(o.dtype) for g, o in zip(grad, outputs, strict=True)])
            return found, [o.squeeze(0) for o in outputs]

        active, self.state.active = self.state.active, False  # layers inside compute what they always did
        devices = [g.device for g in grads[:1] if g.is_cuda]
        try:
            # Fused attention has no batching rule; the plain one has.
            with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH):
                found, outputs = self._map(one, rows, list(grads))
        finally:
            self.state.active = active
        self._compare(outputs)
        return {name: Materialised(wide(grad)) for name, grad in found.items()}

    def _map(self, one: Callable[..., Any], rows: list[Tensor], grads: list[Tensor]) -> Any:
        """`one` over all samples, in one batched run where the module can be batched."""
        try:
            return torch.vmap(one, randomness="different")(rows, grads)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            if any(True for _ in self.layer.module.children()):
                # Sample after sample would be many runs of what may be the whole model.
                raise UnsupportedModelError(self._cannot("for all samples at once", error)) from error
        try:
            found = [one([r[i] for r in rows], [g[i] for g in grads]) for i in range(self.unit.size)]
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise UnsupportedModelError(self._cannot("for a sample on its own", error)) from error
        flat = [tree_flatten(item) for item in found]
        stacked = [torch.stack(parts) for parts in zip(*(f for f, _ in flat), strict=True)]
        return tree_unflatten(stacked, flat[0][1])

    def _cannot(self, how: str, error: Exception) -> str:
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0][:160]
        return (
            f"layer {self.layer.name!r} ({type(self.layer.module).__name__}) has parameters of its own and "
            f"cannot be run {how} ({first_line}): register a rule with ghost.register_layer."
        )

    def _compare(self, outputs: Sequence[Tensor]) -> None:
        """Refuse a module that gives samples on their own other outputs."""
        for kept, again in zip(self.outputs, outputs, strict=True):
            if not _agree(kept, again):
                self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedModelError(
            f"layer {self.layer.name!r} ({type(self.layer.module).__name__}) gives other outputs for samples "
            "on their own than for the batch (it mixes samples, draws random numbers, or has an input or "
            "output whose first size is the number of rows or 1 by chance): register a rule with "
            "ghost.register_layer."
        )


_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 5e-2, torch.float32: 1e-3, torch.float64: 1e-6}
"""Of two runs of one module, relative to the largest entry."""

_MASKED = 1e4
"""Entries from here on stand for minus infinity in masks; they hide no difference of others."""


def _agree(kept: Tensor, again: Tensor) -> bool:
    """Whether two runs gave the same but for rounding; masked entries and such that are not finite count
    apart.
    """
    real = kept.isfinite() & (kept.abs() < _MASKED)
    first, second, tolerance = kept[real], again[real], _TOLERANCE[kept.dtype]
    near = first.numel() == 0 or bool(
        (first - second).abs().max() <= tolerance * first.abs().max().clamp_min(1e-30)
    )
    return near and torch.allclose(kept[~real], again[~real], rtol=tolerance, equal_nan=True)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Attributes and buffers that a run leaves on modules (a cache, a counter) are put back: it is a second
    one.
    """
    kept = [(m, dict(m.__dict__), dict(m._buffers)) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes, buffers in kept:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            m._buffers.clear()
            m._buffers.update(buffers)


def floating(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in a module's outputs."""
    leaves, _ = tree_flatten(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class GenericFunction(Function):
    """The identity on a module's outputs whose backward is a `Tap`'s; see `ModuleCall`."""

    @staticmethod
    def forward(
        ctx: Any, tap: Tap, call: ModuleCall, outputs: int, targets: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, kept = call.packed()
        ctx.tap, ctx.outputs, ctx.targets = tap, outputs, targets
        ctx.save_for_backward(*tensors[len(tensors) - targets :], *kept)
        found = tensors[:outputs]
        ctx.mark_dirty(*found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own = ctx.next_functions[ctx.outputs : len(ctx.next_functions) - ctx.targets]
        if not ctx.tap.is_asked(own):
            return None, None, None, None, *grads, *(None for _ in range(len(own) + ctx.targets))
        saved = ctx.saved_tensors
        targets = ctx.tap.fetch(saved[: ctx.targets], grads[0].device)
        call = ctx.call.unpacked(saved[ctx.targets :])
        with unnarrowed(grads[0]):
            found = ctx.tap.backward(call.unit, call.sample_gradients(grads), targets)
        return None, None, None, None, *grads, *found
