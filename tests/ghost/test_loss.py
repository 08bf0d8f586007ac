"""What a loss counts, and how it is known."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ghost import BatchError, GhostConfigError, LossReduction
from ghost.loss import count, infer_reduction
from tests.ghost.models import mlp, tiny_gpt2

LABELS = torch.tensor([[5, -100, 3], [-100, 2, -100], [1, -100, -100]])


@pytest.mark.parametrize(
    ("reduction", "number"),
    [
        (LossReduction.CAUSAL_TOKEN_MEAN, 2), (LossReduction.TOKEN_MEAN, 4),
        (LossReduction.SAMPLE_MEAN, 3), (LossReduction.SUM, 1),
    ],
)  # fmt: skip
def test_count(reduction: LossReduction, number: int) -> None:
    found = count(LABELS, reduction)
    assert found.shape == ()
    assert found.dtype == torch.int64
    assert found == number


def test_labels_without_positions_cannot_be_shifted() -> None:
    with pytest.raises(BatchError, match=r"shape \(3,\) have no positions to shift"):
        count(torch.zeros(3), LossReduction.CAUSAL_TOKEN_MEAN)


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("GPT2LMHeadModel", LossReduction.CAUSAL_TOKEN_MEAN),
        ("LlamaForCausalLM", LossReduction.CAUSAL_TOKEN_MEAN),
        ("BertForMaskedLM", LossReduction.TOKEN_MEAN),
        ("T5ForConditionalGeneration", LossReduction.TOKEN_MEAN),
        ("ViTForImageClassification", LossReduction.SAMPLE_MEAN),
    ],
)
def test_reductions_of_hugging_face_classes(name: str, reduction: LossReduction) -> None:
    config = SimpleNamespace(is_encoder_decoder=name.startswith("T5"))
    model = type(name, (nn.Module,), {"config": config})()
    assert infer_reduction(model) is reduction


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "XLNetLMHeadModel", "XLMWithLMHeadModel"])
def test_classes_that_do_not_count_as_their_name_says_are_asked(name: str) -> None:
    model = type(name, (nn.Module,), {"config": SimpleNamespace()})()
    with pytest.raises(GhostConfigError, match=f"cannot be inferred for {name}"):
        infer_reduction(model)


def test_gpt2() -> None:
    assert infer_reduction(tiny_gpt2()) is LossReduction.CAUSAL_TOKEN_MEAN


def test_a_class_of_that_name_without_a_config_is_not_trusted() -> None:
    with pytest.raises(GhostConfigError, match=r"cannot be inferred for MyForCausalLM"):
        infer_reduction(type("MyForCausalLM", (nn.Module,), {})())


def test_unknown_models_name_the_choices() -> None:
    with pytest.raises(GhostConfigError, match=r"Sequential: set it to .*causal_token_mean.*'separate'"):
        infer_reduction(mlp())


def test_auxiliary_terms_are_refused() -> None:
    config = type("Config", (), {"output_router_logits": True})
    model = type("MixtralForCausalLM", (nn.Module,), {"config": config})()
    with pytest.raises(GhostConfigError, match=r"auxiliary term.*'separate'"):
        infer_reduction(model)
