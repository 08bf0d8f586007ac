"""Model, autocast, score and storage dtype are separate settings that do what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import GhostConfigError, GhostEngineManager, LossReduction
from ghost.batch import Inputs
from ghost.discovery import refuse_half
from ghost.values import read_shards
from tests.ghost import reference
from tests.ghost.harness import MODES, assert_gradients, assert_near, grads_of, scored_step
from tests.ghost.models import classes, mlp, table, tiny_gpt2, tokens
from tests.ghost.reference import causal_loss, class_loss

CAUSAL = LossReduction.CAUSAL_TOKEN_MEAN
BF16 = 0.02
"""Scores of bfloat16 gradients: two or three digits, of the largest."""

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


def fits(mode: dict[str, Any], algebra: str) -> bool:
    """Whether the mode has the algebra."""
    if mode.get("bitwise"):
        return algebra in ("auto", "target")
    return algebra != "token_token" or mode["val_mode"] == "concat"


MODES_AND_ALGEBRAS = [
    pytest.param(mode | {"algebra": algebra, "loss_reduction": CAUSAL}, id=f"{name}-{algebra}")
    for name, mode in MODES.items()
    for algebra in ("auto", "token_token", "target", "fused")
    if fits(mode, algebra)
]


def autocast_loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return causal_loss(model, X, Y)


@pytest.mark.parametrize("config", MODES_AND_ALGEBRAS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("length", [5, 40])
def test_autocast_is_close_to_float32(config: dict[str, Any], tied: bool, length: int) -> None:
    model, X, V = tiny_gpt2(tied=tied).float(), tokens(4, length), tokens(3, length)
    expected = reference.scores(model, causal_loss, (X, X), (V, V), CAUSAL)
    found = scored_step(model, config, (X, X), (V, V), autocast_loss)
    assert found.scores.dtype == torch.float32
    assert_near(found.scores, expected, BF16)
    assert {grad.dtype for grad in found.grads.values()} == {torch.float32}
    assert_gradients(found.grads, reference.gradient(model, causal_loss(model, X, X)), 0.05)


@pytest.mark.parametrize("config", MODES_AND_ALGEBRAS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("length", [5, 40])
def test_a_bfloat16_model(config: dict[str, Any], tied: bool, length: int) -> None:
    model, X, V = tiny_gpt2(tied=tied).bfloat16(), tokens(4, length), tokens(3, length)
    exact = tiny_gpt2(tied=tied)
    exact.load_state_dict(model.state_dict())
    expected = reference.scores(exact, causal_loss, (X, X), (V, V), CAUSAL)
    found = scored_step(model, config, (X, X), (V, V), causal_loss)
    assert found.scores.dtype == torch.float32
    assert found.scores.isfinite().all()
    assert_near(found.scores, expected, 0.05)
    assert {grad.dtype for grad in found.grads.values()} == {torch.bfloat16}


@each_mode
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolutions_norms_and_linear_layers_under_autocast(mode: dict[str, Any], spatial: int) -> None:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial]
    model = nn.Sequential(
        conv(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LayerNorm(3 * 3**spatial),
        nn.Linear(3 * 3**spatial, 4),
    )  # fmt: skip

    def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(model(X), Y)

    train, val = ((torch.randn(n, 2, *(5,) * spatial), classes(n)) for n in (6, 3))
    expected = reference.scores(model, loss, train, val, LossReduction.SAMPLE_MEAN)
    found = scored_step(model, mode | {"loss_reduction": "sample_mean"}, train, val, loss)
    assert_near(found.scores, expected, BF16)


@each_mode
@pytest.mark.parametrize("where", ["a backward inside of autocast", "a compiled model"])
def test_inner_products_keep_their_digits_beside_autocast(mode: dict[str, Any], where: str) -> None:
    """Whatever stands around the backward: a norm's gradients are float32, and so are their products."""
    model = nn.Sequential(nn.Linear(5, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
    (X, Y), (V, W) = table(6), table(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return class_loss(model, X, Y)

    def scores(called: nn.Module, inside: bool) -> Tensor:
        optimizer.zero_grad()
        config = mode | {"loss_reduction": "sample_mean"}
        manager = GhostEngineManager(config, called, optimizer, val_data=(V.float(), W), loss_fn=loss)
        with manager.step(X.float(), Y, batch_idx=range(6), iteration=0) as step:
            found = loss(called, step.X, step.Y)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                step.backward(found)
        manager.cleanup()
        return torch.stack(list(manager.scores_by_layer.values()))

    expected = scores(model, inside=False)
    if where == "a compiled model":
        torch._dynamo.reset()
        found = scores(torch.compile(model, backend="aot_eager"), inside=False)
        torch._dynamo.reset()
    else:
        found = scores(model, inside=True)
    assert_near(found, expected, 1e-6)


def test_uses_that_meet_at_the_end_of_a_step_inside_of_autocast_keep_their_digits() -> None:
    norm = nn.LayerNorm(32)
    model = nn.Sequential(nn.Linear(5, 32), norm, nn.Linear(32, 32), norm, nn.Linear(32, 4))
    (X, Y), (V, W) = table(6), table(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"loss_reduction": "sample_mean"}
    manager = GhostEngineManager(config, model, optimizer, val_data=(V.float(), W))
    outside, inside = [], []
    for enabled, found in ((False, outside), (True, inside)):
        whole = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        with whole, manager.step(X.float(), Y, batch_idx=range(6), iteration=0) as step:
            with torch.autocast("cpu", torch.bfloat16):
                loss = class_loss(model, step.X, step.Y)
            step.backward(loss)
        found += manager.scores_by_layer.values()
    assert_near(torch.stack(inside), torch.stack(outside), 1e-6)


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_token_ids_go_through_unchanged(mode: dict[str, Any], dtype: torch.dtype) -> None:
    """bfloat16 cannot hold most ids above 256."""
    model = tiny_gpt2().to(dtype)
    X, V = tokens(4, 9), tokens(3, 9)
    inputs = {"input_ids": X, "large": X + 50_000}
    val = {"input_ids": V, "large": V + 50_000}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager(
        mode, model, optimizer, val_data=(val, V), loss_fn=lambda m, x, y: causal_loss(m, x["input_ids"], y)
    )
    manager.attach_train_batch(inputs, X, 0, range(4))
    X_fwd, Y_fwd = manager.prepare_forward_input(inputs, X)
    assert isinstance(X_fwd, dict)
    joint = torch.cat([X, V]) if mode["val_mode"] == "concat" else X
    assert torch.equal(X_fwd["input_ids"], joint)
    assert torch.equal(X_fwd["large"], joint + 50_000)
    assert torch.equal(Y_fwd, joint)
    assert X_fwd["input_ids"].dtype == X_fwd["large"].dtype == Y_fwd.dtype == torch.int64
    manager.cleanup()


@each_mode
@pytest.mark.parametrize("score_dtype", ["float64", "fp64", torch.float64])
def test_score_dtype(mode: dict[str, Any], score_dtype: Any) -> None:
    (X, Y), (V, W) = table(6), table(3)
    train, val = (X.float(), Y), (V.float(), W)
    config = mode | {"loss_reduction": "sample_mean"}
    model = mlp().float()
    assert scored_step(model, config, train, val, class_loss).scores.dtype == torch.float32
    found = scored_step(model, config | {"score_dtype": score_dtype}, train, val, class_loss)
    assert found.scores.dtype == torch.float64
    assert {score.dtype for score in found.by_layer.values()} == {torch.float64}
    for dtype in (torch.float64, torch.bfloat16):
        scores = scored_step(mlp().to(dtype), config, (X.to(dtype), Y), (V.to(dtype), W), class_loss).scores
        assert scores.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        (None, torch.float64), ("float32", torch.float32), ("bf16", torch.bfloat16),
        ("fp16", torch.float16), (torch.float16, torch.float16), ("bfloat16", torch.bfloat16),
    ],
)  # fmt: skip
def test_storage_dtype(storage: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model, train, val = mlp(), table(6), table(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"loss_reduction": "sample_mean", "storage_dtype": storage, "result_dir": tmp_path}
    manager = GhostEngineManager(config, model, optimizer, val_data=val)
    with manager.step(*train, batch_idx=range(6), iteration=0) as step:
        step.backward(class_loss(model, step.X, step.Y))
    optimizer.step()
    assert manager.scores.dtype == torch.float64
    manager.cleanup()
    (shard,) = read_shards(tmp_path / "scores")
    assert shard["score"].dtype == dtype
    assert shard["lr"].dtype == shard["clip"].dtype == torch.float64
    assert torch.equal(shard["score"], manager.scores.to(dtype))
    assert grads_of(model)["0.weight"].dtype == torch.float64


def test_float16_weights_are_refused_by_name() -> None:
    model = mlp().float()
    model[2].half()
    with pytest.raises(GhostConfigError, match=r"'2\.weight' is float16.*autocast float16 with a GradScaler"):
        refuse_half(model)
    refuse_half(model.bfloat16())
    refuse_half(mlp().half().requires_grad_(False))
