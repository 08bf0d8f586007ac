"""How a model's own loss counts: what its mean is taken over, and so how much each side of a joint batch
weighs.
"""

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ghost.errors import BatchError, GhostConfigError


class LossReduction(Enum):
    """What the model's loss is a mean of.

    `CAUSAL_TOKEN_MEAN`: labels that are not -100 after the first position (the model shifts labels by one).
    `TOKEN_MEAN`: labels that are not -100. `SAMPLE_MEAN`: rows. `SUM`: nothing, the loss is a sum.
    """

    CAUSAL_TOKEN_MEAN = "causal_token_mean"
    TOKEN_MEAN = "token_mean"
    SAMPLE_MEAN = "sample_mean"
    SUM = "sum"


IGNORED_LABEL = -100

_BY_CLASS_ENDING = {
    "ForCausalLM": LossReduction.CAUSAL_TOKEN_MEAN,
    "LMHeadModel": LossReduction.CAUSAL_TOKEN_MEAN,
    "ForMaskedLM": LossReduction.TOKEN_MEAN,
    "ForTokenClassification": LossReduction.TOKEN_MEAN,
    "ForConditionalGeneration": LossReduction.TOKEN_MEAN,
    "ForSequenceClassification": LossReduction.SAMPLE_MEAN,
    "ForImageClassification": LossReduction.SAMPLE_MEAN,
}


def infer_reduction(model: nn.Module) -> LossReduction:
    """The reduction of a Hugging Face model's loss, known by its class.

    Raises:
        GhostConfigError: The class is unknown, or its loss has auxiliary terms that are no mean over labels.
    """
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is not None and getattr(config, "output_router_logits", False):
        raise GhostConfigError(
            f"the loss of {name} has an auxiliary term (config.output_router_logits=True) that joint batches "
            "cannot weigh: use val_mode='separate'."
        )
    for ending, reduction in _BY_CLASS_ENDING.items():
        if config is not None and name.endswith(ending) and _is_regular(name, config):
            return reduction
    choices = ", ".join(r.value for r in LossReduction)
    raise GhostConfigError(
        f"loss_reduction cannot be inferred for {name}: set it to what the model's loss is a mean of "
        f"({choices}), or use val_mode='separate'."
    )


def _is_regular(name: str, config: Any) -> bool:
    """Whether the class counts as its name says: some old language models do not shift, some new ones with
    images do.
    """
    if name.endswith("ForConditionalGeneration"):
        return bool(getattr(config, "is_encoder_decoder", False))
    return not name.startswith(("XLNet", "XLM"))


def count(labels: Tensor, reduction: LossReduction) -> Tensor:
    """What a loss over `labels` is a mean of, as a 0-dim int64 tensor on the labels' device; 1 for a sum."""
    if reduction is LossReduction.CAUSAL_TOKEN_MEAN:
        if labels.dim() < 2:
            raise BatchError(
                f"labels of shape {tuple(labels.shape)} have no positions to shift: "
                "loss_reduction='causal_token_mean' needs [rows, T]."
            )
        return (labels[:, 1:] != IGNORED_LABEL).sum()
    if reduction is LossReduction.TOKEN_MEAN:
        return (labels != IGNORED_LABEL).sum()
    rows = labels.shape[0] if reduction is LossReduction.SAMPLE_MEAN else 1
    return labels.new_full((), rows, dtype=torch.int64)
