"""What a run minimises agrees with the models' own losses, and its sums by row with the mean."""

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ghost import LossReduction
from runners.losses import Task, build_task, class_loss, language_loss

CPU = torch.device("cpu")


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=23, bos_token_id=None, eos_token_id=None,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def padded_rows() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Three rows of 7, 4 and 2 tokens."""
    torch.manual_seed(1)
    ids = torch.randint(0, 23, (3, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [4], [2]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, torch.where(mask.bool(), ids, -100)


def task(**changes: object) -> Task:
    cfg = {"model": {"kind": "hf", "architecture": "gpt2"}, "dtype": {"model": "float32", "autocast": None}}
    return build_task(OmegaConf.merge(OmegaConf.create(cfg), changes), CPU)


def test_language_loss_is_the_models_own(gpt2: GPT2LMHeadModel) -> None:
    X, Y = padded_rows()
    loss = language_loss(gpt2, X, Y)
    torch.testing.assert_close(loss.mean, gpt2(**X, labels=Y).loss, rtol=1e-6, atol=0)
    assert loss.row_counts.tolist() == [6, 3, 1]
    torch.testing.assert_close(loss.row_sums.sum() / 10, loss.mean.detach())


def test_a_row_alone_has_the_sum_that_it_has_in_a_batch(gpt2: GPT2LMHeadModel) -> None:
    gpt2.double()
    X, Y = padded_rows()
    together = language_loss(gpt2, X, Y)
    assert together.mean.dtype == torch.float64
    for i, length in enumerate((7, 4, 2)):
        alone = language_loss(gpt2, X["input_ids"][i : i + 1, :length], Y[i : i + 1, :length])
        torch.testing.assert_close(alone.row_sums[0], together.row_sums[i], rtol=1e-12, atol=0)


def test_class_loss() -> None:
    torch.manual_seed(0)
    model, X, Y = nn.Linear(5, 3), torch.randn(4, 5), torch.tensor([0, 2, 1, 1])
    loss = class_loss(model, X, Y)
    torch.testing.assert_close(loss.mean, F.cross_entropy(model(X), Y))
    torch.testing.assert_close(loss.row_sums, F.cross_entropy(model(X), Y, reduction="none").detach())
    assert loss.row_counts.tolist() == [1, 1, 1, 1]


def test_half_precision_logits_are_summed_in_single() -> None:
    model, X, Y = nn.Linear(5, 3).bfloat16(), torch.randn(4, 5).bfloat16(), torch.tensor([0, 2, 1, 1])
    assert class_loss(model, X, Y).mean.dtype == torch.float32


def test_reductions_follow_the_model() -> None:
    assert task().reduction is LossReduction.CAUSAL_TOKEN_MEAN
    assert task(model={"kind": "mlp"}).reduction is LossReduction.SAMPLE_MEAN


def test_autocast_changes_the_forward_alone() -> None:
    seen: list[torch.dtype] = []
    model = nn.Linear(5, 3)
    model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    mixed = task(model={"kind": "mlp"}, dtype={"autocast": "bfloat16"})
    loss = mixed.mean(model, torch.randn(4, 5), torch.tensor([0, 2, 1, 1]))
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_tables_get_the_weights_dtype_and_token_ids_stay_integers(dtype: str) -> None:
    placed = task(dtype={"model": dtype}).place
    X, Y = placed(torch.rand(2, 5), torch.tensor([1, 2]))
    assert (X.dtype, Y.dtype) == (getattr(torch, dtype), torch.int64)
    ids = torch.tensor([[50_001, 50_002]])
    X, Y = placed({"input_ids": ids}, ids)
    assert torch.equal(X["input_ids"], ids)
    assert X["input_ids"].dtype == torch.int64
