"""What a loss counts, and how it is known."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

from ghost import BatchError, GhostConfigError, LossReduction
from ghost.batch import join_inputs, join_labels
from ghost.loss import count, infer_reduction
from tests.ghost.huggingface import CASES, Case
from tests.ghost.models import mlp, tiny_gpt2
from tests.ghost.reference import Rows, own_loss

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


def test_a_row_whose_class_is_ignored_is_not_counted() -> None:
    for labels in (torch.tensor([1, -100, 2]), torch.tensor([[1], [-100], [2]])):
        assert count(labels, LossReduction.SAMPLE_MEAN) == 2
    assert count(torch.tensor([1.0, -100.0, 2.0]), LossReduction.SAMPLE_MEAN) == 3


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_loss_of_a_joint_batch_is_the_mean_by_counts(case: Case) -> None:
    model, train, val = case.build(), case.batches(3, 9), case.batches(2, 7)
    reduction = infer_reduction(model)
    error = joint_error(model, train, val, reduction)
    assert error < 1e-6  # Hugging Face's shared losses are taken in float32


@pytest.mark.parametrize("reduction", [LossReduction.TOKEN_MEAN, LossReduction.SAMPLE_MEAN])
def test_that_test_can_fail(reduction: LossReduction) -> None:
    case = CASES["llama"]
    assert joint_error(case.build(), case.batches(3, 9), case.batches(2, 7), reduction) > 1e-4


def joint_error(model: nn.Module, train: Rows, val: Rows, reduction: LossReduction) -> float:
    """How far the joint batch's loss is from the mean of both sides' losses weighed by counts, relatively."""
    causal = reduction is LossReduction.CAUSAL_TOKEN_MEAN
    pad_id = getattr(model.config, "pad_token_id", None) or 0
    inputs = join_inputs(train[0], val[0], causal, pad_id)
    sides = [train, val, (inputs, join_labels(train[1], val[1]))]
    losses = [own_loss(model, X, Y).detach().double() for X, Y in sides]
    n_t, n_v = count(train[1], reduction), count(val[1], reduction)
    return float(abs((n_t * losses[0] + n_v * losses[1]) / (n_t + n_v) / losses[2] - 1))


@pytest.mark.parametrize(
    "model",
    [
        hf.BartForCausalLM,  # does not shift
        hf.XLNetLMHeadModel,
        hf.GitForCausalLM,  # shifts by the image, too
        hf.Florence2ForConditionalGeneration,  # an encoder-decoder that calls a causal model's loss
        hf.BertForQuestionAnswering,  # two labels a row
        hf.BertForPreTraining,
    ],
)
def test_classes_that_do_not_count_as_their_name_says_are_asked(model: type[nn.Module]) -> None:
    # The class is what is looked at: without weights.
    bare = model.__new__(model)
    nn.Module.__init__(bare)
    bare.config = SimpleNamespace(is_encoder_decoder=True)
    bare.loss_type = "ForCausalLM"
    with pytest.raises(GhostConfigError, match=f"cannot be inferred for {model.__name__}"):
        infer_reduction(bare)


def test_a_loss_function_of_the_users_own_is_asked_for() -> None:
    model = tiny_gpt2()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(GhostConfigError, match="cannot be inferred for GPT2LMHeadModel"):
        infer_reduction(model)


def test_gpt2() -> None:
    assert infer_reduction(tiny_gpt2()) is LossReduction.CAUSAL_TOKEN_MEAN


def test_a_class_of_that_name_without_a_config_is_not_trusted() -> None:
    with pytest.raises(GhostConfigError, match=r"cannot be inferred for MyForCausalLM"):
        infer_reduction(type("MyForCausalLM", (nn.Module,), {})())


def test_unknown_models_name_the_choices() -> None:
    with pytest.raises(GhostConfigError, match=r"Sequential: set it to .*causal_token_mean.*'separate'"):
        infer_reduction(mlp())


@pytest.mark.parametrize(
    "config",
    [
        SimpleNamespace(output_router_logits=True),
        SimpleNamespace(text_config=SimpleNamespace(output_router_logits=True)),
        SimpleNamespace(z_loss_coefficient=0.1),
    ],
)
def test_auxiliary_terms_are_refused(config: SimpleNamespace) -> None:
    model = type("MixtralForCausalLM", (nn.Module,), {"config": config})()
    with pytest.raises(GhostConfigError, match=r"auxiliary term.*'separate'"):
        infer_reduction(model)
