"""Swap a model's forwards for tapped ones while an engine is attached."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ghost.discovery import Tie
from ghost.errors import BatchError, UnsupportedModelError
from ghost.generic import GenericFunction, ModuleCall
from ghost.graph import refuse_stray_uses, scale_gradients, whole
from ghost.kept import KeepingTap
from ghost.layers import Layer, LayerRule, WholeRule
from ghost.layers.whole import substituted
from ghost.roworder import RowOrder
from ghost.slopes import SlopeTap
from ghost.step import Hand, Probes, StepState, Unit
from ghost.swap import ForwardSwap
from ghost.taps import ConcatTap, Tap, TapFunction, TiedHeadFunction, TiedTableFunction
from ghost.units import Units

Forward = Callable[..., Any]


def _between_graphs(forward: Forward) -> Forward:
    """The forward, run eagerly in compiled models: its backward keeps books, or vectorises derivatives, and
    neither can be traced.
    """

    @torch.compiler.disable
    def eager(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return eager


class Instrument:
    """Taps on a model's layers.

    Args:
        model: The model.
        state: What the swapped forwards read.
        taps: One tap a layer; layers without one are left alone.
        ties: Tied matrices whose cross terms travel along the graph (a joint batch only).
        detach_params: Whether tapped layers run on detached parameters, so that the tap alone defines their
            gradients.
    """

    def __init__(
        self, model: nn.Module, state: StepState, taps: list[Tap], ties: list[Tie], detach_params: bool
    ) -> None:
        self.model, self.state, self.taps, self.detach_params = model, state, taps, detach_params
        self._tables = {tie.table.name: tie for tie in ties}
        self._heads = {tie.head.name: tie for tie in ties}
        self._swap = ForwardSwap()
        self._uses_checked = False
        self._leaves: dict[int, str] = {}  # names by `id` of the parameters that forwards have met
        self._owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        self.units, self.order = Units(model, state), RowOrder(model, state)
        state.hands = {tap.layer.name: Hand() for tap in taps}

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
            self._swap.replace(tap.layer.module, functools.partial(self._tapped_forward, tap))
        self._swap.replace(self.model, self._scaled_forward)

    def detach(self) -> None:
        """Put every forward back."""
        self._swap.restore()

    def new_probes(self, dtype: torch.dtype, device: torch.device) -> Probes:
        """Fresh zero probes `[K, b, C]` for every scored parameter."""
        rows = self.state.rows
        return {
            (tap.layer.name, key): torch.zeros(
                len(parts), rows.train, len(rows.sizes), dtype=dtype, device=device, requires_grad=True
            )
            for tap in self.taps
            for key, parts in tap.scored.items()
        }

    def hand_out(self) -> None:
        """Give every layer what it reads of the step that has begun."""
        for tap in self.taps:
            layer, hand = tap.layer, self.state.hands[tap.layer.name]
            hand.probes = [self.state.probes[layer.name, key] for key in tap.scored]
            hand.given = [given for key in tap.scored for given in self.state.given(layer.qualified(key))]

    def _tapped_forward(self, tap: Tap, original: Forward) -> Forward:
        state, layer = self.state, tap.layer
        hand = state.hands[layer.name]
        run, meets = self._runner(tap, original), isinstance(tap, ConcatTap | SlopeTap)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if state.watch is not None:
                state.watch(layer, args, kwargs)
                return original(*args, **kwargs)
            if not state.active or not torch.is_grad_enabled():
                if state.active and not torch.compiler.is_compiling():
                    state.without_grad.add(layer.name)
                return original(*args, **kwargs)
            if meets:
                self._count(layer, hand)
            return run(*args, **kwargs)

        return forward

    def _runner(self, tap: Tap, original: Forward) -> Forward:
        """The tapped forward of one layer."""
        name, hand = tap.layer.name, self.state.hands[tap.layer.name]
        if isinstance(tap.layer.rule, WholeRule):
            return _between_graphs(functools.partial(self._run_whole, tap, hand, original))
        if name in self._tables:
            run = functools.partial(self._run_table, self._tables[name], tap, original)
        elif name in self._heads:
            run = functools.partial(self._run_head, self._heads[name], tap, original)
        else:
            run = functools.partial(self._run, tap, hand, original)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            inputs = (*args, *kwargs.values())
            if len(inputs) != 1:
                raise UnsupportedModelError(
                    f"layer {name!r} was called with {len(inputs)} inputs: a layer rule handles one."
                )
            (x,) = inputs
            self._check_rank(tap.layer, x)
            return run(x)

        keeps_books = isinstance(tap, KeepingTap) or (isinstance(tap, ConcatTap | SlopeTap) and tap.shared)
        return _between_graphs(forward) if keeps_books else forward

    def _scaled_forward(self, original: Forward) -> Forward:
        state = self.state

        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = original(*args, **kwargs)
            if not state.active or not torch.is_grad_enabled():
                return outputs
            if state.loss_unseen:
                self.check_parameter_uses(outputs)
            if self.order.unchecked:
                self.order.check(original, args, kwargs)
            if state.output_scale is None:
                return outputs
            state.outputs_scaled = True
            return scale_gradients(outputs, state.output_scale)

        return forward

    def check_parameter_uses(self, outputs: Any) -> None:
        """Refuse, once, a loss or a model that reads a tapped layer's parameter without calling the layer.

        Args:
            outputs: The loss, or the model's outputs where only they are seen.
        """
        if torch.compiler.is_compiling() or self._uses_checked or not self.detach_params:
            return
        uses = [(id(p), tap.layer.qualified(key)) for tap in self.taps for key, p in tap.layer.params.items()]
        tapped = Counter(key for key, _ in uses)
        # A layer that is not selected may share its parameter with one that is, and uses it as it always did.
        own = {name: key for key, name in uses if self._owners[key] == tapped[key]}
        found = {key: name for key, name in self._leaves.items() if name in own}
        refuse_stray_uses(outputs, found | {key: name for name, key in own.items()})
        self._uses_checked, self._leaves = True, {}

    def refuse_hidden_layers(self) -> None:
        """After the backward: refuse layers that ran under `no_grad` and not again with gradients."""
        state = self.state
        missing = {name for (name, _), probe in state.probes.items() if probe.grad is None}
        if hidden := sorted(missing & state.without_grad):
            raise UnsupportedModelError(
                f"layer {hidden[0]!r} ran without gradients, as under re-entrant activation checkpointing, "
                "and the backward did not reach it: checkpoint with use_reentrant=False, or leave it out."
            )

    def _count(self, layer: Layer, hand: Hand) -> None:
        """Note a call: the uses of a layer that runs twice meet each other's validation gradient."""
        if torch.compiler.is_compiling():
            if hand.traced:
                raise UnsupportedModelError(_twice(layer.name, "in one compiled forward"))
            hand.traced = True
            return
        state, name = self.state, layer.name
        calls = state.ledger.calls
        if torch._C._current_graph_task_id() != -1:  # activation checkpointing, inside a backward
            if calls[name] == 0:  # of the kind whose forward ran without gradients
                state.ledger.recomputed[name] += 1
            if state.ledger.recomputed[name] > 1:
                raise UnsupportedModelError(
                    f"layer {name!r} runs more than once under re-entrant activation checkpointing, which "
                    "hides its uses from each other: checkpoint with use_reentrant=False."
                )
            return
        if state.ledger.settled[name] > 0:
            raise UnsupportedModelError(
                f"layer {name!r} runs again after a backward of the same micro-batch, whose scores cannot "
                "meet it: add up the losses for one backward, or use val_mode='separate'."
            )
        calls[name] += 1
        if hand.traced:
            state.refused = _twice(name, "in one forward, at least once in compiled code")
            raise UnsupportedModelError(state.refused)
        if calls[name] > 1 and (name in self._tables or name in self._heads):
            raise UnsupportedModelError(
                _twice(name, "in one forward and shares its matrix with another layer")
            )

    def _check_rank(self, layer: Layer, x: Tensor) -> None:
        assert isinstance(layer.rule, LayerRule)
        rank = layer.rule.smallest_rank(layer.module)
        if x.dim() < rank:
            raise BatchError(
                f"layer {layer.name!r} got an input of shape {tuple(x.shape)}, in which samples cannot be "
                f"told apart: it should have at least {rank} axes, the first of them the batch's."
            )

    def _input_rows(self, layer: Layer, x: Tensor, unit: Unit) -> Tensor:
        """The input with one leading entry per entry of the unit, or an error that names the layer."""
        assert isinstance(layer.rule, LayerRule)
        if x.dim() == 1 and x.shape[0] == unit.size == self.state.tokens:
            raise BatchError(
                f"layer {layer.name!r} got a vector of {x.shape[0]} entries, one per row or one per "
                "position: the batch has as many rows as positions, so change its size by one."
            )
        x = layer.rule.rows_first(x, unit.size)
        if x.shape[0] != unit.size:
            raise BatchError(
                f"layer {layer.name!r} got an input of shape {tuple(x.shape)}, whose first size should be "
                f"the batch's {unit.size} rows: samples cannot be told apart in it."
            )
        return x

    def _run_untapped(self, layer: Layer, original: Forward, x: Tensor, unit: Unit) -> Tensor:
        """The layer's output with one leading entry per row; what is broadcast over the batch is repeated."""
        assert isinstance(layer.rule, LayerRule)
        if self.detach_params:
            params = {key: p.detach() for key, p in layer.module._parameters.items() if p is not None}
            output = layer.rule.forward(layer.module, params, x)
        else:
            output = original(x)
            if type(layer.rule).forward is LayerRule.forward:
                output = output.clone()  # whatever the module ends in
        shared = layer.rule.rows_first(x, unit.size).shape[0] != x.shape[0] or x.dim() == 1
        if shared and output.shape[0] != unit.size:
            output = output.expand(unit.size, *output.shape[1 if x.dim() > 1 else 0 :]).clone()
        return output

    def _live(self, layer: Layer) -> dict[str, nn.Parameter]:
        """The layer's parameters as it has them in this forward."""
        found = layer.live()
        if not torch.compiler.is_compiling() and not self._uses_checked:
            self._leaves |= {id(p): layer.qualified(key) for key, p in found.items()}
        return found

    def _tensors(self, tap: Tap, hand: Hand) -> tuple[list[Tensor], list[Tensor]]:
        """What a tap's function takes: parameters and probes, and targets."""
        params = list(self._live(tap.layer).values()) if tap.gives_gradients else []
        return [*params, *hand.probes], hand.given

    def _run(self, tap: Tap, hand: Hand, original: Forward, x: Tensor) -> Tensor:
        layer = tap.layer
        unit = self.units.of(layer, x.shape[0])
        tensors, targets = self._tensors(tap, hand)
        output = self._run_untapped(layer, original, x, unit)
        if not tensors:
            return output
        shape = output.shape
        if self.order.is_flattened(layer, x, unit):
            x = x.unflatten(0, (unit.size, -1))
            shape = torch.Size((*x.shape[:2], *shape[1:]))
        tapped = TapFunction.apply(
            tap, unit, whole(output), self._input_rows(layer, x, unit).detach(), shape, len(targets),
            *tensors, *targets,
        )  # fmt: skip
        return tapped.view(output.shape)

    def _run_table(self, tie: Tie, tap: Tap, original: Forward, x: Tensor) -> Tensor:
        state, table, head = self.state, tie.table, tie.head
        if x.dim() != 2:
            raise BatchError(
                f"layer {table.name!r}, whose table {head.name!r} shares, got ids of shape {tuple(x.shape)}, "
                "which should be [rows, T]: use val_mode='separate'."
            )
        unit = state.rows
        output, *slots = TiedTableFunction.apply(
            tap, unit, self._run_untapped(table, original, x, unit), self._input_rows(table, x, unit),
            table.module.padding_idx, self._live(table)["weight"], state.probes[table.name, "weight"],
            state.probes[head.name, "weight"],
        )  # fmt: skip
        state.tied[table.name] = (x, *slots)
        return output

    def _run_head(self, tie: Tie, tap: Tap, original: Forward, x: Tensor) -> Tensor:
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
            tap, state.rows, self._run_untapped(head, original, x, state.rows), x.detach(), ids,
            self._live(head)["weight"], state.probes[head.name, "weight"], *slots,
        )  # fmt: skip

    def _run_whole(self, tap: Tap, hand: Hand, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """A module without a formula: see `ghost.generic`."""
        layer, rule = tap.layer, tap.layer.rule
        assert isinstance(rule, WholeRule)
        params = {key: p.detach() for key, p in self._live(layer).items()} if self.detach_params else {}
        with substituted(layer.module, params), rule.context():
            returned = rule.outputs_rows_first(layer.module, original(*args, **kwargs))
        tensors, targets = self._tensors(tap, hand)
        if not tensors:
            return rule.outputs_rows_first(layer.module, returned)
        leaves, spec = tree_flatten(rule.rows_first(layer.module, (args, kwargs)))
        unit = self.units.of_call(layer, leaves)
        flat, out_spec = tree_flatten(returned)
        places = [i for i, o in enumerate(flat) if isinstance(o, Tensor) and o.is_floating_point()]
        self._refuse_hidden_outputs(layer, flat)
        outputs = [self._output_rows(layer, flat[i], unit) for i in places]
        call = self._module_call(layer, original, leaves, spec, unit, outputs)
        tapped = GenericFunction.apply(tap, call, len(outputs), len(targets), *outputs, *tensors, *targets)
        for i, output in zip(places, tapped, strict=True):
            flat[i] = output
        return rule.outputs_rows_first(layer.module, tree_unflatten(flat, out_spec))

    def _refuse_hidden_outputs(self, layer: Layer, outputs: list[Any]) -> None:
        """Refuse outputs by which gradients would pass a tap unseen."""
        known = Tensor | int | float | str | None
        strange = [
            o for o in outputs if not isinstance(o, known) or (isinstance(o, Tensor) and o.is_complex())
        ]
        real = any(isinstance(o, Tensor) and o.is_floating_point() for o in outputs)
        if strange or not real:
            what = f"a {type(strange[0]).__name__}" if strange else "no floating-point tensor"
            raise UnsupportedModelError(
                f"layer {layer.name!r} ({type(layer.module).__name__}) has parameters of its own and returns "
                f"{what}: it should return real tensors, or containers of them."
            )

    def _output_rows(self, layer: Layer, output: Tensor, unit: Unit) -> Tensor:
        """A copy of a module's output that may be edited in place, with one entry per entry of the unit."""
        if output.dim() > 0 and (output.shape[0] == unit.size or (output.dim() > 1 and output.shape[0] == 1)):
            return output.expand(unit.size, *output.shape[1:]).clone()
        raise UnsupportedModelError(
            f"layer {layer.name!r} ({type(layer.module).__name__}) has parameters of its own and returns a "
            f"tensor of shape {tuple(output.shape)}, whose first size should be the batch's {unit.size} "
            "rows: register a rule for it or its parent with ghost.register_layer, or freeze its parameters."
        )

    def _module_call(
        self, layer: Layer, original: Forward, leaves: list[Any], spec: TreeSpec, unit: Unit,
        outputs: list[Tensor],
    ) -> ModuleCall:  # fmt: skip
        """What it takes to run the module again, in the backward."""
        kept = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        device = outputs[0].device.type
        return ModuleCall(
            layer, self.state, unit, original, kept, spec,
            owned=tuple(
                i for i, leaf in enumerate(kept)
                if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == unit.size
            ),
            outputs=tuple(output.detach().clone() for output in outputs),
            autocast=(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)),
        )  # fmt: skip


def _twice(name: str, where: str) -> str:
    return f"layer {name!r} runs twice {where}, and its uses must meet: use val_mode='separate'."
