"""Find a model's layers, and swap their forwards for tapped ones while an engine is attached."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ghost.errors import BatchError, UnsupportedModelError
from ghost.layers import Layer, registered_types, rule_for
from ghost.taps import Tap, TapFunction, TiedHeadFunction, TiedTableFunction

Probes = dict[tuple[str, str], Tensor]
"""Zero tensors `[b]` by layer name and parameter name."""


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
            "rows would leak into "
            "their gradients: register a rule with ghost.register_layer (there are rules for "
            f"{', '.join(registered_types())}), "
            "freeze them, or use val_mode='separate'."
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
        called: Layers that have run in this forward.
    """

    active: bool = False
    rows: int = 0
    train_rows: int = 0
    tokens: int | None = None
    probes: Probes = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    output_scale: Tensor | None = None
    tied: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)


class ForwardSwap:
    """Replaces modules' forwards and puts them back exactly."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Set `module.forward` to `make(its present forward)`."""
        had_own = "forward" in module.__dict__
        original = module.forward
        module.forward = functools.wraps(original)(make(original))

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
        """Swap the forwards."""
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
            return outputs if state.output_scale is None else scale_gradients(outputs, state.output_scale)

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
                "gradient beforehand: "
                "use val_mode='separate'."
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
                f"{table.name!r} ids of "
                f"shape {tuple(ids.shape)}, which should be the first two sizes: use val_mode='separate'."
            )
        return TiedHeadFunction.apply(
            tap.how, state.train_rows, self._run_untapped(head, original, x), x.detach(), ids,
            head.params["weight"], state.probes[head.name, "weight"], *slots,
        )  # fmt: skip


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


_OWN_NODES = ("TapFunction", "TiedTableFunction", "TiedHeadFunction", "CompiledFunction")
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
