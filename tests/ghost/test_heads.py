"""Which rows and columns belong to which head: seen from outside, in the results that blocks hand to their
output projections.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import GhostConfigError, HeadLayout, register_attention
from ghost.attention import Head, query_heads
from ghost.heads import Part, attention_heads
from tests.ghost.architectures import GROUPS, HEADS, WIDTH, build, every_layer
from tests.ghost.models import tokens


class NanoAttention(nn.Module):
    """Causal self-attention as nanoGPT writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.n_head = HEADS

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.unflatten(2, (HEADS, -1)).transpose(1, 2) for z in self.c_attn(x).split(WIDTH, 2))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class ByHead(nn.Module):
    """A head's query, key and value rows lie together, under names of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner["qkv"](x).unflatten(2, (HEADS, -1)).transpose(1, 2).chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.inner["proj"](y.transpose(1, 2).flatten(2))


@register_attention(ByHead)
def _by_head(attention: ByHead) -> HeadLayout:
    return HeadLayout(outputs={"inner.qkv": query_heads(HEADS)}, inputs={"inner.proj": query_heads(HEADS)})


def vector_inputs(model: nn.Module, *widths: int) -> None:
    model(*(torch.randn(3, 5, width, dtype=torch.float64) for width in widths))


def token_inputs(model: nn.Module) -> None:
    model(input_ids=tokens(3, 5))


def crossing(model: nn.Module) -> None:
    model(input_ids=tokens(3, 5), encoder_hidden_states=torch.randn(3, 4, WIDTH, dtype=torch.float64))


def seq2seq(model: nn.Module) -> None:
    model(input_ids=tokens(3, 5), decoder_input_ids=tokens(3, 4))


def pixels() -> Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


def pictures(model: nn.Module) -> None:
    model(pixel_values=pixels())


def multihead(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)


@dataclass(frozen=True)
class Case:
    """An attention block of a model, and how to run it.

    Attributes:
        model: An architecture's name, or a function that makes the model.
        out: The output projection's path below the block.
        groups: Number of heads for keys and values.
    """

    model: str | Callable[[], nn.Module]
    run: Callable[[nn.Module], None]
    block: str
    out: str
    groups: int = HEADS

    @property
    def name(self) -> str:
        return self.model if isinstance(self.model, str) else self.model.__name__

    def build(self) -> nn.Module:
        return build(self.model) if isinstance(self.model, str) else self.model().double().eval()

    def labels(self) -> set[str]:
        prefix = f"{self.block}." if self.block else ""
        shared = [f"{prefix}kv_head[{i}]" for i in range(self.groups)] if self.groups < HEADS else []
        return {f"{prefix}head[{i}]" for i in range(HEADS)} | set(shared)


def decoder(name: str, groups: int = GROUPS) -> Case:
    return Case(name, token_inputs, "model.layers.1.self_attn", "o_proj", groups)


CASES = [
    Case("gpt2", token_inputs, "transformer.h.1.attn", "c_proj"),
    Case("gpt2 crossing", crossing, "transformer.h.1.crossattention", "c_proj"),
    Case("gpt_neox", token_inputs, "gpt_neox.layers.1.attention", "dense"),
    decoder("llama", HEADS), decoder("llama grouped"), decoder("llama shared", 1),
    decoder("mistral"), decoder("qwen2"), decoder("qwen3"),
    Case("opt", token_inputs, "model.decoder.layers.1.self_attn", "out_proj"),
    Case("bert", token_inputs, "bert.encoder.layer.1.attention", "output.dense"),
    Case("vit", pictures, "vit.layers.1.attention", "o_proj"),
    Case("t5", seq2seq, "encoder.block.1.layer.0.SelfAttention", "o"),
    Case("t5", seq2seq, "decoder.block.0.layer.0.SelfAttention", "o"),
    Case("t5", seq2seq, "decoder.block.1.layer.1.EncDecAttention", "o"),
    Case(
        "llava", lambda model: pictures(model.model.vision_tower),
        "model.vision_tower.encoder.layers.1.self_attn", "out_proj",
    ),
    Case("llava", token_inputs, "model.language_model.layers.0.self_attn", "o_proj", GROUPS),
    Case(multihead, lambda model: vector_inputs(model, *[WIDTH] * 3), "", "out_proj"),
    Case(
        lambda: multihead(kdim=12, vdim=20), lambda model: vector_inputs(model, WIDTH, 12, 20), "", "out_proj"
    ),
    Case(
        lambda: nn.TransformerDecoderLayer(WIDTH, HEADS, 24, batch_first=True),
        lambda model: vector_inputs(model, WIDTH, WIDTH), "multihead_attn", "out_proj",
    ),
    Case(NanoAttention, lambda model: vector_inputs(model, WIDTH), "", "c_proj"),
    Case(ByHead, lambda model: vector_inputs(model, WIDTH), "", "inner.proj"),
]  # fmt: skip


@pytest.fixture(params=CASES, ids=[f"{case.name}-{case.block}" for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def parts_by_parameter(case: Case, model: nn.Module) -> dict[str, list[Part]]:
    """Parts of the case's block by qualified parameter name."""
    layers = {layer.name: layer for layer in every_layer(model)}
    heads = attention_heads(model, list(layers.values()))
    named = {layers[name].qualified(param): parts for (name, param), parts in heads.items()}
    return {name: parts for name, parts in named.items() if parts[0].block == case.block}


def selected(part: Part, tensor: Tensor) -> Tensor:
    """True where the part is, in the tensor's shape."""
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    for piece in part.index:
        mask.narrow(part.axis, piece.start, piece.stop - piece.start).fill_(True)
    return mask


def results(case: Case, model: nn.Module) -> Tensor:
    """What the block's heads hand to the output projection, `[…, HEADS, d]`."""
    torch.manual_seed(1)  # the same inputs every time
    block = model.get_submodule(case.block)
    seen: list[Tensor] = []
    if isinstance(block, nn.MultiheadAttention):  # it reads its output projection's weight without calling it
        saved = {name: value.clone() for name, value in block.out_proj.state_dict().items()}
        nn.init.eye_(block.out_proj.weight)
        nn.init.zeros_(block.out_proj.bias)
        hook = block.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        case.run(model)
        block.out_proj.load_state_dict(saved)
    else:
        out = block.get_submodule(case.out)
        hook = out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        case.run(model)
    hook.remove()
    assert len(seen) == 1
    return seen[0].unflatten(-1, (HEADS, -1))


def out_weight(case: Case) -> str:
    return ".".join(filter(None, (case.block, case.out, "weight")))


def test_heads_and_their_labels(case: Case) -> None:
    parts = parts_by_parameter(case, case.build())
    assert {part.label for own in parts.values() for part in own} == case.labels()
    assert {part.label for part in parts[out_weight(case)]} == {
        label for label in case.labels() if "kv_head" not in label
    }


def test_parts_of_a_parameter_cover_it_once(case: Case) -> None:
    model = case.build()
    for name, parts in parts_by_parameter(case, model).items():
        param = model.get_parameter(name)
        covered = torch.stack([selected(part, param) for part in parts])
        assert covered.sum(0).eq(1).all()
        for part in parts:
            assert all(a.stop < b.start for a, b in zip(part.index, part.index[1:], strict=False))


@torch.no_grad()
def test_a_heads_rows_change_its_results_alone(case: Case) -> None:
    model = case.build()
    before = results(case, model)
    rows = {n: parts for n, parts in parts_by_parameter(case, model).items() if n != out_weight(case)}
    assert rows
    for name, parts in rows.items():
        param = model.get_parameter(name)
        for part in parts:
            saved = param.clone()
            param += torch.randn_like(param) * selected(part, param)
            change = (results(case, model) - before).abs()
            param.copy_(saved)
            changed = {i for i in range(HEADS) if change[..., i, :].max() > 1e-12}
            share = HEADS // case.groups if part.head.kind == "kv_head" else 1
            own = {i for i in range(HEADS) if i // share == part.head.number}
            # A key's bias moves all of a query's scores alike, which softmax does not see.
            assert changed <= own if name.endswith("bias") else changed == own


@torch.no_grad()
def test_a_heads_columns_are_its_contribution(case: Case) -> None:
    model = case.build()
    heads = results(case, model)
    out = model.get_submodule(case.block).get_submodule(case.out)
    parts = parts_by_parameter(case, model)[out_weight(case)]
    for part in parts:
        silent = heads.clone()
        silent[..., part.head.number, :] = 0
        saved = out.weight.clone()
        out.weight.masked_fill_(selected(part, out.weight), 0)
        without = out(heads.flatten(-2))
        out.weight.copy_(saved)
        torch.testing.assert_close(without, out(silent.flatten(-2)), rtol=1e-12, atol=1e-15)
        assert not torch.equal(without, out(heads.flatten(-2)))


def test_what_no_head_owns_has_no_parts() -> None:
    def without_parts(model: nn.Module, block: str) -> set[str]:
        layers = every_layer(model.get_submodule(block))
        heads = attention_heads(model.get_submodule(block), layers)
        return {
            layer.qualified(param)
            for layer in layers
            for param in layer.params
            if (layer.name, param) not in heads
        }

    assert without_parts(build("gpt2"), "transformer.h.0.attn") == {"c_proj.bias"}
    assert without_parts(build("qwen3"), "model.layers.0.self_attn") == {"q_norm.weight", "k_norm.weight"}
    assert without_parts(build("t5"), "encoder.block.0.layer.0.SelfAttention") == {
        "relative_attention_bias.weight"
    }
    assert without_parts(multihead(add_bias_kv=True), "") == {"bias_k", "bias_v", "out_proj.bias"}
    assert without_parts(build("bert"), "bert.encoder.layer.0.attention") == {
        "output.dense.bias", "output.LayerNorm.weight", "output.LayerNorm.bias",
    }  # fmt: skip


def test_axes_are_those_of_the_stored_weight() -> None:
    parts = parts_by_parameter(CASES[0], build("gpt2"))
    width = WIDTH // HEADS
    columns = tuple(slice(start + width, start + 2 * width) for start in (0, WIDTH, 2 * WIDTH))
    assert parts["transformer.h.1.attn.c_attn.weight"][1] == Part(  # [d, 3d]
        "transformer.h.1.attn", Head("head", 1), 1, columns
    )
    assert parts["transformer.h.1.attn.c_proj.weight"][1].axis == 0  # [d, d], inputs first
    by_head = parts_by_parameter(CASES[-1], ByHead())
    assert by_head["inner.qkv.weight"][1].index == (slice(3 * width, 6 * width),)  # q, k and v in one piece
    single = nn.MultiheadAttention(WIDTH, 1)
    assert attention_heads(single, every_layer(single))["", "in_proj_bias"] == [
        Part("", Head("head", 0), 0, (slice(0, 3 * WIDTH),))
    ]


def test_frozen_parameters_have_no_parts() -> None:
    model = NanoAttention()
    trained = [layer for layer in every_layer(model) if layer.name == "c_proj"]
    assert list(attention_heads(model, trained)) == [("c_proj", "weight")]


class Wrapped(nn.Module):
    """An adapter around a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def gated() -> nn.Module:
    model = NanoAttention()
    model.gate = nn.Linear(WIDTH, WIDTH)
    return model


def adapted() -> nn.Module:
    model = build("gpt2")
    for block in model.transformer.h:
        block.attn.c_attn = Wrapped(block.attn.c_attn)
    return model


def with_wrong_width() -> nn.Module:
    model = build("llama grouped")
    for layer in model.model.layers:
        layer.self_attn.head_dim = 3
    return model


def with_gates_in_its_queries() -> nn.Module:
    model = build("llama grouped")
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Linear(WIDTH, 2 * WIDTH)
    return model


def without_a_count() -> nn.Module:
    model = NanoAttention()
    del model.n_head
    return model


@pytest.mark.parametrize(
    "make", [gated, adapted, with_wrong_width, with_gates_in_its_queries, without_a_count]
)
def test_blocks_that_may_be_something_else_are_not_guessed_at(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert attention_heads(model, every_layer(model)) == {}


def test_only_the_registered_type_itself_is_described() -> None:
    class Child(ByHead):
        """May compute something else."""

    assert attention_heads(Child(), every_layer(Child())) == {}


def test_an_outer_blocks_layout_holds() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = NanoAttention()

    register_attention(Outer)(lambda outer: HeadLayout(outputs={"inner.c_attn": query_heads(2)}))
    model = Outer()
    heads = attention_heads(model, every_layer(model))
    assert [part.label for part in heads["inner.c_attn", "weight"]] == ["head[0]", "head[1]"]
    assert [part.label for part in heads["inner.c_proj", "weight"]] == [f"inner.head[{i}]" for i in range(4)]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            HeadLayout({"qkv": query_heads(5)}),
            r"the attention block 'attn' cuts the 48 entries of 'qkv.weight' into 5 pieces: .* be equal",
        ),
        (HeadLayout({"qkv": []}), r"cuts the 48 entries of 'qkv.weight' into 0 pieces"),
        (
            HeadLayout({"qvk": query_heads(4)}),
            r"the attention block 'attn' \(Custom\) names the projection 'qvk', which is not there",
        ),
    ],
)
def test_layouts_that_do_not_fit(layout: HeadLayout, message: str) -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    register_attention(Custom)(lambda attention: layout)
    model = nn.ModuleDict({"attn": Custom()})
    with pytest.raises(GhostConfigError, match=message):
        attention_heads(model, every_layer(model))
