"""How a model's own loss counts: what its mean is taken over, and so how much each side of a joint batch
weighs.
"""

import inspect
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ghost.errors import BatchError, GhostConfigError


class LossReduction(Enum):
    """What the model's loss is a mean of.

    `CAUSAL_TOKEN_MEAN`: labels that are not -100 after the first position (the model shifts labels by one).
    `TOKEN_MEAN`: labels that are not -100. `SAMPLE_MEAN`: rows, but for those whose one integer label is
    -100. `SUM`: nothing, the loss is a sum.
    """

    CAUSAL_TOKEN_MEAN = "causal_token_mean"
    TOKEN_MEAN = "token_mean"
    SAMPLE_MEAN = "sample_mean"
    SUM = "sum"


IGNORED_LABEL = -100

_BY_LOSS_FUNCTION = {
    "ForCausalLMLoss": LossReduction.CAUSAL_TOKEN_MEAN,
    "ForMaskedLMLoss": LossReduction.TOKEN_MEAN,
    "ForTokenClassification": LossReduction.TOKEN_MEAN,
    "ForSequenceClassificationLoss": LossReduction.SAMPLE_MEAN,
}
"""The losses that Hugging Face's models share, as `model.loss_function`, by name."""

_BY_CLASS_ENDING = {
    "ForMaskedLM": LossReduction.TOKEN_MEAN,
    "ForTokenClassification": LossReduction.TOKEN_MEAN,
    "ForSequenceClassification": LossReduction.SAMPLE_MEAN,
    "ForImageClassification": LossReduction.SAMPLE_MEAN,
    "ForMultipleChoice": LossReduction.SAMPLE_MEAN,
}
"""Of models that compute a loss of their own."""

_ENCODER_DECODER_ENDING = "ForConditionalGeneration"
"""Encoder-decoders with a loss of their own shift the decoder's inputs, not the labels."""

_IRREGULAR = (
    "Bros", "Canary", "CohereAsr", "Csm", "Florence2", "Git", "GraniteDocling", "HiggsAudio", "Luke",
    "Moonshine", "Musicgen", "PPFormulaNet", "Pix2Struct", "ProphetNet", "Qwen3OmniMoeTalker", "VibeVoice",
)  # fmt: skip
"""Models whose forward shifts or filters labels first or adds terms, unlike others with such a class name."""

_AUXILIARY = ("output_router_logits", "z_loss_coefficient")
"""Settings under which a loss has terms that are no mean over labels."""


def infer_reduction(model: nn.Module, otherwise: str = "use val_mode='separate'") -> LossReduction:
    """The reduction of a Hugging Face model's loss, known by the loss function that it calls or by its class.

    Args:
        otherwise: What else a user can do, for the errors.

    Raises:
        GhostConfigError: The class is unknown, or its loss has auxiliary terms that are no mean over labels.
    """
    if type(model).__module__.startswith("peft."):  # the adapted model's loss is its base's
        model = model.get_base_model()  # type: ignore[operator]
    name, config = type(model).__name__, getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for setting in _AUXILIARY:
            if getattr(part, setting, False):
                raise GhostConfigError(
                    f"the loss of {name} has an auxiliary term (config.{setting}={getattr(part, setting)}) "
                    f"that joint batches cannot weigh: {otherwise}."
                )
    reduction = None if config is None or name.startswith(_IRREGULAR) else _known(model, name, config)
    if reduction is None:
        choices = ", ".join(r.value for r in LossReduction)
        raise GhostConfigError(
            f"loss_reduction cannot be inferred for {name}: set it to what the model's loss is a mean of "
            f"({choices}), or {otherwise}."
        )
    return reduction


def _known(model: nn.Module, name: str, config: Any) -> LossReduction | None:
    forward = inspect.unwrap(type(model).forward)
    if "loss_function" in forward.__code__.co_names:  # the forward calls self.loss_function
        return _BY_LOSS_FUNCTION.get(getattr(model.loss_function, "__name__", ""))
    if name.endswith(_ENCODER_DECODER_ENDING) and getattr(config, "is_encoder_decoder", False):
        return LossReduction.TOKEN_MEAN
    return next((found for ending, found in _BY_CLASS_ENDING.items() if name.endswith(ending)), None)


def count(labels: Tensor, reduction: LossReduction) -> Tensor:
    """What a loss over `labels` is a mean of, as a 0-dim int64 tensor on the labels' device; 1 for a sum."""
    if reduction is LossReduction.SUM:
        return labels.new_ones((), dtype=torch.int64)
    return row_counts(labels, reduction).sum()


def row_counts(labels: Tensor, reduction: LossReduction) -> Tensor:
    """What the loss of each row on its own is a mean of, `[b]` int64; ones for sums."""
    counted = labels != IGNORED_LABEL
    if reduction is LossReduction.CAUSAL_TOKEN_MEAN:
        if labels.dim() < 2:
            raise BatchError(
                f"labels of shape {tuple(labels.shape)} have no positions to shift: "
                "loss_reduction='causal_token_mean' needs [rows, T]."
            )
        counted = counted[:, 1:]
    one_class = labels.numel() == labels.shape[0] and not labels.is_floating_point()
    if reduction is LossReduction.SUM or (reduction is LossReduction.SAMPLE_MEAN and not one_class):
        return labels.new_ones(labels.shape[0], dtype=torch.int64)
    return counted[..., None].flatten(1).sum(1)
