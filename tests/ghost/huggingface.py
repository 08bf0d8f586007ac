"""Hugging Face's own models of every kind of loss, tiny and in float64, each with batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.ghost.reference import Rows

VOCABULARY, IMAGE_TOKEN, CLASSES = 61, 60, 4


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (rows, length))


def _text(rows: int, length: int) -> dict[str, Any]:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"input_ids": _ids(rows, length), "attention_mask": mask}


def _token_labels(rows: int, length: int) -> Tensor:
    labels = _ids(rows, length)
    labels[torch.rand(rows, length) < 0.4] = -100
    labels[:, 1] = 5
    return labels


def language(rows: int, length: int) -> Rows:
    """Text and labels of every position."""
    return _text(rows, length), _token_labels(rows, length)


def translation(rows: int, length: int) -> Rows:
    """Text and labels of a length of their own."""
    return _text(rows, length), _token_labels(rows, 2 * length - 5)


def token_classes(rows: int, length: int) -> Rows:
    """Text and a class for some positions."""
    labels = _token_labels(rows, length)
    return _text(rows, length), torch.where(labels >= 0, labels % CLASSES, labels)


def text_classes(rows: int, length: int) -> Rows:
    """Text and a class a row, but for one."""
    labels = torch.randint(0, CLASSES, (rows,))
    labels[0] = -100
    return _text(rows, length), labels


def several_classes(rows: int, length: int) -> Rows:
    """Text and any number of classes a row."""
    return _text(rows, length), torch.randint(0, 2, (rows, CLASSES)).double()


def text_targets(rows: int, length: int) -> Rows:
    """Text and a number a row, one of them -100."""
    labels = torch.randn(rows, dtype=torch.float64)
    labels[0] = -100.0
    return _text(rows, length), labels


def choices(rows: int, length: int) -> Rows:
    """Three texts a row and which of them is meant; of one length, since texts in threes are not padded."""
    del length
    return {"input_ids": _ids(3 * rows, 6).view(rows, 3, 6)}, torch.randint(0, 3, (rows,))


def images(rows: int, length: int) -> Rows:
    """Images and a class each."""
    del length
    return {"pixel_values": torch.randn(rows, 3, 8, 8).double()}, torch.randint(0, CLASSES, (rows,))


def illustrated(rows: int, length: int) -> Rows:
    """Text with one image a row, whose four patches come first."""
    X, Y = language(rows, length + 4)
    X["input_ids"][:, :4] = IMAGE_TOKEN
    X["attention_mask"][:] = 1
    return X | {"pixel_values": torch.randn(rows, 3, 8, 8).double()}, Y


Batches = Callable[[int, int], Rows]


@dataclass(frozen=True)
class Case:
    """A model's class, its configuration and the batches that it takes."""

    model: type[nn.Module]
    config: Any
    batches: Batches

    def build(self) -> nn.Module:
        """The model, randomly initialised."""
        return self.model(self.config()).double().train()


_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "use_cache": False,
}  # fmt: skip
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


def _gpt2(**options: Any) -> hf.GPT2Config:
    return hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, pad_token_id=0, bos_token_id=None, eos_token_id=None, use_cache=False, **options,
    )  # fmt: skip


def _opt() -> hf.OPTConfig:
    return hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=8, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=8, dropout=0.0, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, use_cache=False,
    )  # fmt: skip


def _t5() -> hf.T5Config:
    return hf.T5Config(
        vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip


def _bart() -> hf.BartConfig:
    return hf.BartConfig(
        vocab_size=VOCABULARY, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
        dropout=0.0, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=None, use_cache=False,
    )  # fmt: skip


def _llava() -> hf.LlavaConfig:
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_DECODER), vision_config=hf.CLIPVisionConfig(**_VISION),
        image_token_id=IMAGE_TOKEN, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip


CASES = {
    "gpt2": Case(hf.GPT2LMHeadModel, _gpt2, language),
    "llama": Case(hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_DECODER), language),
    "opt": Case(hf.OPTForCausalLM, _opt, language),
    "gpt-neox": Case(hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**_DECODER), language),
    "qwen2": Case(hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**_DECODER), language),
    "t5": Case(hf.T5ForConditionalGeneration, _t5, translation),
    "bart": Case(hf.BartForConditionalGeneration, _bart, translation),
    "bert-masked": Case(hf.BertForMaskedLM, lambda: hf.BertConfig(**_BERT), language),
    "bert-tokens": Case(
        hf.BertForTokenClassification, lambda: hf.BertConfig(**_BERT, num_labels=CLASSES), token_classes
    ),
    "bert-classes": Case(
        hf.BertForSequenceClassification, lambda: hf.BertConfig(**_BERT, num_labels=CLASSES), text_classes
    ),
    "bert-several": Case(
        hf.BertForSequenceClassification, lambda: hf.BertConfig(**_BERT, num_labels=CLASSES), several_classes
    ),
    "bert-targets": Case(
        hf.BertForSequenceClassification, lambda: hf.BertConfig(**_BERT, num_labels=1), text_targets
    ),
    "gpt2-classes": Case(hf.GPT2ForSequenceClassification, lambda: _gpt2(num_labels=CLASSES), text_classes),
    "bert-choices": Case(hf.BertForMultipleChoice, lambda: hf.BertConfig(**_BERT), choices),
    "vit": Case(
        hf.ViTForImageClassification, lambda: hf.ViTConfig(**_VISION, num_labels=CLASSES), images
    ),
    "llava": Case(hf.LlavaForConditionalGeneration, _llava, illustrated),
}  # fmt: skip
