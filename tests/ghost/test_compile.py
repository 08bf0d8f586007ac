"""Under `torch.compile`, without graph breaks."""

from typing import Any

import pytest
import torch

from ghost import GhostEngineManager, LossReduction
from tests.ghost import reference
from tests.ghost.harness import EXACT, MODES, assert_gradients, assert_near, grads_of
from tests.ghost.models import tiny_gpt2, tokens
from tests.ghost.reference import causal_loss

CAUSAL = LossReduction.CAUSAL_TOKEN_MEAN


def check(mode: dict[str, Any], tied: bool, form: str, backend: str) -> None:
    """Two steps of a compiled GPT-2, with an evaluation between them, are the plain way's."""
    torch._dynamo.reset()
    inner, X, V = tiny_gpt2(tied=tied), tokens(4, 9), tokens(3, 9)
    expected = reference.scores(inner, causal_loss, (X, X), (V, V), CAUSAL)
    plain = reference.gradient(inner, causal_loss(inner, X, X))
    model = torch.compile(inner, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    manager = GhostEngineManager(mode, model, optimizer, val_data=(V, V), loss_fn=causal_loss)
    assert manager.model is inner
    for t in range(2):
        optimizer.zero_grad()
        if form == "short":
            with manager.step(X, X, batch_idx=range(4), iteration=t) as step:
                step.backward(causal_loss(model, step.X, step.Y))
        else:
            manager.attach_train_batch(X, X, t, range(4))
            causal_loss(model, *manager.prepare_forward_input(X, X)).backward()
            manager.prepare_gradients()
        assert_near(manager.scores, expected, EXACT)
        assert_gradients(grads_of(inner), plain, EXACT)
        with torch.no_grad():
            assert_near(model(X).logits, inner(X).logits)
    manager.cleanup()
    assert_near(model(X).logits, inner(X).logits)
    torch._dynamo.reset()


def test_gpt2_in_one_graph() -> None:
    check(MODES["concat"], tied=True, form="short", backend="aot_eager")


@pytest.mark.slow
def test_gpt2_with_generated_code() -> None:
    check(MODES["concat"], tied=True, form="short", backend="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", ["short", "protocol"])
@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
def test_every_mode_in_one_graph(mode: dict[str, Any], tied: bool, form: str) -> None:
    check(mode, tied, form, backend="aot_eager")
