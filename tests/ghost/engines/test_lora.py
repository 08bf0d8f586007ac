"""Low-rank adapters: only they are trained, and only they are scored."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ghost import BatchError, LossReduction
from ghost.discovery import find_layers
from ghost.loss import infer_reduction
from tests.ghost.engines.test_heads import llama
from tests.ghost.harness import EXACT, MODES, OWN_LOSS, assert_exact, scored_step
from tests.ghost.models import tiny_gpt2, tokens
from tests.ghost.reference import causal_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
CAUSAL = LossReduction.CAUSAL_TOKEN_MEAN


def adapted(model: Any, **settings: Any) -> nn.Module:
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, task_type="CAUSAL_LM", **settings)
    found: nn.Module = get_peft_model(model, config)
    for name, p in found.named_parameters():
        if p.requires_grad:
            p.data = p.data.double()
            if "lora_B" in name:  # a fresh adapter changes nothing
                p.data += torch.randn_like(p)
    return found


def rows(number: int) -> tuple[Tensor, Tensor]:
    ids = tokens(number, 9)
    return ids, ids


CASES: dict[str, Any] = {
    "conv1d": (lambda: adapted(tiny_gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), EXACT),
    "linear": (lambda: adapted(llama(), target_modules=["q_proj", "v_proj", "down_proj"]), OWN_LOSS),
    "trained head": (
        lambda: adapted(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
        OWN_LOSS,
    ),
    "embedding": (lambda: adapted(llama(), target_modules=["embed_tokens", "q_proj"]), OWN_LOSS),
    "magnitudes": (lambda: adapted(llama(), target_modules=["q_proj"], use_dora=True), OWN_LOSS),
}


@each_mode
@pytest.mark.parametrize("name", [name for name in CASES if name != "magnitudes"])
def test_adapters(name: str, mode: dict[str, Any]) -> None:
    make, rtol = CASES[name]
    model = make()
    found = assert_exact(model, mode, rows(4), rows(3), causal_loss, CAUSAL, rtol=rtol)
    assert found.by_layer
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora" in name or "modules_to_save" in name for name in trained)
    assert {layer.name for layer in find_layers(model)} == set(found.by_layer)
    assert infer_reduction(model) is CAUSAL


@each_mode
def test_an_adapter_that_runs_on_weights_is_refused_by_name(mode: dict[str, Any]) -> None:
    """DoRA multiplies its matrices with an identity, in which no sample is to be found."""
    make, _ = CASES["magnitudes"]
    config = mode | {"loss_reduction": CAUSAL}
    with pytest.raises(BatchError, match=r"lora_A\.default' got an input of shape \(16, 16\)"):
        scored_step(make(), config, rows(4), rows(3), causal_loss)
