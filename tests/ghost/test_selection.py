"""What is scored: patterns, families, blocks and heads, and errors that name what is there."""

import fnmatch
from typing import Any

import pytest
from torch import nn

from ghost import GhostConfigError, Selection
from ghost.discovery import find_layers
from ghost.heads import attention_heads
from ghost.selection import FAMILIES, block_number, family
from tests.ghost.architectures import build, every_layer
from tests.ghost.models import mlp, tiny_gpt2

EXPECTED_FAMILIES: dict[str, dict[str, list[str]]] = {
    "gpt2": {
        "embed": ["transformer.wte", "transformer.wpe"],
        "norm": ["*.ln_?"],
        "attn": ["transformer.h.?.attn.*"],
        "mlp": ["transformer.h.?.mlp.*"],
        "head": ["lm_head"],
    },
    "gpt2 crossing": {
        "embed": ["transformer.wte", "transformer.wpe"],
        "norm": ["*.ln_?", "*.ln_cross_attn"],
        "attn": ["*.c_attn", "*.q_attn", "*attn.c_proj", "*.crossattention.c_proj"],
        "mlp": ["transformer.h.?.mlp.*"],
        "head": ["lm_head"],
    },
    "gpt2 classes": {
        "embed": ["transformer.wte", "transformer.wpe"],
        "norm": ["*.ln_?"],
        "attn": ["transformer.h.?.attn.*"],
        "mlp": ["transformer.h.?.mlp.*"],
        "head": ["score"],
    },
    "gpt_neox": {
        "embed": ["gpt_neox.embed_in"],
        "norm": ["*norm"],
        "attn": ["gpt_neox.layers.?.attention.*"],
        "mlp": ["gpt_neox.layers.?.mlp.*"],
        "head": ["lm_head"],
    },
    "qwen3": {
        "embed": ["model.embed_tokens"],
        "norm": ["*norm"],
        "attn": ["model.layers.?.self_attn.?_proj"],
        "mlp": ["model.layers.?.mlp.*"],
        "head": ["lm_head"],
    },
    "opt": {
        "embed": ["model.decoder.embed_*", "model.decoder.project_*"],
        "norm": ["*norm"],
        "attn": ["model.decoder.layers.?.self_attn.*"],
        "mlp": ["model.decoder.layers.?.fc?"],
        "head": ["lm_head"],
    },
    "bert": {
        "embed": ["bert.embeddings.*_embeddings"],
        "norm": ["*.LayerNorm"],
        "attn": ["bert.encoder.layer.?.attention.self.*", "bert.encoder.layer.?.attention.output.dense"],
        "mlp": ["bert.encoder.layer.?.intermediate.dense", "bert.encoder.layer.?.output.dense"],
        "head": ["cls.predictions", "cls.predictions.transform.dense", "cls.predictions.decoder"],
    },
    "bert classes": {
        "embed": ["bert.embeddings.*_embeddings"],
        "norm": ["*.LayerNorm"],
        "attn": ["bert.encoder.layer.?.attention.self.*", "bert.encoder.layer.?.attention.output.dense"],
        "mlp": ["bert.encoder.layer.?.intermediate.dense", "bert.encoder.layer.?.output.dense"],
        "head": ["bert.pooler.dense", "classifier"],
    },
    "vit": {
        "embed": ["vit.embeddings", "vit.embeddings.patch_embeddings.projection"],
        "norm": ["*layernorm*"],
        "attn": ["vit.layers.?.attention.*"],
        "mlp": ["vit.layers.?.mlp.*"],
        "head": ["classifier"],
    },
    "t5": {
        "embed": ["shared", "*.embed_tokens"],
        "norm": ["*layer_norm"],
        "attn": ["*.SelfAttention.*", "*.EncDecAttention.*"],
        "mlp": ["*.DenseReluDense.*"],
        "head": ["lm_head"],
    },
    "resnet": {"conv": ["*.convolution"], "norm": ["*.normalization"], "head": ["classifier.1"]},
    "llava": {
        "embed": ["*.embeddings", "*.patch_embedding", "*.position_embedding", "*.embed_tokens"],
        "norm": ["*norm", "*norm?"],
        "attn": ["*.self_attn.*"],
        "mlp": ["*.mlp.*", "model.multi_modal_projector.linear_?"],
        "head": ["lm_head"],
    },
}


@pytest.mark.parametrize("name", EXPECTED_FAMILIES)
def test_families(name: str) -> None:
    expected = EXPECTED_FAMILIES[name]
    layers = every_layer(build(name))
    for layer in layers:
        readers = [
            f for f, globs in expected.items() if any(fnmatch.fnmatchcase(layer.name, g) for g in globs)
        ]
        assert readers == [family(layer)], layer.name
    assert {family(layer) for layer in layers} == set(expected) <= set(FAMILIES)


def test_layers_of_no_family() -> None:
    assert {family(layer) for layer in find_layers(mlp())} == {"other"}
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose1d(1, 2, 3), nn.Linear(2, 2))
    assert [family(layer) for layer in every_layer(cnn)] == ["conv", "conv", "other"]


def test_block_numbers() -> None:
    assert block_number("transformer.h.12.attn.c_attn") == 12
    assert block_number("encoder.block.3.layer.0.SelfAttention.q") == 3
    assert block_number("transformer.wte") is None
    assert block_number("layer4.conv1") is None


def selected(model: Any = None, **options: Any) -> list[str]:
    """Names of the layers that are scored, wholly or in parts."""
    model = model or tiny_gpt2()
    selection = Selection(**options)
    layers = find_layers(model)
    heads = attention_heads(model, layers)
    selection.check(layers, heads)
    return [layer.name for layer in layers if selection.matches(layer, heads)]


def scored_parts(model: Any, **options: Any) -> dict[str, list[str] | None]:
    """What is scored of every parameter that is scored at all: labels of parts, or None for all of it."""
    selection = Selection(**options)
    layers = every_layer(model)
    heads = attention_heads(model, layers)
    selection.check(layers, heads)
    found = {}
    for layer in layers:
        own = {layer.qualified(param): selection.parts(layer, param, heads) for param in layer.params}
        assert selection.matches(layer, heads) is any(parts != [] for parts in own.values())
        found |= {
            name: parts if parts is None else [part.label for part in parts]
            for name, parts in own.items()
            if parts != []
        }
    return found


def test_patterns() -> None:
    assert len(selected()) == 2 * 6 + 4
    assert selected(include=["lm_head", "*.wte"]) == ["transformer.wte", "lm_head"]
    assert selected(include=["transformer.h.[1]*"], exclude=["*.ln_*", "*.c_proj"]) == [
        "transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_fc",
    ]  # fmt: skip
    assert selected(include=["transformer.h.0.*"], families=["norm"]) == [
        "transformer.h.0.ln_1", "transformer.h.0.ln_2",
    ]  # fmt: skip
    assert selected(families=["embed", "head"]) == ["transformer.wte", "transformer.wpe", "lm_head"]


def test_a_glob_matches_the_end_of_a_name_after_a_dot() -> None:
    assert selected(include=["h.1.ln_?"]) == ["transformer.h.1.ln_1", "transformer.h.1.ln_2"]
    assert selected(include=["wte"], exclude=["wpe"]) == ["transformer.wte"]
    with pytest.raises(GhostConfigError, match="'te', which matches no layer"):
        selected(include=["te"])
    with pytest.raises(GhostConfigError, match="matches no layer"):
        selected(include=["h.1"])


def test_a_regular_expression_matches_the_whole_name() -> None:
    assert selected(include=[r"re:.*\.h\.[01]\.mlp\.c_(fc|proj)"], exclude=[r"re:.*1\.mlp\.c_fc"]) == [
        "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj",
    ]  # fmt: skip
    with pytest.raises(GhostConfigError, match="'re:wte', which matches no layer"):
        selected(include=["re:wte"])


def test_blocks() -> None:
    model = tiny_gpt2(n_layer=4)
    assert {block_number(name) for name in selected(model, blocks=[0, "2-3"])} == {0, 2, 3}
    assert selected(model, blocks=["1"], families=["norm"], exclude=["ln_2"]) == ["transformer.h.1.ln_1"]


def test_a_head_is_its_rows_and_columns() -> None:
    heads = ["transformer.h.1.attn.head[0]", "transformer.h.1.attn.head[3]"]
    attn = "transformer.h.1.attn"
    expected = {f"{attn}.{param}": heads for param in ("c_attn.weight", "c_attn.bias", "c_proj.weight")}
    for pattern in ("h.1.attn.head[0,3]", "transformer.h.1.attn.head[0, 3]", "*.1.*.head[0,3]"):
        assert scored_parts(build("gpt2"), include=[pattern]) == expected
    assert scored_parts(build("gpt2"), include=["head[0,3]"], blocks=[1]) == expected
    assert scored_parts(build("gpt2"), include=["head[*]"], exclude=["head[1-2]"], blocks=[1]) == expected


def test_all_heads_are_whole_parameters_without_what_no_head_owns() -> None:
    found = scored_parts(build("gpt2"), include=["h.0.attn.head[0-3]"])
    assert found == {
        f"transformer.h.0.attn.{param}": None for param in ("c_attn.weight", "c_attn.bias", "c_proj.weight")
    }


def test_excluded_heads_leave_the_rest_of_their_layers() -> None:
    found = scored_parts(build("gpt2"), exclude=["h.0.attn.head[1-3]", "h.1.mlp.*"])
    partial = {name for name, parts in found.items() if parts is not None}
    assert partial == {
        f"transformer.h.0.attn.{param}" for param in ("c_attn.weight", "c_attn.bias", "c_proj.weight")
    }
    assert {tuple(found[name] or ()) for name in partial} == {("transformer.h.0.attn.head[0]",)}
    assert "transformer.h.0.attn.c_proj.bias" in found
    assert not any(name.startswith("transformer.h.1.mlp") for name in found)


def test_a_layer_that_is_included_is_scored_whole() -> None:
    found = scored_parts(build("gpt2"), include=["h.0.attn.c_attn", "h.0.attn.head[2]"])
    assert found == {
        "transformer.h.0.attn.c_attn.weight": None, "transformer.h.0.attn.c_attn.bias": None,
        "transformer.h.0.attn.c_proj.weight": ["transformer.h.0.attn.head[2]"],
    }  # fmt: skip


def test_an_excluded_layer_takes_its_heads_with_it() -> None:
    found = scored_parts(build("gpt2"), include=["h.0.attn.head[2]"], exclude=["c_attn"])
    assert found == {"transformer.h.0.attn.c_proj.weight": ["transformer.h.0.attn.head[2]"]}


def test_grouped_queries() -> None:
    model = build("llama grouped")
    attn = "model.layers.0.self_attn"
    assert scored_parts(model, include=["layers.0.self_attn.head[3]"]) == {
        f"{attn}.q_proj.weight": [f"{attn}.head[3]"], f"{attn}.o_proj.weight": [f"{attn}.head[3]"],
    }  # fmt: skip
    assert scored_parts(model, include=["kv_head[1]"], blocks=[0]) == {
        f"{attn}.k_proj.weight": [f"{attn}.kv_head[1]"], f"{attn}.v_proj.weight": [f"{attn}.kv_head[1]"],
    }  # fmt: skip


def test_lists_make_a_selection_that_can_be_hashed() -> None:
    selection = Selection(include=["a.*"], blocks=[0, "2-3"])
    assert selection == Selection(include=("a.*",), blocks=(0, "2-3"))
    assert hash(selection) == hash(Selection(include=("a.*",), blocks=(0, "2-3")))
    assert not selection.selects_heads
    assert Selection(exclude=["head[0]"]).selects_heads


def test_head_patterns_need_the_models_heads() -> None:
    layers = find_layers(tiny_gpt2())
    selection = Selection(exclude=["h.0.attn.head[0]"])
    for ask in (lambda: selection.matches(layers[0]), lambda: selection.check(layers)):
        with pytest.raises(
            GhostConfigError, match=r"'h.0.attn.head\[0\]' names attention heads.*should be given"
        ):
            ask()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ["*.nothing"]},
            r"layer selection: include has the pattern '\*.nothing', which matches no layer: the closest of",
        ),
        ({"exclude": ["encoder.*"]}, r"layer selection: exclude has the pattern 'encoder.\*'"),
        ({"include": ["transformer.h.1.atn.*"]}, r"are transformer.h.1.attn.c_"),
        ({"exclude": ["*"]}, r"leaves nothing to score"),
        ({"include": ["lm_head"], "families": ["mlp"]}, r"leaves nothing to score"),
        ({"include": ["lm_head"], "blocks": [0]}, r"leaves nothing to score"),
        ({"include": ["h.0.attn.head[0]"], "families": ["mlp"]}, r"leaves nothing to score"),
        ({"families": ["attention"]}, r"layer selection: families=\['attention'\] should be among attn, mlp"),
        ({"include": "*.mlp.*"}, r"layer selection: include='\*.mlp.\*' should be a list"),
        ({"families": "mlp"}, r"layer selection: families='mlp' should be a list"),
        ({"blocks": 3}, r"layer selection: blocks=3 should be a list"),
        ({"blocks": [2]}, r"layer selection: blocks has 2, but the model's blocks are numbered 0-1\."),
        (
            {"blocks": ["1-5"]},
            r"layer selection: blocks has '1-5', but the model's blocks are numbered 0-1\.",
        ),
        ({"blocks": [-1]}, r"layer selection: blocks has -1, which should be a number such as 7 or a range"),
        ({"blocks": ["3-1"]}, r"layer selection: blocks has '3-1', which should be"),
        ({"include": ["re:(wte"]}, r"layer selection: 're:\(wte' is not a regular expression: missing \)"),
        ({"include": ["h.0.attn.head[]"]}, r"heads in 'h.0.attn.head\[\]' should be numbers and ranges"),
        ({"include": ["h.0.attn.head[1-0]"]}, r"heads in .* should be numbers and ranges such as 0,5 or 0-3"),
        (
            {"include": ["h.0.attn.head[0,2]"]},
            r"pattern 'h.0.attn.head\[0,2\]', but 'transformer.h.0.attn' has head\[0-1\]\.",
        ),
        (
            {"exclude": ["kv_head[0]"]},
            r"exclude .*'kv_head\[0\]', but 'transformer.h.0.attn' has head\[0-1\]",
        ),
        ({"exclude": ["kv_head[*]"]}, r"'kv_head\[\*\]', but 'transformer.h.0.attn' has head\[0-1\]"),
        (
            {"include": ["h.2.attn.head[0]"]},
            r"which matches no attention block: the closest of 2 are transformer.h.[01].attn, transformer",
        ),
    ],
)
def test_selections_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GhostConfigError, match=message):
        selected(**options)


def test_models_without_blocks_or_heads() -> None:
    flat = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    with pytest.raises(GhostConfigError, match="blocks has 0, but the model's blocks are not numbered"):
        selected(flat, blocks=[0])
    with pytest.raises(GhostConfigError, match=r"no trained attention block .*ghost.register_attention"):
        selected(flat, include=["head[0]"])


def test_several_kinds_of_heads_are_named() -> None:
    with pytest.raises(GhostConfigError, match=r"has head\[0-3\] and kv_head\[0-1\]"):
        scored_parts(build("llama grouped"), include=["layers.1.self_attn.kv_head[2]"])


def test_frozen_layers_are_no_layers() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    assert [layer.name for layer in find_layers(model)] == ["2"]
    model[2].bias.requires_grad_(False)
    assert [list(layer.params) for layer in find_layers(model)] == [["weight"]]
