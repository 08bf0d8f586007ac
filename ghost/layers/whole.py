"""Modules without a formula: their per-sample gradients are found by running them once more, all samples at
once.

Any module that treats samples independently can be scored exactly this way, at the cost of one more forward
and backward of that module alone. `ghost.generic` does the work; a rule here says what of a module belongs to
it and where its samples are.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ghost.errors import BatchError
from ghost.layers.base import Rule, leading_ones, register_layer

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module's forward."""


@contextmanager
def substituted(module: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with `params` in place of its parameters, by their names in the module."""
    places = [(module.get_submodule(path)._parameters, key) for path, _, key in map(_split, params)]
    kept = [owner[key] for owner, key in places]
    try:
        for (owner, key), value in zip(places, params.values(), strict=True):
            owner[key] = value  # type: ignore[assignment]  # any tensor is read as an attribute all the same
        yield
    finally:
        for (owner, key), parameter in zip(places, kept, strict=True):
            owner[key] = parameter


def _split(name: str) -> tuple[str, str, str]:
    return name.rpartition(".")


class WholeRule(Rule):
    """Handles a module as it is: parameters of its own, and those of its parameter lists and dicts."""

    def as_matrix(self, shape: torch.Size) -> tuple[int, int]:
        """Leading ones, which stand for the batch, are left out."""
        return super().as_matrix(shape[min(leading_ones(shape), max(0, len(shape) - 1)) :])

    def owned(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are scored here, by their names in the module; other modules keep theirs."""
        params = dict(module.named_parameters(recurse=False))
        for name, child in module.named_children():
            if isinstance(child, nn.ParameterList | nn.ParameterDict):
                params |= {f"{name}.{key}": p for key, p in child.named_parameters(recurse=False)}
        return params

    def rows_first(self, module: nn.Module, call: Call) -> Call:
        """The call with samples along the first axis of every tensor that has them."""
        del module
        return call

    def as_called(self, module: nn.Module, call: Call) -> Call:
        """The inverse of `rows_first`, for one sample."""
        del module
        return call

    def outputs_rows_first(self, module: nn.Module, outputs: Any) -> Any:
        """The outputs with samples along the first axis of every tensor; its own inverse."""
        del module
        return outputs

    def context(self) -> AbstractContextManager[None]:
        """Around every run of the module."""
        return nullcontext()

    def context_again(self) -> AbstractContextManager[None]:
        """Around its second run, in the backward, whose derivatives are taken sample by sample."""
        return self.context()


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Inference kernels of attention have no derivative, and take over where no input asks for one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@register_layer(nn.MultiheadAttention)
class MultiheadAttentionRule(WholeRule):
    """`nn.MultiheadAttention` with its output projection, whose weights it uses without calling it."""

    _NAMES = (
        *("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"),
        *("average_attn_weights", "is_causal"),
    )

    def owned(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return dict(module.named_parameters())

    def rows_first(self, module: nn.Module, call: Call) -> Call:
        args, kwargs = call
        named = dict(zip(self._NAMES, args, strict=False)) | kwargs
        if not _batch_first(module):
            named |= {key: named[key].transpose(0, 1) for key in self._NAMES[:3]}
        mask = named.get("attn_mask")
        if isinstance(mask, Tensor) and mask.dim() == 3:  # [b * heads, T, S], one for each sample and head
            named["attn_mask"] = mask.unflatten(0, (-1, _heads(module)))
        return (), named

    def as_called(self, module: nn.Module, call: Call) -> Call:
        named = dict(call[1])
        if not _batch_first(module):
            named |= {key: named[key].transpose(0, 1) for key in self._NAMES[:3]}
        mask = named.get("attn_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:
            named["attn_mask"] = mask.flatten(0, 1)
        return (), named

    def outputs_rows_first(self, module: nn.Module, outputs: Any) -> Any:
        output, weights = outputs
        return (output if _batch_first(module) else output.transpose(0, 1)), weights

    def context(self) -> AbstractContextManager[None]:
        return _without_fast_path()


def _batch_first(module: nn.Module) -> bool:
    assert isinstance(module, nn.MultiheadAttention)
    return module.batch_first


def _heads(module: nn.Module) -> int:
    assert isinstance(module, nn.MultiheadAttention)
    return module.num_heads


@register_layer(
    "transformers.models.t5.modeling_t5.T5Attention",
    "transformers.models.mt5.modeling_mt5.MT5Attention",
    "transformers.models.umt5.modeling_umt5.UMT5Attention",
)
class RelativeBiasRule(WholeRule):
    """T5's attention with its table of relative positions, which is looked up by [T, T] distances that no
    sample owns. The projections are linear layers of their own.
    """

    inputs_first = True

    def owned(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {k: p for k, p in module.named_parameters() if k.startswith("relative_attention_bias.")}

    def rows_first(self, module: nn.Module, call: Call) -> Call:
        # A training pass starts with an empty cache; filling it once more would change the pass.
        args, kwargs = call
        return args, {k: None if k == "past_key_values" else v for k, v in kwargs.items()}


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """oneDNN's LSTM of float32 and bfloat16 on CPUs keeps for its derivative what autograd asks for, and not
    what `torch.func` does.
    """
    before = torch.backends.mkldnn.enabled
    # A property, for type checkers its descriptor; `flags()` would set, and warn of, more than this.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@register_layer(nn.RNN, nn.LSTM, nn.GRU)
class RecurrentRule(WholeRule):
    """Recurrent layers, whose hidden states are `[layers, b, h]` in and out, with samples second."""

    def context_again(self) -> AbstractContextManager[None]:
        return _without_mkldnn()

    def rows_first(self, module: nn.Module, call: Call) -> Call:
        args, kwargs = call
        named = {"input": None, "hx": None} | dict(zip(("input", "hx"), args, strict=False)) | kwargs
        return (self._sequence(module, named["input"]), _swapped(named["hx"])), {}

    def as_called(self, module: nn.Module, call: Call) -> Call:
        return self.rows_first(module, call)

    def outputs_rows_first(self, module: nn.Module, outputs: Any) -> Any:
        output, state = outputs
        return self._sequence(module, output), _swapped(state)

    @staticmethod
    def _sequence(module: nn.Module, x: Any) -> Tensor:
        assert isinstance(module, nn.RNNBase)
        if not isinstance(x, Tensor):
            raise BatchError(f"{type(module).__name__} got a {type(x).__name__}: hand it a padded tensor.")
        return x if module.batch_first else x.transpose(0, 1)


def _swapped(state: Any) -> Any:
    """A hidden state, or an LSTM's pair, with its first two axes exchanged."""
    if isinstance(state, tuple):
        return tuple(part.transpose(0, 1) for part in state)
    return None if state is None else state.transpose(0, 1)
