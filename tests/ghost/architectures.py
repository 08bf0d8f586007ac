"""Tiny models of many architectures, built by Hugging Face's own code from configs, in float64."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CLIPVisionConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from ghost.layers import Layer
from ghost.layers.linear import LinearRule
from tests.ghost.models import VOCABULARY

WIDTH, HEADS, GROUPS = 16, 4, 2

_SHAPE = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 24}
_TEXT = _SHAPE | {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_head": HEADS, "n_layer": 2,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_PICTURE = {"image_size": 8, "patch_size": 4}


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=6, d_ff=24, num_layers=2, num_heads=HEADS,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def _llava() -> nn.Module:
    vision = CLIPVisionConfig(**_SHAPE, **_PICTURE, projection_dim=8)
    text = LlamaConfig(**_TEXT, num_key_value_heads=GROUPS)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def _llama(groups: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: LlamaForCausalLM(LlamaConfig(**_TEXT, num_key_value_heads=groups, **options))


_BUILD: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "gpt2 crossing": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, add_cross_attention=True)),
    "gpt2 classes": lambda: GPT2ForSequenceClassification(GPT2Config(**_GPT2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_TEXT)),
    "llama": _llama(HEADS, attention_bias=True),
    "llama grouped": _llama(GROUPS),
    "llama shared": _llama(1),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_TEXT, num_key_value_heads=GROUPS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_TEXT, num_key_value_heads=GROUPS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_TEXT, num_key_value_heads=GROUPS, head_dim=10)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**_SHAPE, ffn_dim=24, vocab_size=VOCABULARY, word_embed_proj_dim=8)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**_SHAPE, vocab_size=VOCABULARY)),
    "bert classes": lambda: BertForSequenceClassification(BertConfig(**_SHAPE, vocab_size=VOCABULARY)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**_SHAPE, **_PICTURE)),
    "t5": _t5,
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
    "llava": _llava,
}


def build(name: str) -> Any:
    """The architecture's tiny model, in evaluation mode."""
    return _BUILD[name]().double().eval()


def every_layer(model: nn.Module) -> list[Layer]:
    """All modules with parameters of their own, whether or not the library has a rule for them."""
    return [
        Layer(name, module, LinearRule(), params)
        for name, module in model.named_modules()
        if (params := dict(module.named_parameters(recurse=False)))
    ]
