"""What becomes of the model before it is trained: blocks that are split, activations that are not kept."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

from conf.errors import ConfigError
from runners.wrapping import blocks, checkpoint_activations


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=8)).double()


def test_blocks_are_the_models_own_and_share_nothing() -> None:
    model = gpt2()
    assert blocks(model) == list(model.transformer.h)
    model.transformer.h[0].mlp.c_fc.bias = model.transformer.h[1].mlp.c_fc.bias
    assert blocks(model) == []
    assert blocks(torch.nn.Sequential(torch.nn.Linear(2, 2))) == []


def test_activations_are_computed_again_and_gradients_stay() -> None:
    ids = torch.randint(0, 11, (3, 8))
    gradients, runs = [], []
    for checkpointed in (False, True):
        model = gpt2().train()
        calls: list[int] = []
        model.transformer.h[0].ln_1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointed:
            checkpoint_activations(model, "gpt2")
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        runs.append(len(calls))
    assert runs == [1, 2]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)


def test_a_model_that_keeps_all_activations_is_refused() -> None:
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    )
    with pytest.raises(ConfigError, match="is nothing that model=resnet-tiny can do: type false"):
        checkpoint_activations(resnet, "resnet-tiny")
    with pytest.raises(ConfigError, match="model=mlp"):
        checkpoint_activations(torch.nn.Linear(2, 2), "mlp")
