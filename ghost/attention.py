"""How attention blocks divide their projections among their heads: a register, and the usual blocks.

Head i owns the rows of the query, key and value projections that make its queries, keys and values, the same
entries of their biases, and the columns of the output projection that read its result. With grouped queries
several heads share one set of keys and values: those rows are a `kv_head` of their own, and the head keeps
query rows and output columns.

What no single head owns is in no layout: the output projection's bias, norms of queries and keys (one weight
for all heads), the extra token of `add_bias_kv`, and T5's `relative_attention_bias`, whose column i serves
head i of *every* block of its stack. Where a norm runs over all heads' queries at once (OLMo 2), a head's
rows are its own all the same, though other heads feel them through the norm.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from ghost.distributed import plain_type
from ghost.layers.base import type_name


class Head(NamedTuple):
    """Within its block: `kind` is "head", or "kv_head" for keys and values that several heads share."""

    kind: str
    number: int


@dataclass(frozen=True)
class HeadLayout:
    """How the projections of an attention block divide among its heads.

    A projection is named by its path below the block: a linear layer, or a parameter stored
    `[outputs, inputs]` or `[outputs]`. Its outputs or inputs are cut into as many equal pieces as there are
    owners, in that order.

    Attributes:
        outputs: Owners of the query, key and value projections' outputs.
        inputs: Owners of the output projection's inputs.
    """

    outputs: Mapping[str, Sequence[Head]] = field(default_factory=dict)
    inputs: Mapping[str, Sequence[Head]] = field(default_factory=dict)


Describe = Callable[[Any], HeadLayout]

_DESCRIPTIONS: dict[str, Describe] = {}
"""By qualified type name, so that another library's block is described without importing that library."""


def query_heads(number: int) -> list[Head]:
    """The heads of a block, in order."""
    return [Head("head", i) for i in range(number)]


def kv_heads(number: int, queries: int) -> list[Head]:
    """The owners of key and value rows: the heads themselves where there are as many of them."""
    return query_heads(number) if number == queries else [Head("kv_head", i) for i in range(number)]


def register_attention(*module_types: type[nn.Module] | str) -> Callable[[Describe], Describe]:
    """Function decorator: it describes blocks whose type is exactly one of `module_types` (types or qualified
    names)::

        @register_attention(MyAttention)  # self.qkv: queries, keys and values, each head after head
        def my_attention(attention: MyAttention) -> HeadLayout:
            heads = query_heads(attention.n_head)
            return HeadLayout(outputs={"qkv": heads * 3}, inputs={"proj": heads})
    """

    def register(describe: Describe) -> Describe:
        for module_type in module_types:
            _DESCRIPTIONS[type_name(module_type)] = describe
        return describe

    return register


def head_layout(module: nn.Module) -> HeadLayout | None:
    """The layout of an attention block whose type is registered or whose projections go by usual names; None
    for every other module.
    """
    describe = _DESCRIPTIONS.get(type_name(plain_type(module)))
    if describe is not None:
        return describe(module)
    for names in _SEPARATE:
        if (layout := _separate(module, *names)) is not None:
            return layout
    return _nano_gpt(module)


def is_conv1d(module: Any) -> bool:
    """Whether a module is Hugging Face's Conv1D: a linear layer whose weight is `[inputs, outputs]`."""
    return type_name(plain_type(module)) == "transformers.pytorch_utils.Conv1D"


@register_attention("transformers.models.gpt2.modeling_gpt2.GPT2Attention")
def _gpt2(attention: Any) -> HeadLayout:
    heads = query_heads(attention.num_heads)
    if attention.is_cross_attention:
        return HeadLayout({"q_attn": heads, "c_attn": heads * 2}, {"c_proj": heads})
    return HeadLayout({"c_attn": heads * 3}, {"c_proj": heads})


@register_attention("transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXAttention")
def _gpt_neox(attention: Any) -> HeadLayout:
    """A head's query, key and value rows lie together."""
    heads = query_heads(attention.config.num_attention_heads)
    return HeadLayout({"query_key_value": heads}, {"dense": heads})


@register_attention(nn.MultiheadAttention)
def _multihead(attention: nn.MultiheadAttention) -> HeadLayout:
    heads = query_heads(attention.num_heads)
    outputs = {
        "in_proj_weight": heads * 3, "in_proj_bias": heads * 3,
        "q_proj_weight": heads, "k_proj_weight": heads, "v_proj_weight": heads,
    }  # fmt: skip
    there = {name: owners for name, owners in outputs.items() if getattr(attention, name) is not None}
    return HeadLayout(there, {"out_proj": heads})


_SEPARATE = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, ViT
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, CLIP
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT
    ("q", "k", "v", "o"),  # T5
)
"""Usual names of the query, key, value and output projections below a block."""

_WIDTHS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""Usual names for the width of a query head and for the number of heads, beside the query projection or in
the `config` that is there; the first found counts.
"""


def _separate(block: nn.Module, query: str, key: str, value: str, out: str) -> HeadLayout | None:
    """The layout of a block with one projection each for queries, keys and values, head after head."""
    projections = [_linear(block, path) for path in (query, key, value, out)]
    if None in projections or not _accounts_for(block, projections):
        return None
    (_, q), (_, k), (_, v), (o, _) = (_sizes(projection) for projection in projections)
    width = _head_width(_at(block, query.rpartition(".")[0]), q)
    if width is None or q % width or k % width:
        return None
    heads, groups = q // width, k // width
    # The output projection reads as many results as there are heads, each as wide as a value.
    if heads % groups or o * groups != v * heads:
        return None
    queries, shared = query_heads(heads), kv_heads(groups, heads)
    return HeadLayout({query: queries, key: shared, value: shared}, {out: queries})


def _nano_gpt(block: nn.Module) -> HeadLayout | None:
    """The layout of nanoGPT's block: queries, keys and values, each head after head, in one projection.

    Others use its names for another order (GPTBigCode's rows go head by head); `n_head` on the block itself
    sets it apart.
    """
    projections = [_linear(block, path) for path in ("c_attn", "c_proj")]
    number = getattr(block, "n_head", None)
    if None in projections or not isinstance(number, int) or not _accounts_for(block, projections):
        return None
    (_, fused), (inner, _) = (_sizes(projection) for projection in projections)
    if fused != 3 * inner or inner % number:
        return None
    heads = query_heads(number)
    return HeadLayout({"c_attn": heads * 3}, {"c_proj": heads})


def _at(module: Any, path: str) -> Any:
    """What is at a path of attributes, the module itself for an empty one; None where there is nothing."""
    try:
        return attrgetter(path)(module) if path else module
    except AttributeError:
        return None


def _linear(module: nn.Module, path: str) -> Any:
    """The linear layer at a path, or None."""
    found = _at(module, path)
    return found if isinstance(found, nn.Linear) or is_conv1d(found) else None


def _sizes(linear: Any) -> tuple[int, int]:
    """Numbers of inputs and of outputs."""
    return (linear.nx, linear.nf) if is_conv1d(linear) else (linear.in_features, linear.out_features)


def _head_width(holder: Any, query_outputs: int) -> int | None:
    """The width of a query head, as the module that holds the query projection or its config tells it."""
    for source in (holder, getattr(holder, "config", None)):
        for name in _WIDTHS:
            if isinstance(width := getattr(source, name, None), int):
                return width
        for name in _COUNTS:
            if isinstance(number := getattr(source, name, None), int):
                return query_outputs // number
    return None


def _accounts_for(block: nn.Module, projections: Sequence[nn.Module]) -> bool:
    """Whether a block has no parameters besides the projections', norms' and embeddings'.

    One that has (a gate, a mixture of heads) may use the usual names in an unusual way: nothing is guessed.
    """
    return all(
        module in projections or "Norm" in type(module).__name__ or isinstance(module, nn.Embedding)
        for module in block.modules()
        if any(True for _ in module.parameters(recurse=False))
    )
