"""Which layers are scored: patterns, families, and errors that name what is there."""

from typing import Any

import pytest
from torch import nn

from ghost import GhostConfigError, Selection
from ghost.discovery import find_layers
from ghost.selection import FAMILIES, family
from tests.ghost.models import mlp, tiny_gpt2

GPT2_FAMILIES = {
    "transformer.wte": "embed", "transformer.wpe": "embed",
    "transformer.h.0.ln_1": "norm", "transformer.h.0.attn.c_attn": "attn",
    "transformer.h.0.attn.c_proj": "attn", "transformer.h.0.ln_2": "norm",
    "transformer.h.0.mlp.c_fc": "mlp", "transformer.h.0.mlp.c_proj": "mlp",
    "transformer.ln_f": "norm", "lm_head": "head",
}  # fmt: skip


def test_families_of_gpt2() -> None:
    layers = find_layers(tiny_gpt2(n_layer=1))
    assert {layer.name: family(layer) for layer in layers} == GPT2_FAMILIES


def test_layers_of_no_family_are_other() -> None:
    assert {family(layer) for layer in find_layers(mlp())} == {"other"}
    assert set(GPT2_FAMILIES.values()) < set(FAMILIES)


def test_attention_norms_are_norms() -> None:
    model = nn.ModuleDict({"attn": nn.LayerNorm(3)})
    assert [family(layer) for layer in find_layers(model)] == ["norm"]


def selected(**options: Any) -> list[str]:
    selection = Selection(**options)
    layers = find_layers(tiny_gpt2())
    selection.check(layers)
    return [layer.name for layer in layers if selection.matches(layer)]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ["*.nothing"]},
            r"include has the pattern '\*.nothing'.*transformer.wte.*…",
        ),
        (
            {"exclude": ["encoder.*"]},
            r"layer selection: exclude has the pattern 'encoder.\*'",
        ),
        ({"exclude": ["*"]}, r"leaves nothing to score"),
        ({"include": ["lm_head"], "families": ["mlp"]}, r"leaves nothing to score"),
        ({"families": ["attention"]}, r"layer selection: families=\['attention'\] should be among attn, mlp"),
        ({"include": "*.mlp.*"}, r"layer selection: include='\*.mlp.\*' should be a list"),
        ({"families": "mlp"}, r"layer selection: families='mlp' should be a list"),
    ],
)
def test_selections_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GhostConfigError, match=message):
        selected(**options)


def test_frozen_layers_are_no_layers() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    assert [layer.name for layer in find_layers(model)] == ["2"]
    model[2].bias.requires_grad_(False)
    assert [list(layer.params) for layer in find_layers(model)] == [["weight"]]
