"""Swap a model's forwards for tapped ones while an engine is attached."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ghost.discovery import Tie
from ghost.errors import BatchError, UnsupportedModelError
from ghost.graph import refuse_stray_uses, scale_gradients, whole
from ghost.layers import Layer
from ghost.taps import Tap, TapFunction, TiedHeadFunction, TiedTableFunction

Probes = dict[tuple[str, str], Tensor]
"""Zero tensors `[b]` by layer name and parameter name."""


@dataclass
class StepState:
    """What the swapped forwards read. Only active between the start of a step and the end of its backward.

    Attributes:
        active: Whether forwards are tapped; when not, every module computes what it always did.
        rows: Rows of the batch that goes through the model.
        train_rows: b, how many of them, from the first on, are training samples.
        tokens: T where inputs are `[rows, T, …]`.
        probes: By layer and parameter name, `[b]` zeros that receive inner products.
        targets: Validation gradients by qualified parameter name, where they are known before the forward.
        output_scale: Factor on the gradient at the model's outputs, or None.
        tied: By a tied table's name, its ids and the phantom tensors on their way to its head.
        outputs_scaled: Whether the model's outputs have been seen and scaled.
        called: Layers that have run in this forward.
    """

    active: bool = False
    rows: int = 0
    train_rows: int = 0
    tokens: int | None = None
    probes: Probes = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    output_scale: Tensor | None = None
    outputs_scaled: bool = False
    tied: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    def close(self) -> None:
        """Forwards are plain again, and nothing of the step is kept."""
        self.active, self.output_scale, self.outputs_scaled = False, None, False
        self.probes, self.tied, self.called = {}, {}, set()


class ForwardSwap:
    """Replaces modules' forwards and puts them back exactly."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Set `module.forward` to `make(its present forward)`."""
        had_own = "forward" in module.__dict__
        original = module.forward
        replacement = make(original)

        @functools.wraps(getattr(original, "__func__", original))
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self is not module:  # a deep copy took this method along, and is not what is scored
                return type(self).forward(self, *args, **kwargs)
            return replacement(*args, **kwargs)

        module.forward = MethodType(forward, module)

        def undo() -> None:
            if had_own:
                module.forward = original
            else:
                del module.forward

        self._undo.append(undo)

    def restore(self) -> None:
        """Put every forward back, the last replaced first."""
        while self._undo:
            self._undo.pop()()


class Instrument:
    """Taps on a model's layers.

    Args:
        model: The model.
        taps: One tap a layer; layers without one are left alone.
        ties: Tied matrices that need their cross terms (a joint batch only).
        detach_params: Whether tapped layers run on detached parameters, so that the tap alone defines their
            gradients.
    """

    def __init__(self, model: nn.Module, taps: list[Tap], ties: list[Tie], detach_params: bool) -> None:
        self.model, self.taps, self.detach_params = model, taps, detach_params
        self.state = StepState()
        self._tables = {tie.table.name: tie for tie in ties}
        self._heads = {tie.head.name: tie for tie in ties}
        self._swap = ForwardSwap()
        self._uses_checked = False

    def attach(self) -> None:
        """Swap the forwards.

        Raises:
            UnsupportedModelError: A layer's forward has been replaced by someone else, and scoring would
                bypass it.
        """
        for tap in self.taps:
            if self.detach_params and "forward" in tap.layer.module.__dict__:
                raise UnsupportedModelError(
                    f"layer {tap.layer.name!r} has a forward of its own (another manager's, an adapter's or "
                    "an offloading hook's), which scoring would bypass: remove it, or use "
                    "val_mode='separate' with bitwise=True."
                )
        for tap in self.taps:
            if tap.layer.name in self._tables:
                run = functools.partial(self._run_table, self._tables[tap.layer.name])
            elif tap.layer.name in self._heads:
                run = functools.partial(self._run_head, self._heads[tap.layer.name], tap)
            else:
                run = functools.partial(self._run, tap)
            self._swap.replace(tap.layer.module, functools.partial(self._tapped_forward, tap.layer, run))
        self._swap.replace(self.model, self._scaled_forward)

    def detach(self) -> None:
        """Put every forward back."""
        self._swap.restore()

    def new_probes(self, dtype: torch.dtype, device: torch.device) -> Probes:
        """Fresh zero probes `[b]` for every scored layer's parameters."""
        return {
            (tap.layer.name, key): torch.zeros(
                self.state.train_rows, dtype=dtype, device=device, requires_grad=True
            )
            for tap in self.taps
            if tap.scored
            for key in tap.layer.params
        }

    def _tapped_forward(
        self, layer: Layer, run: Callable[[Callable[..., Any], Tensor], Tensor], original: Callable[..., Any]
    ) -> Callable[..., Any]:
        state = self.state

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not state.active or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            inputs = (*args, *kwargs.values())
            if len(inputs) != 1:
                raise UnsupportedModelError(
                    f"layer {layer.name!r} was called with {len(inputs)} inputs: a layer rule handles one."
                )
            (x,) = inputs
            self._check_first_use(layer)
            return run(original, x)

        return forward

    def _scaled_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        state = self.state

        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = original(*args, **kwargs)
            if not state.active or not torch.is_grad_enabled():
                return outputs
            self._check_parameter_uses(outputs)
            if state.output_scale is None:
                return outputs
            state.outputs_scaled = True
            return scale_gradients(outputs, state.output_scale)

        return forward

    def _check_parameter_uses(self, outputs: Any) -> None:
        """Refuse, once, a model that reads a tapped layer's parameter without calling the layer."""
        if torch.compiler.is_compiling() or self._uses_checked or not self.detach_params:
            return
        uses = [(id(p), tap.layer.qualified(key)) for tap in self.taps for key, p in tap.layer.params.items()]
        tapped = Counter(key for key, _ in uses)
        owners = Counter(id(p) for m in self.model.modules() for p in m.parameters(recurse=False))
        # A layer that is not selected may share its parameter with one that is, and uses it as it always did.
        refuse_stray_uses(outputs, {key: name for key, name in uses if owners[key] == tapped[key]})
        self._uses_checked = True

    def _check_first_use(self, layer: Layer) -> None:
        """With the validation gradient known beforehand scores add up over a layer's uses; without, cross
        terms would be lost.
        """
        state = self.state
        if state.targets or torch.compiler.is_compiling():
            return
        recomputing = torch._C._current_graph_task_id() != -1  # activation checkpointing, inside a backward
        if layer.name in state.called and not recomputing:
            raise UnsupportedModelError(
                f"layer {layer.name!r} runs twice in one forward, and its cross terms need the validation "
                "gradient beforehand: use val_mode='separate'."
            )
        state.called.add(layer.name)

    def _input_rows(self, layer: Layer, x: Tensor) -> Tensor:
        """The input with one leading entry per row of the batch, or an error that names the layer."""
        state = self.state
        if x.dim() == 1 and x.shape[0] == state.rows == state.tokens:
            raise BatchError(
                f"layer {layer.name!r} got a vector of {x.shape[0]} entries, one per row or one per "
                "position: the batch has as many rows as positions, so change its size by one."
            )
        x = layer.rule.rows_first(x, state.rows)
        if x.shape[0] != state.rows:
            raise BatchError(
                f"layer {layer.name!r} got an input of shape {tuple(x.shape)}, whose first size should be "
                f"the batch's {state.rows} rows: samples cannot be told apart in it."
            )
        return x

    def _run_untapped(self, layer: Layer, original: Callable[..., Any], x: Tensor) -> Tensor:
        """The layer's output with one leading entry per row; what is broadcast over the batch is repeated."""
        if self.detach_params:
            params = {key: p.detach() for key, p in layer.module.named_parameters(recurse=False)}
            output = layer.rule.forward(layer.module, params, x)
        else:
            output = original(x)
        shared = layer.rule.rows_first(x, self.state.rows).shape[0] != x.shape[0] or x.dim() == 1
        if shared and output.shape[0] != self.state.rows:
            output = output.expand(self.state.rows, *output.shape[1 if x.dim() > 1 else 0 :]).clone()
        return output

    def _run(self, tap: Tap, original: Callable[..., Any], x: Tensor) -> Tensor:
        layer, state = tap.layer, self.state
        params = list(layer.params.values()) if self.detach_params else []
        probes = [state.probes[layer.name, key] for key in layer.params] if tap.scored else []
        targets = [state.targets[layer.qualified(key)] for key in layer.params] if state.targets else []
        output = self._run_untapped(layer, original, x)
        tapped = TapFunction.apply(
            tap, state.train_rows, whole(output), self._input_rows(layer, x).detach(),
            output.shape, len(targets), *params, *probes, *targets,
        )  # fmt: skip
        return tapped.view(output.shape)

    def _run_table(self, tie: Tie, original: Callable[..., Any], x: Tensor) -> Tensor:
        state, table, head = self.state, tie.table, tie.head
        output, *slots = TiedTableFunction.apply(
            state.train_rows, self._run_untapped(table, original, x), self._input_rows(table, x),
            table.module.padding_idx, table.params["weight"], state.probes[table.name, "weight"],
            state.probes[head.name, "weight"],
        )  # fmt: skip
        state.tied[table.name] = (x, *slots)
        return output

    def _run_head(self, tie: Tie, tap: Tap, original: Callable[..., Any], x: Tensor) -> Tensor:
        state, table, head = self.state, tie.table, tie.head
        if table.name not in state.tied:
            raise UnsupportedModelError(
                f"layer {head.name!r} runs before {table.name!r}, whose table it shares: use "
                "val_mode='separate'."
            )
        ids, *slots = state.tied.pop(table.name)
        if x.shape[:2] != ids.shape:
            raise BatchError(
                f"layer {head.name!r} got an input of shape {tuple(x.shape)}, but its tied table "
                f"{table.name!r} ids of shape {tuple(ids.shape)}, which should be the first two sizes: use "
                "val_mode='separate'."
            )
        return TiedHeadFunction.apply(
            tap.how, state.train_rows, self._run_untapped(head, original, x), x.detach(), ids,
            head.params["weight"], state.probes[head.name, "weight"], *slots,
        )  # fmt: skip
