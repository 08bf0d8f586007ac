"""Steps that fail, at every place where one can, and what is left of them."""

import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ghost import BatchError, GhostEngineManager, LossReduction, ProtocolError
from ghost.policies import StepSamples
from ghost.values import read_shards
from tests.ghost import reference
from tests.ghost.harness import MODES, Run, assert_near
from tests.ghost.models import mlp, table
from tests.ghost.reference import class_loss

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
BY_SAMPLE = LossReduction.SAMPLE_MEAN


@each_mode
@pytest.mark.parametrize("where", ["before the forward", "after the forward", "after the backward"])
def test_an_exception_inside_a_step_leaves_the_manager_usable(
    mode: dict[str, Any], where: str, tmp_path: Path
) -> None:
    run = Run(mode | {"result_dir": tmp_path})
    expected = reference.scores(run.model, class_loss, run.train, run.val, BY_SAMPLE)

    def failing_step() -> None:
        with run.manager.step(*run.train, batch_idx=range(6), iteration=0) as step:
            if where != "before the forward":
                loss = class_loss(run.model, step.X, step.Y)
                if where == "after the backward":
                    step.backward(loss)
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        failing_step()
    assert_near(run.step(1), expected)
    assert run.rows(tmp_path)["step"].unique().tolist() == [1]


def test_an_exception_in_a_later_step_keeps_the_earlier_rows(tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path})
    run.step(0)
    with pytest.raises(KeyError), run.manager.step(*run.train, batch_idx=range(6), iteration=1):
        raise KeyError("the user's own")
    run.step(2)
    assert run.rows(tmp_path)["step"].unique().tolist() == [0, 2]


def test_a_refused_batch_leaves_the_manager_usable(tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path})
    X, Y = run.train
    for t, (inputs, labels, ids) in enumerate(((X, Y, [0]), (X, Y[:2], range(6)), (X[:, :2], Y, range(6)))):
        with (
            pytest.raises(BatchError),
            run.manager.step(inputs, labels, batch_idx=ids, iteration=t) as step,
        ):
            step.backward(class_loss(run.model, step.X, step.Y))
    run.step(3)
    assert run.rows(tmp_path)["step"].unique().tolist() == [3]


def test_a_forward_that_failed_in_the_protocol_loop_can_be_left_behind(tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path})
    run.manager.attach_train_batch(*run.train, 0, range(6))
    with pytest.raises(ProtocolError, match=r"found no gradient"):
        run.manager.prepare_gradients()
    run.step(1)
    run.manager.attach_train_batch(*run.train, 2, range(6))
    run.manager.detach_for_evaluation()
    run.manager.reattach_after_evaluation()
    run.step(3)
    assert run.rows(tmp_path)["step"].unique().tolist() == [1, 3]


class Failing(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise FloatingPointError("half way")


@each_mode
def test_a_backward_that_failed_in_the_protocol_loop_is_dropped(mode: dict[str, Any], tmp_path: Path) -> None:
    run = Run(mode | {"result_dir": tmp_path})
    expected = reference.scores(run.model, class_loss, run.train, run.val, BY_SAMPLE)
    manager = run.manager
    manager.attach_train_batch(*run.train, 0, range(6))
    X, Y = manager.prepare_forward_input(*run.train)
    first, *rest = run.model
    hidden = Failing.apply(first(X))
    for module in rest:
        hidden = module(hidden)
    with pytest.raises(FloatingPointError, match="half way"):
        torch.nn.functional.cross_entropy(hidden, Y).backward()
    manager.drop_step()
    assert_near(run.step(0), expected)
    assert run.rows(tmp_path)["sample"].tolist() == list(range(6))


def test_a_step_left_open_is_named_with_how_to_drop_it() -> None:
    run = Run()
    with run.manager.step(*run.train, batch_idx=range(6), iteration=3, last=False) as step:
        step.backward(class_loss(run.model, step.X, step.Y))
    with pytest.raises(ProtocolError, match=r"step 3 is still open at iteration 4: .* or drop_step"):
        run.manager.attach_train_batch(*run.train, 4, range(6))
    run.manager.drop_step()
    run.step(4)
    run.manager.cleanup()


@pytest.mark.parametrize("settings", [{}, {"policy": "all"}], ids=["plain", "policy"])
def test_an_optimizer_step_before_the_steps_end_is_refused(settings: dict[str, Any]) -> None:
    run = Run(settings)

    def early_step() -> None:
        with run.manager.step(*run.train, batch_idx=range(6), iteration=0) as step:
            step.backward(class_loss(run.model, step.X, step.Y))
            run.optimizer.step()

    with pytest.raises(ProtocolError, match=r"optimizer\.step\(\) came before the end of step 0, where"):
        early_step()
    run.step(1)
    run.manager.cleanup()


def test_where_the_end_of_a_step_fails_the_step_leaves_no_trace() -> None:
    def failing(samples: StepSamples) -> Tensor:
        raise MemoryError

    model, train = mlp(), table(6)
    manager = GhostEngineManager(
        {"loss_reduction": "sample_mean", "val_batch_size": 2}, model,
        torch.optim.SGD(model.parameters(), lr=0.1), val_data=table(5), policy=failing,
    )  # fmt: skip
    before = manager.engine.state_dict()
    with (
        pytest.raises(MemoryError),
        manager.step(*train, batch_idx=range(6), iteration=0) as step,
    ):
        step.backward(class_loss(model, step.X, step.Y))
    assert manager.engine.state_dict() == before
    assert not list(manager.engine.kept.uses())
    manager.cleanup()


def test_other_learning_rates_are_refused_once(tmp_path: Path) -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.1}]
    settings = {"val_mode": "separate", "order": 2, "result_dir": tmp_path}
    run = Run(settings, torch.optim.SGD(groups), model=model)
    run.step(0)
    run.backward(1)
    run.optimizer.param_groups[0]["lr"] = 0.05
    run.optimizer.step()
    with pytest.raises(ProtocolError, match=r"step 1 ended its backward with learning rates"):
        run.step(2)
    run.step(3)
    run.manager.cleanup()
    steps = [step for shard in read_shards(tmp_path / "scores") for step in shard["step"].unique().tolist()]
    assert steps == [0, 3]


# --- the end ------------------------------------------------------------------------------------------------


def test_cleanup_twice(tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path})
    run.step(0)
    for _ in range(2):
        run.manager.cleanup()
    assert len(list(read_shards(tmp_path / "scores"))) == 1
    assert not run.manager.is_active
    assert not run.optimizer._optimizer_step_pre_hooks


def test_where_there_is_no_room_the_model_is_put_back_and_rows_are_kept(tmp_path: Path) -> None:
    run = Run({"result_dir": tmp_path})
    run.step(0)
    full = patch("ghost.scores.write_atomically", side_effect=OSError(28, "No space left on device"))
    for _ in range(2):
        with full, pytest.raises(OSError, match="No space left"):
            run.manager.cleanup()
        assert not any("forward" in module.__dict__ for module in run.model.modules())
        assert not run.optimizer._optimizer_step_pre_hooks
    run.manager.cleanup()
    (shard,) = read_shards(tmp_path / "scores")
    assert len(shard["sample"]) == 6


@pytest.mark.parametrize("val_every", [1, 3])
def test_no_validation_gradient_outlives_the_manager(val_every: int) -> None:
    def held() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) and o.shape == (1, 103, 5) for o in gc.get_objects())

    run = Run({"val_mode": "separate", "val_every": val_every}, model=mlp(hidden=103))
    for t in range(4):
        run.step(t)
    run.manager.detach_for_evaluation()
    assert held() == 0
    run.manager.reattach_after_evaluation()
    run.step(4)
    run.manager.cleanup()
    assert held() == 0
