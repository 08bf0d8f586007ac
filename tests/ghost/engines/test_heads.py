"""Scores of single attention heads: what they are, what they sum to, and what a selection of them leaves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ghost import GhostConfigError, GhostEngineManager, LossReduction, Selection
from ghost.discovery import find_layers
from ghost.gradients import cut
from ghost.heads import attention_heads
from tests.ghost import reference
from tests.ghost.engines.test_whole import Attention, sequences
from tests.ghost.harness import EXACT, MODES, OWN_LOSS, assert_gradients, assert_near, grads_of
from tests.ghost.models import VOCABULARY, tiny_gpt2, tokens
from tests.ghost.reference import Gradient, LossFn, causal_loss, class_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
CAUSAL = LossReduction.CAUSAL_TOKEN_MEAN


def llama() -> Any:
    """Four query heads in two groups."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, attention_bias=True,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.double().train()


def rows(number: int) -> tuple[Tensor, Tensor]:
    ids = tokens(number, 9)
    return ids, ids


CASES: dict[str, Any] = {
    "gpt2": (tiny_gpt2, rows, causal_loss, CAUSAL, EXACT),
    "llama": (llama, rows, causal_loss, CAUSAL, OWN_LOSS),
    "multi-head attention": (Attention, sequences, class_loss, LossReduction.SAMPLE_MEAN, EXACT),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def expected_by_label(
    model: nn.Module, loss_fn: LossFn, train: Any, val: Any, reduction: LossReduction
) -> dict[str, Tensor]:
    """Scores by head, and by layer of what belongs to no head, from gradients held in full."""
    layers = find_layers(model)
    heads = attention_heads(model, layers)
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    first: dict[int, str] = {}  # a shared parameter's gradient stands under one of its names
    for name, key in parameters.items():
        first.setdefault(key, name)
    val_grad = reference.gradient(model, loss_fn(model, *val))
    grads = reference.sample_gradients(model, loss_fn, *train, reduction)
    found: dict[str, Tensor] = {}

    def add(label: str, gradient: Gradient, name: str, part: Any) -> Tensor:
        g, target = gradient[name], val_grad[name]
        if part is not None:
            g, target = cut(g, part.axis, part.index), cut(target, part.axis, part.index)
        return (g * target).sum()

    for layer in layers:
        for key in layer.params:
            name = layer.qualified(key)
            if first[parameters[name]] != name:
                continue
            for part in heads.get((layer.name, key), [None]):
                label = layer.name if part is None else part.label
                scores = torch.stack([add(label, g, name, part) for g in grads])
                found[label] = found[label] + scores if label in found else scores
    return found


def step_of(
    model: nn.Module, config: dict[str, Any], train: Any, val: Any, loss_fn: LossFn
) -> GhostEngineManager:
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager(config, model, optimizer, val_data=val, loss_fn=loss_fn)
    with manager.step(*train, batch_idx=range(len(train[1])), iteration=0) as step:
        step.backward(loss_fn(model, step.X, step.Y))
    return manager


@each_mode
@each_case
def test_scores_by_head(case: Any, mode: dict[str, Any]) -> None:
    make, batch, loss_fn, reduction, rtol = case
    model, train, val = make(), batch(4), batch(3)
    expected = expected_by_label(model, loss_fn, train, val, reduction)
    config = mode | {"loss_reduction": reduction, "resolution": "head"}
    manager = step_of(model, config, train, val, loss_fn)
    by_head = manager.scores_by("head")
    if "lm_head" in by_head:  # one matrix, two uses: the reference has both under the table's name
        table = "transformer.wte" if "transformer.wte" in by_head else "model.embed_tokens"
        if model.config.tie_word_embeddings:
            by_head[table] = by_head[table] + by_head.pop("lm_head")
    assert set(by_head) == set(expected)
    largest = max(float(s.abs().max()) for s in expected.values())
    for label, scores in expected.items():
        torch.testing.assert_close(by_head[label], scores, rtol=0, atol=rtol * largest, msg=label)
    assert_gradients(grads_of(model), reference.gradient(model, loss_fn(model, *train)), rtol)
    for resolution in ("total", "layer", "family", "head"):
        parts = torch.stack(list(manager.scores_by(resolution).values()))
        assert_near(parts.sum(0), manager.scores)
    manager.cleanup()


@each_mode
@each_case
def test_selected_heads(case: Any, mode: dict[str, Any]) -> None:
    """Only what was selected is scored, and every parameter's gradient is the training gradient."""
    make, batch, loss_fn, reduction, rtol = case
    model, train, val = make(), batch(4), batch(3)
    expected = expected_by_label(model, loss_fn, train, val, reduction)
    blocks = sorted({label.rpartition(".head[")[0] for label in expected if ".head[" in label})
    last = blocks[-1]
    selection = Selection(include=(f"{last}.head[0-1]",))
    config = mode | {"loss_reduction": reduction, "resolution": "head", "selection": selection}
    manager = step_of(model, config, train, val, loss_fn)
    found = manager.scores_by("head")
    assert set(found) == {f"{last}.head[0]", f"{last}.head[1]"}
    for label, scores in found.items():
        assert_near(scores, expected[label], rtol)
    assert_gradients(grads_of(model), reference.gradient(model, loss_fn(model, *train)), rtol)
    manager.cleanup()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_pairs_by_head(name: str) -> None:
    make, batch, loss_fn, reduction, rtol = CASES[name]
    model, train, val = make(), batch(4), batch(3)
    config = {"loss_reduction": reduction, "resolution": "head", "pairwise": True}
    manager = step_of(model, config, train, val, loss_fn)
    by_head = {label: scores.sum(1) for label, scores in manager.scores_by("head").items()}
    assert manager.scores.shape == (4, 3)
    manager.cleanup()
    expected = expected_by_label(model, loss_fn, train, val, reduction)
    heads = [label for label in expected if "head[" in label]
    assert len(heads) == (4 if name == "gpt2" else 12)
    for label in heads:
        assert_near(by_head[label], expected[label], 10 * rtol)


def test_heads_are_only_told_apart_when_asked_for() -> None:
    manager = step_of(tiny_gpt2(), {}, rows(4), rows(3), causal_loss)
    with pytest.raises(GhostConfigError, match=r"resolution='total' does not tell heads apart.*'head'"):
        manager.scores_by("head")
    with pytest.raises(GhostConfigError, match=r"resolution='token' should be one of"):
        manager.scores_by("token")
    manager.cleanup()
