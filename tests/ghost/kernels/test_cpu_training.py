"""Training steps in float32 on a CPU, whose matrices the C program takes, beside PyTorch's own tiles."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ghost import GhostEngineManager, kernels
from ghost.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no gcc, or no AVX2")


def train(config: dict[str, Any], micro_batches: int) -> tuple[Tensor, list[Tensor]]:
    """Scores of three steps of a GPT-2 whose head is its embedding, and its weights after them."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows, val = torch.randint(0, 50, (3, micro_batches, 4, 16)), torch.randint(0, 50, (2, 16))
    config = {"gradient_accumulation_steps": micro_batches, **config}
    manager = GhostEngineManager(config, model, optimizer, val_data=(val, val))
    found = []
    for iteration, step in enumerate(rows):
        optimizer.zero_grad()
        for at, X in enumerate(step):
            last = at == micro_batches - 1
            with manager.step(X, X, batch_idx=range(4), iteration=iteration, last=last) as scoring:
                scoring.backward(model(**scoring.inputs).loss)
        found.append(manager.scores)
        optimizer.step()
    manager.cleanup()
    return torch.stack(found), [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("settings", [{"algebra": "fused"}, {"preconditioner": "auto"}], ids=str)
@pytest.mark.parametrize("val_mode", ["concat", "separate"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_kernel_changes_rounding_alone(
    settings: dict[str, str], val_mode: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {}
    for served in (True, False):
        monkeypatch.setattr(kernels, "serves", lambda *_, served=served: served)
        runs[served] = train({**settings, "val_mode": val_mode}, micro_batches)
    (scores, weights), (expected, expected_weights) = runs[True], runs[False]
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    for found, tiled in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(found, tiled, rtol=0, atol=2e-5)
