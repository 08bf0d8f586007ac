"""Small models and batches in float64."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 97


def tiny_gpt2(*, tied: bool = True, dropout: float = 0.0, attention: str = "sdpa", **shape: Any) -> Any:
    """Hugging Face's own GPT-2, two layers of width 16, in float64 and in training mode."""
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2} | shape
    config = GPT2Config(
        vocab_size=VOCABULARY, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, use_cache=False, **sizes,
    )  # fmt: skip
    model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
    model.loss_type = "ForCausalLM"
    for name, p in model.named_parameters():  # away from the zeros and ones of a fresh start
        p.data += 0.1 * torch.randn_like(p) if "wte" not in name else 0.0
    return model.double().train()


def tokens(rows: int, length: int) -> Tensor:
    """Random token ids `[rows, length]`."""
    return torch.randint(0, VOCABULARY, (rows, length))


def with_ignored(ids: Tensor, lengths: list[int]) -> Tensor:
    """Labels: the ids with all behind each row's length set to -100."""
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return labels


def mlp(width: int = 5, hidden: int = 7, classes: int = 4, bias: bool = True) -> nn.Sequential:
    """Two linear layers."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=bias), nn.Tanh(), nn.Linear(hidden, classes, bias=bias)
    ).double()


def classes(rows: int, number: int = 4) -> Tensor:
    """Random class labels `[rows]`."""
    return torch.randint(0, number, (rows,))


def table(rows: int, width: int = 5) -> tuple[Tensor, Tensor]:
    """Random inputs `[rows, width]` with class labels."""
    return torch.randn(rows, width, dtype=torch.float64), classes(rows)
