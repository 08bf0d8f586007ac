"""Per-sample gradients kept until the end of a step: their inner products with targets that come late."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import ProtocolError
from ghost.config import GhostConfig
from ghost.engines import GradDotProdEngine
from ghost.kept import Kept
from ghost.loss import LossReduction
from tests.ghost import reference
from tests.ghost.harness import assert_near
from tests.ghost.models import table, tiny_gpt2, tokens
from tests.ghost.reference import causal_loss, class_loss

CAUSAL, BY_SAMPLE = LossReduction.CAUSAL_TOKEN_MEAN, LossReduction.SAMPLE_MEAN


def kept_step(model: nn.Module, X: Tensor, Y: Tensor, loss_fn: Any, reduction: LossReduction) -> Kept:
    """What the taps have kept of one batch."""
    config = GhostConfig.read({"val_mode": "separate", "order": 2, "loss_reduction": reduction})
    engine = GradDotProdEngine(model, config, (X[:2], Y[:2]), loss_fn)
    with engine.attached():
        engine.begin(X, Y, first=True, share=1.0)
        X_fwd, Y_fwd = engine.forward_inputs(X, Y)
        loss_fn(model, X_fwd, Y_fwd).backward()
        engine.collect()
        kept, engine.kept = engine.kept, Kept()  # the engine lets go of its own
    return kept


def test_any_targets_by_qualified_name() -> None:
    """Two columns of targets for every parameter, of which one is tied."""
    model, X = tiny_gpt2(), tokens(3, 9)
    named = dict(model.named_parameters(remove_duplicate=False))
    drawn = {id(p): torch.randn(2, *p.shape, dtype=torch.float64) for p in named.values()}
    targets = {name: drawn[id(p)] for name, p in named.items()}
    (scores,) = kept_step(model, X, X, causal_loss, CAUSAL).scores(targets)
    found = torch.stack([part.sum(0) for part in scores.values()]).sum(0)  # [b, C]
    each = reference.sample_gradients(model, causal_loss, X, X, CAUSAL)
    once = dict(model.named_parameters())
    for column in range(2):
        target = {name: drawn[id(p)][column] for name, p in once.items()}
        assert_near(found[:, column], torch.stack([reference.dot(target, g) for g in each]))


class Sometimes(nn.Module):
    """Its second layer is for batches of more than two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if len(x) > 2 else x


def test_what_has_no_use_or_no_target_is_zero() -> None:
    model, (X, Y) = Sometimes().double(), table(2)
    targets = {name: torch.randn(1, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    del targets["first.bias"]
    (scores,) = kept_step(model, X, Y, class_loss, BY_SAMPLE).scores(targets)
    sizes = {f"{layer}.{key}": float(part.abs().max()) for (layer, key), part in scores.items()}
    assert [name for name, size in sizes.items() if size == 0] == [
        "first.bias",
        "second.weight",
        "second.bias",
    ]
    assert {tuple(part.shape) for part in scores.values()} == {(1, 2, 1)}


def test_what_is_kept_serves_until_it_is_let_go_of() -> None:
    model, (X, Y) = Sometimes().double(), table(3)
    kept = kept_step(model, X, Y, class_loss, BY_SAMPLE)
    targets = {name: p.detach()[None] for name, p in model.named_parameters()}
    once, again = kept.scores(targets), kept.scores(targets)
    assert all(torch.equal(again[0][key], part) for key, part in once[0].items())
    kept.clear()
    assert kept.scores(targets) == []


def test_an_input_edited_in_place_is_noticed() -> None:
    model, (X, Y) = Sometimes().double(), table(3)
    kept = kept_step(model, X, Y, class_loss, BY_SAMPLE)
    X.zero_()
    with pytest.raises(ProtocolError, match="an input of layer 'first' was edited in place"):
        kept.scores({name: p.detach()[None] for name, p in model.named_parameters()})
