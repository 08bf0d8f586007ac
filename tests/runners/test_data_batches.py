"""Hugging Face's models take the batches of every task, and padding and missing images change nothing: the
loss of a batch is the mean over the labels of its rows taken one at a time, without padding.
"""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from ghost.batch import Items
from runners.data import build_data
from runners.data.loader import val_batch
from tests.runners.conftest import data_config

INTERPRETER = {
    "kind": "interpreter", "seq_len": 16, "train_samples": 6, "val_samples": 6, "tokenizer": "gpt2",
    "domains": ["code", "docs", "legal"], "shuffled_domain": None,
}  # fmt: skip
QUESTIONS = {
    "kind": "digit_questions", "train_samples": 6, "val_samples": 6, "seq_len": 64, "tokenizer": "gpt2",
    "image_size": 32, "patch_size": 8, "image_token_id": 50_257,
}  # fmt: skip
VOCABULARY = 50_258


def bundle(**cfg):
    return build_data(data_config(0, **cfg))


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=3, max_position_embeddings=32,
        )
    )  # fmt: skip


def llava():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=8,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=50_257)
    )


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (t5, {**INTERPRETER, "task": "seq2seq"}),
        (bert, {**INTERPRETER, "task": "text_classes"}),
        (llava, QUESTIONS),
    ],
    ids=["t5", "bert", "llava"],
)
@torch.no_grad()
def test_a_batch_is_its_rows(build, data):
    torch.manual_seed(0)
    model = build().double().eval()
    samples = bundle(**data).val
    batch = val_batch(samples)
    together = model(**_plain(batch.inputs), labels=batch.labels).loss
    losses, counts = [], []
    for index in batch.index.tolist():
        inputs, labels, _ = samples[index - samples.offset]
        row = {key: value if key == "pixel_values" else value[None] for key, value in inputs.items()}
        row = {key: value for key, value in row.items() if len(value)}
        losses.append(model(**_plain(row), labels=labels[None]).loss)
        counts.append(int((labels != -100).sum()))
    losses, counts = torch.stack(losses).double(), torch.tensor(counts)
    # Hugging Face takes these losses in single precision.
    torch.testing.assert_close(together.double(), (losses * counts).sum() / counts.sum(), rtol=1e-6, atol=0)
    assert len(set(losses.tolist())) > 1


def test_digits_of_any_size_go_through_a_vision_transformer():
    digits = bundle(kind="digits", val_samples=8, as_image=True, image_size=32, channels=3, label_noise=0.0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
            patch_size=8, num_labels=digits.num_classes,
        )
    )  # fmt: skip
    batch = val_batch(digits.val)
    loss = model(pixel_values=batch.inputs, labels=batch.labels).loss
    loss.backward()
    assert torch.isfinite(loss)


def _plain(inputs):
    """Inputs as the model takes them, floats in its own precision."""
    values = {key: value.values if isinstance(value, Items) else value for key, value in inputs.items()}
    return {key: value.double() if value.is_floating_point() else value for key, value in values.items()}
