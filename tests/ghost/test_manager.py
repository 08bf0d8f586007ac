"""The manager in loops as people write them."""

import argparse
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost import (
    Algebra,
    BatchError,
    GhostConfig,
    GhostConfigError,
    GhostEngineManager,
    GhostError,
    LossReduction,
    ProtocolError,
    ValMode,
)
from ghost.batch import Inputs
from ghost.values import accumulate, read_shards
from tests.ghost import reference
from tests.ghost.harness import MODES, OWN_LOSS, Run, assert_exact, assert_gradients, assert_near, grads_of
from tests.ghost.models import mlp, table, tiny_gpt2, tokens
from tests.ghost.reference import causal_loss, class_loss, own_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))

CAUSAL, BY_SAMPLE = LossReduction.CAUSAL_TOKEN_MEAN, LossReduction.SAMPLE_MEAN


# --- GhostSuite's loop, with only the import changed --------------------------------------------------------


def as_namespace(settings: dict[str, Any]) -> Any:
    return argparse.Namespace(**settings)


def as_dataclass(settings: dict[str, Any]) -> Any:
    @dataclass
    class Settings:
        result_dir: str
        method: str = "GradDotProd"
        val_batch_size: int = 2
        dot_prod_save_interval: int = 2
        learning_rate: float = 0.1
        proj_rank_total: int = 256

    return Settings(**settings)


def as_node(settings: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create(settings)


@pytest.mark.parametrize("config_type", [dict, as_namespace, as_dataclass, as_node])
def test_the_protocol_loop(config_type: Any, tmp_path: Path) -> None:
    model = tiny_gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    V = tokens(2, 9)
    settings: dict[str, Any] = {
        "method": "GradDotProd", "val_batch_size": 2, "result_dir": str(tmp_path),
        "dot_prod_save_interval": 2, "learning_rate": 0.1, "proj_rank_total": 256,
    }  # fmt: skip
    manager = GhostEngineManager(config_type(settings), model, optimizer, val_data=(V, V))
    data, expected = tokens(12, 9), []
    for iteration in range(3):
        batch_idx = torch.arange(4) + 4 * iteration
        X = Y = data[batch_idx]
        expected.append(reference.scores(model, own_loss, (X, Y), (V, V), CAUSAL))
        plain = reference.gradient(model, own_loss(model, X, Y))
        optimizer.zero_grad(set_to_none=True)
        manager.attach_train_batch(X, Y, iteration, batch_idx)
        X_fwd, Y_fwd = manager.prepare_forward_input(X, Y)
        loss = model(input_ids=X_fwd, labels=Y_fwd).loss
        loss.backward()
        manager.prepare_gradients()
        assert_gradients(grads_of(model), plain, OWN_LOSS)
        optimizer.step()
        manager.aggregate_and_log()
        assert_near(manager.scores, expected[-1], OWN_LOSS)
        manager.clear_gradients()
        if manager.should_save_metrics(iteration):
            manager.save_metrics(iteration)
    assert len(list(tmp_path.glob("scores/shard-*.pt"))) == 1
    manager.cleanup()
    shards = list(read_shards(tmp_path / "scores"))
    assert [len(shard["step"]) for shard in shards] == [8, 4]
    rows = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    assert set(rows) == {"step", "sample", "score", "lr", "clip"}
    assert torch.equal(rows["step"], torch.arange(3).repeat_interleave(4))
    assert torch.equal(rows["sample"], torch.arange(12))
    assert_near(rows["score"], torch.cat(expected), OWN_LOSS)
    assert rows["lr"].eq(0.1).all()
    assert rows["clip"].eq(1).all()
    values = accumulate(shards)
    assert_near(values.value, 0.1 * torch.cat(expected), OWN_LOSS)


def test_the_short_form(tmp_path: Path) -> None:
    model, X, V = tiny_gpt2(), tokens(4, 9), tokens(3, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager({"result_dir": tmp_path}, model, optimizer, val_data=(V, V))
    expected = reference.scores(model, own_loss, (X, X), (V, V), CAUSAL)
    with manager.step(X, X, batch_idx=[7, 5, 9, 1], iteration=0) as step:
        step.backward(model(**step.inputs).loss)
    optimizer.step()
    assert_near(step.scores, expected, OWN_LOSS)
    manager.cleanup()
    assert_near(step.scores, expected, OWN_LOSS)
    (shard,) = read_shards(tmp_path / "scores")
    assert shard["sample"].tolist() == [7, 5, 9, 1]


def test_shards_hold_no_tokens(tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path})
    run.step(0)
    run.manager.cleanup()
    (shard,) = read_shards(tmp_path / "scores")
    assert set(shard) == {"step", "sample", "score", "lr", "clip"}
    assert {tuple(column.shape) for column in shard.values()} == {(6,)}


def test_dicts_of_any_keys_and_non_tensors() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pixels, self.words = nn.Linear(5, 4), nn.Linear(3, 4)
            self.double()

        def forward(self, pixel_values: Tensor, words: Tensor, mode: str, flag: Any = None) -> Tensor:
            assert mode == "both"
            assert flag is None
            return torch.tanh(self.pixels(pixel_values)) + self.words(words)

    def loss(model: nn.Module, X: Inputs, Y: Tensor) -> Tensor:
        assert isinstance(X, dict)
        return nn.functional.cross_entropy(model(**X), Y)

    def batch(rows: int) -> tuple[dict[str, Any], Tensor]:
        X, Y = table(rows)
        return {"pixel_values": X, "words": X[:, :3], "mode": "both", "flag": None}, Y

    for mode in MODES.values():
        assert_exact(Model(), mode, batch(6), batch(3), loss, BY_SAMPLE)


# --- the optimizer's part -----------------------------------------------------------------------------------


@each_mode
def test_clipping_is_observed(mode: dict[str, Any], tmp_path: Path) -> None:
    run = Run(mode | {"result_dir": tmp_path})
    scores = run.backward(0)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
    run.optimizer.step()
    rows = run.rows(tmp_path)
    assert norm > 0.01
    assert_near(rows["clip"], (0.01 / (norm + 1e-6)).expand(6))
    assert_near(accumulate([rows]).value, 0.1 * 0.01 / (norm + 1e-6) * scores)


def test_a_norm_below_the_limit_is_not_clipped(tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path})
    run.backward(0)
    nn.utils.clip_grad_norm_(run.model.parameters(), 1e6)
    run.optimizer.step()
    assert run.rows(tmp_path)["clip"].eq(1).all()


@pytest.mark.parametrize("when", ["before the step", "after the step", "after logging"])
def test_learning_rate_schedules(when: str, tmp_path: Path) -> None:
    """The logged rate is the one that the optimizer used."""
    run = Run({"result_dir": tmp_path})
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda t: 1 / (1 + t))
    used = []
    for t in range(3):
        run.backward(t)
        if when == "before the step" and t:
            schedule.step()
        used.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        if when == "after the step":
            schedule.step()
        run.manager.aggregate_and_log()
        if when == "after logging":
            schedule.step()
    rows = run.rows(tmp_path)
    assert_near(rows["lr"], torch.tensor(used, dtype=torch.float64).repeat_interleave(6))


@each_mode
def test_parameter_groups_with_rates_of_their_own(mode: dict[str, Any], tmp_path: Path) -> None:
    model = mlp()
    rates = [0.1, 0.01, 0.2]
    groups = [
        {"params": [model[0].weight], "lr": rates[0]},
        {"params": [model[0].bias, model[2].bias], "lr": rates[1]},
        {"params": [model[2].weight], "lr": rates[2]},
    ]
    run = Run(mode | {"result_dir": tmp_path}, torch.optim.SGD(groups), model=model)
    parts = reference.scores_by_parameter(model, class_loss, run.train, run.val, BY_SAMPLE)
    total = run.step(0)
    assert_near(total, torch.stack(list(parts.values())).sum(0))
    rows = run.rows(tmp_path)
    assert rows["score"].shape == rows["lr"].shape == (6, 3)
    by_group = [parts["0.weight"], parts["0.bias"] + parts["2.bias"], parts["2.weight"]]
    assert_near(rows["score"], torch.stack(by_group, dim=1))
    assert_near(rows["lr"], torch.tensor(rates, dtype=torch.float64).expand(6, 3))
    value = sum(rate * part for rate, part in zip(rates, by_group, strict=True))
    assert isinstance(value, Tensor)
    assert_near(accumulate([rows]).value, value)


def test_groups_with_one_rate_are_one_column(tmp_path: Path) -> None:
    model = mlp()
    groups = [
        {"params": [model[0].weight, model[0].bias], "weight_decay": 0.1},
        {"params": [model[2].weight, model[2].bias]},
    ]
    run = Run({"result_dir": tmp_path}, torch.optim.SGD(groups, lr=0.1), model=model)
    run.step(0)
    assert run.rows(tmp_path)["score"].shape == (6,)


def test_tied_parameters_in_groups(tmp_path: Path) -> None:
    model, X, V = tiny_gpt2(), tokens(4, 9), tokens(2, 9)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.SGD([{"params": decayed, "lr": 0.1}, {"params": others, "lr": 0.3}])
    manager = GhostEngineManager({"result_dir": tmp_path}, model, optimizer, val_data=(V, V))
    parts = reference.scores_by_parameter(model, causal_loss, (X, X), (V, V), CAUSAL)
    with manager.step(X, X, batch_idx=range(4), iteration=0) as step:
        step.backward(causal_loss(model, step.X, step.Y))
    optimizer.step()
    manager.cleanup()
    (shard,) = read_shards(tmp_path / "scores")
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert_near(shard["score"][:, 0], torch.stack([parts[n] for n in parts if n in matrices]).sum(0))
    assert_near(shard["score"][:, 1], torch.stack([parts[n] for n in parts if n not in matrices]).sum(0))


def test_a_step_that_the_optimizer_skips_credits_nothing(tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path})
    run.step(0)
    run.backward(1)
    run.step(2)
    run.backward(3)
    rows = run.rows(tmp_path)
    assert rows["clip"].tolist() == [1.0] * 6 + [0.0] * 6 + [1.0] * 6 + [0.0] * 6
    values = accumulate([rows])
    credited = rows["score"].reshape(4, 6)[[0, 2]].sum(0)
    assert_near(values.value, 0.1 * credited)


def test_a_skipped_step_of_groups_and_of_what_no_group_has(tmp_path: Path) -> None:
    model = nn.Sequential(mlp(), mlp(4), nn.Linear(4, 4).double())
    first, second = model[0].parameters(), model[1].parameters()
    groups = [{"params": p, "lr": 0.1 * i} for i, p in enumerate([first, second, [model[2].weight]], start=1)]
    run = Run({"result_dir": tmp_path}, torch.optim.SGD(groups), model=model)
    run.step(0)
    run.backward(1)
    run.manager.cleanup()
    (shard,) = read_shards(tmp_path / "scores")
    assert shard["lr"][0].unique().tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert shard["lr"][6:].eq(0).all()
    assert shard["clip"].tolist() == pytest.approx([1.0] * 6 + [0.0] * 6)


def scaled_run(tmp_path: Path, mode: dict[str, Any], scale: float) -> Run:
    model = mlp().float()
    run = Run.__new__(Run)
    run.model = model
    (X, Y), (V, W) = table(6), table(3)
    run.train, run.val = (X.float(), Y), (V.float(), W)
    run.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    config = mode | {"loss_reduction": "sample_mean", "result_dir": tmp_path}
    run.manager = GhostEngineManager(
        config, model, run.optimizer, val_data=run.val, loss_fn=class_loss, scaler=run.scaler
    )
    return run


@each_mode
@pytest.mark.parametrize("form", ["short", "protocol"])
def test_scores_are_free_of_the_loss_scale(mode: dict[str, Any], form: str, tmp_path: Path) -> None:
    run = scaled_run(tmp_path, mode, 2.0**12)
    expected = reference.scores(run.model, class_loss, run.train, run.val, BY_SAMPLE)
    plain = reference.gradient(run.model, class_loss(run.model, *run.train))
    if form == "short":
        run.backward(0)
    else:
        run.manager.attach_train_batch(*run.train, 0, range(6))
        X, Y = run.manager.prepare_forward_input(*run.train)
        run.scaler.scale(class_loss(run.model, X, Y)).backward()
        run.manager.prepare_gradients()
    assert_near(run.manager.scores, expected, 1e-5)
    run.scaler.unscale_(run.optimizer)
    assert_gradients(grads_of(run.model), plain, 1e-5)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    rows = run.rows(tmp_path)
    assert_near(rows["clip"], (0.01 / (norm + 1e-6)).expand(6), 1e-5)


def test_an_overflow_credits_nothing(tmp_path: Path) -> None:
    run = scaled_run(tmp_path, {}, 2.0**12)
    for t in range(3):
        run.backward(t)
        if t == 1:
            run.model[0].weight.grad.view(-1)[0] = float("inf")
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.manager.aggregate_and_log()
    assert run.scaler.get_scale() == 2.0**11
    rows = run.rows(tmp_path)
    assert rows["clip"].tolist() == pytest.approx([1.0] * 6 + [0.0] * 6 + [1.0] * 6)


def test_a_disabled_scaler_is_no_scaler(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run = Run({"result_dir": tmp_path}, scaler=scaler)
    expected = reference.scores(run.model, class_loss, run.train, run.val, BY_SAMPLE)
    assert_near(run.step(0), expected)
    assert run.rows(tmp_path)["clip"].eq(1).all()


# --- order of calls, and errors -----------------------------------------------------------------------------


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run()
    run.step(0)
    run.manager.save_metrics(0)
    run.manager.cleanup()
    assert list(tmp_path.iterdir()) == []


def test_calls_out_of_order() -> None:
    run = Run()
    manager = run.manager
    with pytest.raises(ProtocolError, match=r"prepare_forward_input\(\) needs a training batch"):
        manager.prepare_forward_input(*run.train)
    with pytest.raises(ProtocolError, match=r"backward\(\) needs a training batch"):
        manager.backward(torch.zeros(()))
    with pytest.raises(ProtocolError, match=r"no step to prepare gradients for"):
        manager.prepare_gradients()
    with pytest.raises(ProtocolError, match=r"aggregate_and_log\(\) comes after prepare_gradients"):
        manager.aggregate_and_log()
    with pytest.raises(ProtocolError, match=r"no scores are known yet"):
        _ = manager.scores
    with pytest.raises(ProtocolError, match=r"no scores are known yet"):
        _ = manager.scores_by_layer
    manager.detach_for_evaluation()
    with pytest.raises(ProtocolError, match=r"detached: call reattach_after_evaluation"):
        manager.attach_train_batch(*run.train, 0, range(6))
    manager.reattach_after_evaluation()
    run.step(0)


@pytest.mark.parametrize("own_backward", [True, False])
def test_a_step_without_its_backward_is_refused(own_backward: bool) -> None:
    """`loss.backward()` inside `manager.step` would leave the joint mean's weight in every gradient."""
    run = Run()
    expected = reference.scores(run.model, class_loss, run.train, run.val, BY_SAMPLE)

    def wrong_step() -> None:
        with run.manager.step(*run.train, batch_idx=range(6), iteration=0) as step:
            loss = class_loss(run.model, step.X, step.Y)
            if own_backward:
                loss.backward()

    with pytest.raises(ProtocolError, match=r"without step\.backward\(loss\)"):
        wrong_step()
    assert_near(run.step(1), expected)


@pytest.mark.parametrize(
    ("batch_idx", "message"),
    [
        ([0, 1], r"shape \(2,\), but the training batch has 6 rows"),
        (3, r"shape \(\), but the training batch has 6 rows"),
        ([[0, 1, 2, 3, 4, 5]], r"shape \(1, 6\)"),
        ([0.5, 1, 2, 3, 4, 5], r"should be integers"),
        (torch.zeros(6), r"should be integers"),
        ([True] * 6, r"should be integers"),
        (list("abcdef"), r"should be integers"),
        (None, r"should be integers"),
        ([[0], [1, 2]], r"should be integers"),
    ],
)
def test_sample_ids_that_fit_no_batch(batch_idx: Any, message: str) -> None:
    run = Run()
    with pytest.raises(BatchError, match=message):
        run.manager.attach_train_batch(*run.train, 0, batch_idx)
    run.step(1)


@pytest.mark.parametrize("ids", [range(6), list(range(6)), tuple(range(6)), torch.arange(6).int()])
def test_sample_ids_of_any_integer_kind(ids: Any, tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path})
    with run.manager.step(*run.train, batch_idx=ids, iteration=0) as step:
        step.backward(class_loss(run.model, step.X, step.Y))
    sample = run.rows(tmp_path)["sample"]
    assert sample.dtype == torch.int64
    assert sample.tolist() == list(range(6))


def test_forward_inputs_that_were_not_prepared_are_refused() -> None:
    run = Run()
    run.manager.attach_train_batch(*run.train, 0, range(6))
    run.manager.prepare_forward_input(*run.train)
    with pytest.raises(BatchError, match=r"'0' got an input of shape \(6, 5\).*9 rows"):
        class_loss(run.model, *run.train)


def test_settings_that_cannot_work_change_nothing(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bad: list[dict[str, Any]] = [
        {"pairwise": 1}, {"preconditioner": "adam"}, {"engine": "nonsense"}, {"val_mode": "both"},
        {"loss_reduction": "mean"}, {"val_batch_size": 0},
    ]  # fmt: skip
    for config in bad:
        with pytest.raises(GhostConfigError, match=next(iter(config))):
            GhostEngineManager(
                {"loss_reduction": "sample_mean"} | config, model, optimizer, val_data=table(3)
            )
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "shard-00000.pt").touch()
    with pytest.raises(GhostConfigError, match=r"result_dir has score shards of another run"):
        GhostEngineManager(
            {"loss_reduction": "sample_mean", "result_dir": tmp_path}, model, optimizer, val_data=table(3)
        )
    assert "forward" not in vars(model[0])
    assert not optimizer._optimizer_step_pre_hooks


def test_an_unknown_engine_lists_the_choices() -> None:
    model = mlp()
    with pytest.raises(
        GhostConfigError, match=r"engine='ghost' should be one of graddotprod, gradprojlora, regular"
    ):
        GhostEngineManager({"method": "ghost"}, model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_model_whose_loss_is_unknown_is_asked_for_it() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GhostConfigError, match=r"loss_reduction cannot be inferred for Sequential.*separate"):
        GhostEngineManager({}, model, optimizer, val_data=table(3))


def test_the_regular_engine_needs_no_validation_rows_and_scores_nothing(tmp_path: Path) -> None:
    model, (X, Y) = mlp(), table(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager({"method": "Regular", "result_dir": tmp_path}, model, optimizer)
    manager.attach_train_batch(X, Y, 0, range(6))
    X_fwd, Y_fwd = manager.prepare_forward_input(X, Y)
    assert X_fwd is X
    assert Y_fwd is Y
    class_loss(model, X_fwd, Y_fwd).backward()
    manager.prepare_gradients()
    optimizer.step()
    manager.aggregate_and_log()
    assert manager.scores.numel() == 0
    assert manager.scores_by_layer == {}
    manager.cleanup()
    assert not (tmp_path / "scores").exists()


def test_saving_waits_for_the_optimizer(tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path, "save_interval": 3})
    assert [t for t in range(7) if run.manager.should_save_metrics(t)] == [2, 5]
    run.backward(0)
    run.manager.save_metrics(0)
    assert not (tmp_path / "scores").exists()
    run.optimizer.step()
    run.manager.save_metrics(0)
    run.manager.save_metrics(0)
    assert len(list(read_shards(tmp_path / "scores"))) == 1
    run.step(1)
    assert run.rows(tmp_path)["step"].tolist() == [0] * 6 + [1] * 6


def test_the_public_signatures_stay() -> None:
    assert list(inspect.signature(GhostEngineManager).parameters) == [
        "config", "model", "optimizer", "ddp_info", "val_data", "loss_fn", "scaler", "state", "policy",
    ]  # fmt: skip
    attach = inspect.signature(GhostEngineManager.attach_train_batch)
    assert list(attach.parameters)[1:5] == ["X", "Y", "iteration", "batch_idx"]


def test_every_error_of_the_library_is_one_kind() -> None:
    for error in (BatchError, GhostConfigError, ProtocolError):
        assert issubclass(error, GhostError)


# --- what a loop may do without thinking of it --------------------------------------------------------------


@pytest.mark.parametrize("iterations", [[0, 1, 0, 1], [0, 0, 0, 0]])
@each_mode
def test_steps_are_told_apart_whatever_is_counted(mode: dict[str, Any], iterations: list[int]) -> None:
    run = Run(mode | {"val_batch_size": 1 if mode["val_mode"] == "concat" else 3})
    for step, iteration in enumerate(iterations):
        rows = slice(step % 3, step % 3 + 1) if mode["val_mode"] == "concat" else slice(None)
        val = (run.val[0][rows], run.val[1][rows])
        expected = reference.scores(run.model, class_loss, run.train, val, BY_SAMPLE)
        assert_near(run.step(iteration), expected)


def test_scores_of_a_step_stay_its_own() -> None:
    run = Run()
    kept = []
    for t in range(2):
        run.optimizer.zero_grad()
        with run.manager.step(*run.train, batch_idx=range(6), iteration=t) as step:
            with pytest.raises(ProtocolError, match="after the with-block"):
                _ = step.scores
            step.backward(class_loss(run.model, step.X, step.Y))
        kept.append((step, run.manager.scores.clone()))
        run.optimizer.step()
    assert not torch.equal(kept[0][1], kept[1][1])
    for step, scores in kept:
        assert torch.equal(step.scores, scores)


def test_the_short_form_writes_shards_as_it_goes(tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path, "save_interval": 2})
    for t in range(5):
        run.step(t)
    assert [shard["step"].unique().tolist() for shard in read_shards(tmp_path / "scores")] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("overflow", [False, True])
def test_a_fused_optimizer_unscales_by_itself(tmp_path: Path, overflow: bool) -> None:
    run = scaled_run(tmp_path, {"val_mode": "concat"}, 2.0**10)
    run.manager.cleanup()
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.1, fused=True)
    config = {"loss_reduction": "sample_mean", "result_dir": tmp_path / "fused"}
    run.manager = GhostEngineManager(
        config, run.model, run.optimizer, val_data=run.val, loss_fn=class_loss, scaler=run.scaler
    )
    run.backward(0)
    if overflow:
        next(run.model.parameters()).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
    run.scaler.step(run.optimizer)
    run.scaler.update()
    assert_near(run.rows(tmp_path / "fused")["clip"], torch.full((6,), 0.0 if overflow else 1.0), 1e-6)


def test_settings_are_the_same_given_as_words() -> None:
    words: dict[str, Any] = {"val_mode": "concat", "loss_reduction": "sample_mean", "algebra": "fused"}
    assert GhostConfig(**words, score_dtype="float64") == GhostConfig(
        val_mode=ValMode.CONCAT, loss_reduction=BY_SAMPLE, algebra=Algebra.FUSED, score_dtype=torch.float64
    )


def test_the_protocol_form_needs_a_call_of_the_model_as_a_whole() -> None:
    run = Run()
    run.manager.attach_train_batch(*run.train, 0, range(6))
    X, Y = run.manager.prepare_forward_input(*run.train)
    hidden = X
    for module in run.model:
        hidden = module(hidden)
    nn.functional.cross_entropy(hidden, Y).backward()
    with pytest.raises(ProtocolError, match="call the model as a whole"):
        run.manager.prepare_gradients()


@each_mode
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_batch_without_a_counted_label_weighs_nothing(mode: dict[str, Any], kind: Any) -> None:
    model, X, V = tiny_gpt2(), tokens(4, 9), tokens(3, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = GhostEngineManager(mode, model, optimizer, val_data=(V, V), loss_fn=causal_loss)
    parts = [(X[:2], X[:2]), (X[2:], torch.full_like(X[2:], -100))]
    for i, (x, y) in enumerate(parts):
        with manager.step(x, y, batch_idx=range(2), iteration=0, share=kind(1.0 - i), last=bool(i)) as step:
            logits = model(step.X).logits[:, :-1].flatten(0, 1)
            losses = nn.functional.cross_entropy(logits, step.Y[:, 1:].flatten(), reduction="sum")
            step.backward(losses / (step.Y[:, 1:] != -100).sum().clamp(min=1))
    expected = reference.scores(model, causal_loss, (X[:2], X[:2]), (V, V), LossReduction.CAUSAL_TOKEN_MEAN)
    assert_near(manager.scores, torch.cat([expected, torch.zeros(2, dtype=expected.dtype)]))


def test_a_manager_that_was_cleaned_up_stays_so() -> None:
    run = Run()
    run.manager.cleanup()
    with pytest.raises(ProtocolError, match="make a new one"):
        run.manager.reattach_after_evaluation()


def test_what_no_parameter_group_has_is_credited_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, train = mlp(), table(6)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.5)
    config = {"loss_reduction": "sample_mean", "result_dir": str(tmp_path)}
    manager = GhostEngineManager(config, model, optimizer, val_data=table(3))
    assert "the optimizer does not have 0.bias, 0.weight" in caplog.text
    with manager.step(*train, batch_idx=range(6), iteration=0) as step:
        step.backward(class_loss(model, step.X, step.Y))
    expected = 0.5 * manager.scores_by_layer["2"]
    optimizer.step()
    manager.cleanup()
    assert_near(accumulate(read_shards(tmp_path / "scores")).value, expected)


def test_more_micro_batches_than_were_announced_are_refused() -> None:
    run = Run()
    run.manager.attach_train_batch(*run.train, 0, range(6))
    class_loss(run.model, *run.manager.prepare_forward_input(*run.train)).backward()
    with pytest.raises(ProtocolError, match=r"more micro-batches than gradient_accumulation_steps=1"):
        run.manager.attach_train_batch(*run.train, 0, range(6))


def test_an_unfinished_step_is_named_when_it_is_left(caplog: pytest.LogCaptureFixture) -> None:
    model, train = mlp(), table(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"loss_reduction": "sample_mean", "gradient_accumulation_steps": 2}
    manager = GhostEngineManager(config, model, optimizer, val_data=table(3))
    with manager.step(*train, batch_idx=range(6), iteration=7, last=False) as step:
        step.backward(class_loss(model, step.X, step.Y))
    manager.detach_for_evaluation()
    assert "step 7 is left unfinished: its 6 samples are not scored" in caplog.text
    manager.cleanup()
