"""Under `torch.compile`, without graph breaks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.modeling_outputs import CausalLMOutput

from ghost import GhostEngineManager, LossReduction
from tests.ghost import reference
from tests.ghost.harness import EXACT, MODES, assert_gradients, assert_near, grads_of
from tests.ghost.models import VOCABULARY, tiny_gpt2, tokens
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


class TiedBlock(nn.Module):
    """The least that a language model has: a table, a norm, a matrix, and a head of the table's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 24)
        self.norm, self.mix = nn.LayerNorm(24), nn.Linear(24, 24)
        self.head = nn.Linear(24, VOCABULARY, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        mixed = self.mix(self.norm(self.table(input_ids)).cumsum(1))
        return CausalLMOutput(logits=self.head(mixed.tanh()))


def compile_counting(model: nn.Module, regional: bool) -> tuple[nn.Module, CompileCounterWithBackend]:
    """The model, whole or block by block in full graphs, and a backend that counts them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    if not regional:
        return torch.compile(model, fullgraph=True, backend=counter), counter  # type: ignore[return-value]
    for block in model.transformer.h:
        block.compile(backend=counter, fullgraph=True)
    return model, counter


def steps_of_lengths(
    inner: nn.Module, mode: dict[str, Any], lengths: list[int], regional: bool = False
) -> tuple[list[int], list[str]]:
    """Exact steps on texts of these lengths: graphs compiled until each, and the algebras that were taken."""
    model, counter = compile_counting(inner, regional)
    V = tokens(3, 5)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    config = mode | {"loss_reduction": CAUSAL}
    manager = GhostEngineManager(config, model, optimizer, val_data=(V, V), loss_fn=causal_loss)
    graphs, algebras = [], []
    for t, length in enumerate(lengths):
        X = tokens(4, length)
        expected = reference.scores(inner, causal_loss, (X, X), (V, V), CAUSAL)
        optimizer.zero_grad()
        with manager.step(X, X, batch_idx=range(4), iteration=t) as step:
            step.backward(causal_loss(model, step.X, step.Y))
        assert_near(manager.scores, expected, EXACT)
        graphs.append(counter.frame_count)
        algebras.append(str(manager.algebra))
    manager.cleanup()
    torch._dynamo.reset()
    return graphs, algebras


@pytest.mark.parametrize("mode", [MODES["concat"], MODES["separate"]], ids=["concat", "separate"])
def test_a_change_of_length_compiles_once_and_a_change_of_algebra_never(mode: dict[str, Any]) -> None:
    graphs, algebras = steps_of_lengths(TiedBlock().double(), mode, [9, 12, 6, 130, 31])
    assert graphs == [1, 2, 2, 2, 2]  # a fixed length first, then any
    assert len(set(algebras)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("mode", [MODES["concat"], MODES["separate"]], ids=["concat", "separate"])
def test_gpt2_of_any_length(mode: dict[str, Any], regional: bool) -> None:
    # More blocks than one function may have graphs: one stands for them all, whatever the length, and the
    # reference's rows, alone and together, take two.
    model = tiny_gpt2(n_layer=9 if regional else 2)
    graphs, _ = steps_of_lengths(model, mode, [9, 12, 7, 15, 11], regional)
    assert graphs == ([3, 3, 3, 3, 3] if regional else [1, 2, 2, 2, 2])
